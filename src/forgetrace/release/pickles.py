"""Pickles of arrays, read without letting them run anything.

A pickle can call any function it names. This reader lets it name only what numpy's arrays, numbers and dtypes are
rebuilt with, and Python's plain containers.
"""

import pickle
from pathlib import Path

import numpy as np

from forgetrace.artifacts import UserError

REBUILT = {  # as numpy 1 and 2 name them
    (module, name)
    for core in ("numpy.core", "numpy._core")
    for module, name in ((f"{core}.multiarray", "_reconstruct"), (f"{core}.multiarray", "scalar"))
} | {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
}
CONTAINERS = {("builtins", name) for name in ("dict", "list", "tuple", "set", "frozenset", "bytearray")}


class _Refused(Exception):
    """The pickle names something else."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        """What the pickle names, where that is harmless."""
        module = "builtins" if module == "__builtin__" else module  # as protocols of Python 2 name it
        if (module, name) == ("_codecs", "encode"):  # how old protocols keep the bytes of arrays
            return _latin1
        if (module, name) not in REBUILT | CONTAINERS:
            raise _Refused(f"{module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise _Refused(f"_codecs.encode with {encoding}")
    return text.encode("latin1")


def read_pickle(path: Path) -> dict:
    """The mapping in a pickle of arrays.

    Raises:
        UserError: it is missing or damaged, names anything that is no array or plain container, or is no mapping.
    """
    try:
        with open(path, "rb") as file:
            content = _Reader(file).load()
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
