"""A float array on disk that is filled in row by row and survives a kill."""

from pathlib import Path

import numpy as np

from forgetrace.artifacts import UserError, read_array, write_array


def resumable(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A memory-mapped array of NaN, float32, or what an interrupted run left of it."""
    try:
        intact = read_array(path, mmap=True).shape == shape
    except UserError:
        intact = False
    if not intact:
        # Written in full, so that a full disk is noticed now and not when a page is first touched.
        write_array(path, np.full(shape, np.nan, dtype=np.float32))
    return np.load(path, mmap_mode="r+")
