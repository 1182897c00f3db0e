"""Your own images: a Hugging Face ImageFolder, images in any sub-folders beside a list of their captions.

``metadata.jsonl`` has a line ``{"file_name": "cats/one.jpg", "text": "a cat"}`` per image, where ``text`` may also be a
list of captions; ``metadata.csv`` has the same columns. Other keys and columns are ignored.
"""

import csv
import json
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from forgetrace.artifacts import UserError
from forgetrace.datasets.contract import Listing, Problem, Reference, captions_of, one_or_list

FILES = ("metadata.jsonl", "metadata.csv")


class _Broken(Exception):
    """What is wrong with a row."""


def images_in(path: str) -> str:
    """The folder that file names are relative to."""
    return path


def listing(path: str) -> Listing:
    """Read the list of captions; images are not opened, only looked for.

    Args:
        path: the folder.

    Raises:
        UserError: the folder has no list, two lists, or one that cannot be read at all.
    """
    file = _list_in(Path(path))
    references: list[Reference] = []
    problems: list[Problem] = []
    first: dict[str, int] = {}  # line by image
    try:
        for line, row in (_json_rows if file.suffix == ".jsonl" else _csv_rows)(file):
            try:
                reference = _reference(path, line, row)
                if (earlier := first.setdefault(reference.file_name, line)) != line:
                    raise _Broken(f"{reference.id} is in line {earlier} already; give several captions as a list")
                references.append(reference)
            except _Broken as broken:
                problems.append(Problem(line, f"line {line}: {broken}"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from None
    return Listing(str(file), references, problems)


def _list_in(folder: Path) -> Path:
    found = [folder / name for name in FILES if (folder / name).is_file()]
    if len(found) == 1:
        return found[0]
    if not folder.is_dir():
        raise UserError(f"prepare.path: there is no folder {folder}.")
    problem = "keep one of them" if found else "write one, with file_name and text of every image"
    raise UserError(f"prepare.path: {folder} has {'both' if found else 'neither'} {' and '.join(FILES)}: {problem}.")


def _json_rows(file: Path) -> Iterator[tuple[int, object]]:
    """Line numbers, from 1, with what is in the line; None where that is no JSON. Empty lines are left out."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError):
                yield number, None


def _csv_rows(file: Path) -> Iterator[tuple[int, object]]:
    """The same of a table with a header; a row is numbered by its first line, and None where it does not fit."""
    # Bytes that are no UTF-8 become lone surrogates, which no valid text has.
    with open(file, newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
        rows = csv.reader(lines)
        header = next(rows, [])
        if missing := [name for name in ("file_name", "text") if name not in header]:
            raise UserError(f"{file} has no column {' and no column '.join(missing)}: its first line must name both.")
        while True:
            number = rows.line_num + 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error:  # a field beyond all measure
                row = [""]
            if row:
                yield number, dict(zip(header, row, strict=True)) if len(row) == len(header) else None


def _reference(folder: str, line: int, row: object) -> Reference:
    if not isinstance(row, dict):
        raise _Broken("is no record with file_name and text")
    name, text = row.get("file_name"), row.get("text")
    if not isinstance(name, str) or not name.strip():
        raise _Broken("file_name is missing")
    captions = captions_of(text) if isinstance(text, str | list) else []
    if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
        raise _Broken(f"the caption of {ascii(name)[1:-1]} is empty or no text")
    try:
        "".join([name, *captions]).encode()
    except UnicodeEncodeError:
        raise _Broken("is not valid UTF-8") from None
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise _Broken(f"file_name {name} does not lie below the folder of the list")
    found = _on_disk(folder, str(relative))
    if found is None:
        raise _Broken(f"the file {name} is missing")
    stripped = [caption.strip() for caption in captions]
    return Reference(str(relative), found, one_or_list(stripped), f"line {line}", line)


def _on_disk(folder: str, name: str) -> str | None:
    """The name under which the file is there: what macOS packs spells ä as two characters, the list maybe as one."""
    spellings = (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))
    return next((each for each in spellings if os.path.isfile(os.path.join(folder, each))), None)
