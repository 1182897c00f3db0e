"""COCO 2017 (arXiv 1405.0312, captions arXiv 1504.00325): photographs, each with five captions or more.

Read through ``pycocotools``; images and captions come in the order of the annotation file.
"""

import json
import os
from contextlib import redirect_stdout
from pathlib import Path

from forgetrace.artifacts import UserError
from forgetrace.datasets.contract import Listing, Problem, Reference, one_or_list

FILES = ("annotations/captions_train2017.json",)
CAPTIONS = 5  # of each image, the first ones


def images_in(path: str) -> str:
    """The folder that file names are relative to."""
    return f"{path}/train2017"


def listing(path: str) -> Listing:
    """Read the annotations; images are not opened, only looked for.

    Args:
        path: the folder with ``annotations/`` and ``train2017/``.

    Raises:
        UserError: ``pycocotools``, the annotations or the images' folder is missing, or the former cannot be read.
    """
    file, images = Path(path, *FILES), Path(images_in(path))
    for place, there in ((file, file.is_file()), (images, images.is_dir())):
        if not there:
            raise UserError(
                f"prepare.path: {place} is missing; put captions_train2017.json and the images of "
                "http://images.cocodataset.org/zips/train2017.zip and annotations_trainval2017.zip there."
            )
    there = {entry.name for entry in os.scandir(images)}
    references: list[Reference] = []
    problems: list[Problem] = []
    names: set[str] = set()
    for order, (name, captions) in enumerate(_annotated(file)):
        if not captions:
            problem = "has no caption"
        elif name not in there:
            problem = f"is missing in {images}"
        elif name in names:
            problem = "is listed twice"
        else:
            names.add(name)
            references.append(Reference(Path(name).stem, name, one_or_list(captions), f"image {order + 1}", order))
            continue
        problems.append(Problem(order, f"image {order + 1}: {name} {problem}"))
    return Listing(str(file), references, problems)


def _annotated(file: Path) -> list[tuple[str, list[str]]]:
    """File name and captions of every image, in the order of the annotation file."""
    try:
        from pycocotools.coco import COCO
    except ImportError:
        raise UserError(
            "dataset coco is read with the package pycocotools, which is not installed: run `pip install pycocotools`."
        ) from None
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # it prints while it reads
            annotations = COCO(str(file))
        captions = {
            image["id"]: [annotation["caption"].strip() for annotation in annotations.imgToAnns[image["id"]]]
            for image in annotations.dataset["images"]
        }
        return [
            (image["file_name"], list(filter(None, captions[image["id"]]))[:CAPTIONS])
            for image in annotations.dataset["images"]
        ]
    except (KeyError, TypeError, AttributeError, AssertionError, json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{file} is no file of COCO captions, or damaged: download it again.") from None
