"""A float array on disk that is filled in row by row and survives a kill."""

from pathlib import Path

import numpy as np

from forgetrace.artifacts import UserError, atomic, read_array

BLOCK = 2**22  # numbers written at once


def resumable(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A memory-mapped array of NaN, float32, or what an interrupted run left of it."""
    try:
        intact = read_array(path, mmap=True).shape == shape
    except UserError:
        intact = False
    if not intact:
        _write_nan(path, shape)
    return np.load(path, mmap_mode="r+")


def _write_nan(path: Path, shape: tuple[int, ...]) -> None:
    # Written in full, so that a full disk is noticed now and not when a page is first touched; in blocks, because
    # the array may be larger than memory.
    header = {"descr": "<f4", "fortran_order": False, "shape": tuple(map(int, shape))}
    left, block = int(np.prod(shape)), np.full(BLOCK, np.nan, dtype="<f4")
    with atomic(path) as temporary, open(temporary, "wb") as out:
        np.lib.format.write_array_header_1_0(out, header)
        while left > 0:
            block[:left].tofile(out)
            left -= BLOCK
