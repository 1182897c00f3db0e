"""The dataset sources by name: those that make their images, and those whose images are there already."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from forgetrace.config import Prepare
from forgetrace.datasets import coco, digit_pairs, digits, folder
from forgetrace.datasets.contract import Example

SOURCES: dict[str, Callable[[int], Iterator[Example]]] = {
    "digits": digits.examples,
    "digit-pairs": digit_pairs.examples,
}
# Each has listing(path), images_in(path) and FILES, the names of the files that may list the images.
OWN: dict[str, ModuleType] = {"folder": folder, "coco": coco}


def source_files(settings: Prepare) -> list[str]:
    """The files whose change asks for another ``prepare``, of those that are there; none for bundled datasets."""
    if settings.dataset not in OWN:
        return []
    files = (Path(settings.path, name) for name in OWN[settings.dataset].FILES)
    return [file.as_posix() for file in files if file.is_file()]
