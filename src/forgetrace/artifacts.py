"""Every file the stages exchange: written atomically, read with checks, stamped with provenance.

A file is written under a temporary name beside its final one and renamed when complete, so a killed
stage leaves nothing that looks finished. Formats: ``.json``, ``.npy`` (memory-mappable arrays),
``.npz`` (named arrays), ``.safetensors`` (named tensors), ``.parquet`` and ``.csv`` (tables). All
but the ``.npy`` and ``.csv`` carry the provenance their stage passes: config slice, package
versions and input hashes.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    import torch

RECORDED_PACKAGES = ("forgetrace", "torch", "diffusers", "transformers", "numpy")

PRIVATE = 2**30  # bytes of the largest file mapped privately

LARGE = 2**28  # bytes from which a file's hash is remembered
HASHES = Path(".snakemake", "hashes")  # among the workflow's own records; without them nothing is remembered
SETTLED = 2  # seconds since its last change after which a file's date tells of the next one on any file system


class UserError(Exception):
    """What went wrong, in one sentence that names the file or key and the way out."""


@contextmanager
def atomic(path: str | Path, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path that becomes ``path`` when the block ends without an exception.

    Args:
        path: the file to write; its folder is made.
        durable: wait until the bytes are on the disk, so that not even a power cut leaves an empty
            file under the final name.

    Raises:
        UserError: the disk is full or the folder cannot be written to.
    """
    path = Path(path)
    # A process id alone is not unique: nodes of a cluster may write the same file to a folder they share.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if durable:
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
        temporary.replace(path)
    except Exception as error:
        if reason := _unwritable(error):
            raise UserError(f"Cannot write {path}: {reason}.") from error
        raise
    finally:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass  # the folder itself cannot be written to: there is nothing to clean up


def _unwritable(error: BaseException | None) -> str | None:
    """The reason a write failed, with the way out; None where it is not the file system's doing."""
    if error is None:
        return None
    code = getattr(error, "errno", None)
    # safetensors reports an I/O error as text only, numpy a write cut short.
    if code is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
        code = int(found[1])
    if code is None and isinstance(error, OSError) and re.search(r"\d+ requested and \d+ written", str(error)):
        code = errno.ENOSPC
    if code in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space and run the same command again"
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "no permission to write there; check the folder's owner and mode, then run again"
    if code in (errno.EEXIST, errno.ENOTDIR):
        return "a file stands where one of its folders should be; move it away and run again"
    # torch, closing its archive, covers the error with one of its own.
    return _unwritable(error.__context__)


