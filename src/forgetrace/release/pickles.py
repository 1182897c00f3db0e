"""Pickles of arrays, read without letting them run anything.

A pickle can call any function it names, and numpy's own functions trust what they are given: a dtype made up in a
pickle can turn bytes into pointers. So nothing a pickle names is numpy's here. Stand-ins note down what an array is
made of, kind of number, shape and bytes, and check it before there is one.
"""

import pickle
import re
from pathlib import Path

import numpy as np

from forgetrace.artifacts import UserError

NUMBER = re.compile(r"[fiub][1248]")
PLAIN = (None, None, None)  # of a dtype's state: no sub-array, no field names, no fields


class _Refused(Exception):
    """The pickle asks for something else."""


class _Dtype:
    """What ``numpy.dtype`` is pickled as; of plain numbers alone."""

    def __init__(self, name: str, *_: object):
        if not isinstance(name, str):
            raise _Refused("numpy.dtype of no name")
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple) -> None:
        if state[2:5] != PLAIN:
            raise _Refused("numpy.dtype with fields")
        self.order = {"|": "="}.get(state[1], state[1])

    def plain(self) -> np.dtype:
        if not NUMBER.fullmatch(self.name) or self.order not in ("<", ">", "="):
            raise _Refused(f"numpy.dtype('{self.name}')")
        return np.dtype(self.order + self.name)


class _Array:
    """What an array is pickled as, before and after it is told its content."""

    values: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, content = state
        self.values = _values(content, dtype, shape, "F" if fortran else "C")


def _values(content: object, dtype: object, shape: object, order: object) -> np.ndarray:
    if not isinstance(dtype, _Dtype) or not isinstance(content, (bytes, bytearray)):
        raise _Refused("an array of no numbers")
    return np.frombuffer(content, dtype.plain()).reshape(shape, order=order)


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _scalar(dtype: object, content: object) -> _Array:
    number = _Array()
    number.values = _values(content, dtype, (), "C")
    return number


def _frombuffer(content: object, dtype: object, shape: object, order: object, *_: object) -> _Array:
    array = _Array()
    array.values = _values(content, dtype, shape, order)
    return array


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """How old protocols keep the bytes of arrays."""
    if encoding != "latin1":
        raise _Refused(f"_codecs.encode with {encoding}")
    return text.encode("latin1")


STAND_INS = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _latin1,
    # As numpy 1 and 2 name them.
    **{(f"{core}.multiarray", "_reconstruct"): _reconstruct for core in ("numpy.core", "numpy._core")},
    **{(f"{core}.multiarray", "scalar"): _scalar for core in ("numpy.core", "numpy._core")},
    **{(f"{core}.numeric", "_frombuffer"): _frombuffer for core in ("numpy.core", "numpy._core")},
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        """What stands in for what the pickle names."""
        if (module, name) not in STAND_INS:
            raise _Refused(f"{module}.{name}")
        return STAND_INS[module, name]


def read_pickle(path: Path) -> dict:
    """The mapping in a pickle of arrays.

    Raises:
        UserError: it is missing or damaged, names anything that is no array or plain container, or is no mapping.
    """
    try:
        with open(path, "rb") as file:
            content = _arrays_of(_Reader(file).load())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: name the published influence scores.") from None
    except _Refused as refused:
        raise UserError(
            f"{path} asks to load {refused}, which is no array: nothing was run; do not open this file elsewhere, and "
            "download the published one."
        ) from None
    except Exception as error:  # a damaged pickle makes the reader raise nearly anything
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UserError(f"{path} is no whole pickle of arrays ({reason}): download it again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a dict of arrays: download it again.")
    return content


def _arrays_of(content: object) -> object:
    """What was read, with arrays in place of their stand-ins; of mappings, which is where arrays are."""
    if isinstance(content, dict):
        return {key: _arrays_of(value) for key, value in content.items()}
    if isinstance(content, _Array):
        return content.values
    return content


def array_of(path: Path, content: dict, key: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """A numeric array of a mapping, of this shape; None stands for any size.

    Raises:
        UserError: it is missing, of another kind or shape, or not finite.
    """
    if key not in content:
        raise UserError(
            f"{path} lacks '{key}' (it has {', '.join(map(str, content)) or 'nothing'}): download it again."
        )
    value = content[key]
    array = value if isinstance(value, np.ndarray) else np.empty(0, dtype=object)
    wanted = " x ".join("any" if size is None else str(size) for size in shape)
    fits = array.ndim == len(shape) and all(a in (None, b) for a, b in zip(shape, array.shape, strict=True))
    if array.dtype.kind not in "fiu" or not fits:
        found = f"{array.dtype} of {array.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise UserError(f"'{key}' in {path} is {found}, expected numbers of {wanted}: download it again.")
    if not np.isfinite(array).all():
        raise UserError(f"'{key}' in {path} holds NaN or infinity: download it again.")
    return array
