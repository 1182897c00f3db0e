"""Folders of captioned pictures, made by the tests."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def picture(number: int, width: int = 24, height: int = 20) -> Image.Image:
    """A picture of noise, another one for every number."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_folder(folder: Path, captions: dict[str, str | list[str]]) -> Path:
    """An ImageFolder of pictures, by file name, with metadata.jsonl."""
    for number, name in enumerate(captions):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / name)
    rows = [{"file_name": name, "text": text} for name, text in captions.items()]
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return folder


def write_coco(folder: Path, images: dict[int, list[str]]) -> Path:
    """COCO captions by image id, in the given order, and the JPEGs they are of."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "train2017").mkdir()
    names = {number: f"{number:012d}.jpg" for number in images}
    for number, name in names.items():
        picture(number).save(folder / "train2017" / name)
    listed = [{"id": number, "file_name": name, "width": 24, "height": 20} for number, name in names.items()]
    pairs = [(number, caption) for number, captions in images.items() for caption in captions]
    # As in the real file, annotations are in another order than images; those of one image keep theirs.
    pairs.sort(key=lambda pair: -pair[0])
    told = [{"id": i, "image_id": number, "caption": caption} for i, (number, caption) in enumerate(pairs)]
    content = {"info": {}, "licenses": [], "images": listed, "annotations": told}
    (folder / "annotations/captions_train2017.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