def sha256_of(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes.

    Every job of an experiment asks for those of its data, which at COCO's size takes minutes: of a large file the
    answer is remembered until its size, inode or one of its dates changes.

    Raises:
        UserError: the file is missing or cannot be read.
    """
    with _readable(path), open(path, "rb") as content:
        status = os.fstat(content.fileno())
        if status.st_size < LARGE or not HASHES.parent.is_dir():
            return hashlib.file_digest(content, "sha256").hexdigest()
        record = HASHES / f"{fingerprint(os.path.realpath(path))}.json"
        state = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
        try:
            known = json.loads(record.read_text())
            if known["state"] == state:
                return known["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        settled = time.time() - max(status.st_mtime, status.st_ctime) > SETTLED
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if settled:
        try:
            write_json(record, {"file": str(path), "state": state, "sha256": found})
        except (UserError, OSError):
            pass  # a folder that cannot be written to costs time alone
    return found


def fingerprint(value: object) -> str:
    """Hex SHA-256 of plain data: equal data, equal fingerprint, whatever the key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def safe_name(text: str) -> str:
    """A file name for any text: legible, and no two texts share one."""
    legible = re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[-60:]
    return f"{legible}-{fingerprint(text)[:8]}"


def stage_versions(*stages: str) -> dict[str, int]:
    """The numbers of ``workflow/versions.yaml`` that a result's key must hold.

    A number is raised when a stage's code changes its results; 0 where there is no such file.
    """
    import yaml

    try:
        numbers = yaml.safe_load(Path("workflow/versions.yaml").read_text(encoding="utf-8"))
    except OSError:
        numbers = {}
    return {stage: numbers.get(stage, 0) for stage in stages}


def provenance(config: Mapping, inputs: Mapping[str, str | Path] | None = None) -> dict:
    """What an output records of its making.

    Args:
        config: the slice of the config that shaped it.
        inputs: input files by role; their SHA-256 is recorded.
    """
    packages = {}
    for name in RECORDED_PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    hashes = {role: sha256_of(path) for role, path in (inputs or {}).items()}
    return {"config": dict(config), "packages": packages, "inputs": hashes}


def write_json(path: str | Path, content: object) -> None:
    """Write plain data as indented UTF-8 JSON."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> dict:
    """Read JSON written by :func:`write_json`."""
    with _readable(path):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def write_array(path: str | Path, array: np.ndarray) -> None:
    """Write one array as a memory-mappable ``.npy``."""
    with atomic(path) as temporary, open(temporary, "wb") as out:
        np.save(out, array, allow_pickle=False)


def write_array_in_parts(
    path: str | Path, shape: tuple[int, ...], parts: Iterable[np.ndarray], dtype: str = "float32"
) -> None:
    """Write one array that is never in memory at once; the bytes are those of :func:`write_array`.

    Written one after another, not through a memory map: on a full disk that would end the process without a word.

    Args:
        path: the ``.npy``.
        shape: of the whole array.
        parts: its rows in order, each of shape (n, *shape[1:]).
        dtype: of the file's numbers.
    """
    with atomic(path) as temporary, open(temporary, "wb") as out:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tuple(shape)}
        np.lib.format.write_array_header_1_0(out, header)
        for part in parts:
            np.asarray(part, dtype=dtype).tofile(out)


def read_array(path: str | Path, mmap: bool = False) -> np.ndarray:
    """Read a ``.npy``; with ``mmap`` its data stay on disk until indexed, and are not to be written to."""
    with _readable(path):
        # What is written to a private map stays in memory; but the system may refuse one larger than that.
        mode = "c" if os.path.getsize(path) < PRIVATE else "r"
        array = np.load(path, mmap_mode=mode if mmap else None, allow_pickle=False)
        if not isinstance(array, np.ndarray):  # an .npz under this name
            raise ValueError("no single array")
        return array


def on_disk(array: np.ndarray) -> "torch.Tensor":
    """A memory-mapped array as a tensor, which must not be changed in place."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def write_arrays(path: str | Path, arrays: Mapping[str, np.ndarray], made_by: Mapping) -> None:
    """Write named arrays and their provenance as one ``.npz``."""
    with atomic(path) as temporary, open(temporary, "wb") as out:
        np.savez(out, provenance=np.array(json.dumps(made_by)), **arrays)


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Read the arrays of :func:`write_arrays`; ``provenance`` is left out."""
    with _readable(path), open(path, "rb") as file, np.load(file, allow_pickle=False) as content:
        return {name: content[name] for name in content.files if name != "provenance"}


def write_tensors(path: str | Path, tensors: Mapping[str, "torch.Tensor"], made_by: Mapping) -> None:
    """Write named tensors and their provenance as ``.safetensors``."""
    import torch
    from safetensors.torch import save_file

    # Saved from contiguous copies: safetensors refuses strided and shared storage.
    contiguous = torch.contiguous_format
    plain = {name: tensor.detach().cpu().clone(memory_format=contiguous) for name, tensor in tensors.items()}
    with atomic(path) as temporary:
        save_file(plain, temporary, metadata={"provenance": json.dumps(made_by)})


def read_tensors(path: str | Path) -> dict[str, "torch.Tensor"]:
    """Read named tensors, on the CPU."""
    from safetensors.torch import load_file

    with _readable(path):
        return load_file(path)


def write_table(path: str | Path, table: "pd.DataFrame", made_by: Mapping | None = None) -> None:
    """Write a table as ``.parquet`` (with provenance in its metadata) or ``.csv``, by suffix."""
    with atomic(path) as temporary:
        if Path(path).suffix == ".csv":
            table.to_csv(temporary, index=False, lineterminator="\n", float_format="%.6g")
        else:
            table = table.copy()
            table.attrs = {"provenance": dict(made_by or {})}
            table.to_parquet(temporary, index=False)


NAMES = ("query", "method", "method_a", "method_b", "member", "model")  # columns of tables; never numbers


def read_table(path: str | Path) -> "pd.DataFrame":
    """Read a table written by :func:`write_table`."""
    import pandas as pd

    with _readable(path):
        if Path(path).suffix != ".csv":
            return pd.read_parquet(path)
        # A query may be called 001 or null.
        return pd.read_csv(path, dtype=dict.fromkeys(NAMES, str), keep_default_na=False, na_values=[""])


def read_table_provenance(path: str | Path) -> dict:
    """The provenance a ``.parquet`` file was written with; empty where it has none."""
    from pyarrow import parquet

    with _readable(path):
        attributes = (parquet.read_schema(path).metadata or {}).get(b"PANDAS_ATTRS", b"{}")
        return json.loads(attributes).get("provenance", {})


def write_image(path: str | Path, pixels: np.ndarray) -> None:
    """Write pixels of shape (height, width, 3), uint8, as an uncompressed PNG.

    Stored, not deflated: deflate streams differ between zlib builds, these bytes do not. Not durable:
    thousands are written at once, and the manifest or record written after them is.
    """
    from PIL import Image

    with atomic(path, durable=False) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", compress_level=0)


def read_image(path: str | Path) -> np.ndarray:
    """Read an image as RGB pixels of shape (height, width, 3), uint8."""
    from PIL import Image

    with _readable(path), Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def read_tensors_provenance(path: str | Path) -> dict:
    """The provenance a ``.safetensors`` file was written with; empty where it has none."""
    from safetensors import safe_open

    with _readable(path), safe_open(path, framework="np") as content:
        return json.loads((content.metadata() or {}).get("provenance", "{}"))


@contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    """Turn whatever a reader raises on a missing or damaged file into one sentence.

    A damaged file makes its reader raise nearly anything, so the block must do nothing but read.
    """
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run the stage that makes it, or `make reproduce`.") from None
    except PermissionError:
        raise UserError(f"{path} cannot be read: check its owner and mode.") from None
    except ImportError:
        raise  # the installation's fault, not the file's
    except Exception as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UserError(f"{path} is damaged ({reason}): delete it and run again to rebuild it.") from error
