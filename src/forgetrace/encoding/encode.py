"""The ``encode`` stage: the training images as memory-mappable latents, the captions as token states."""

from collections.abc import Iterator
from itertools import chain

import numpy as np
import pandas as pd

from forgetrace.artifacts import (
    UserError,
    fingerprint,
    provenance,
    read_array,
    read_json,
    sha256_of,
    write_array,
    write_array_in_parts,
    write_json,
    write_table,
)
from forgetrace.datasets.contract import captions_of
from forgetrace.datasets.images import TrainingImages
from forgetrace.datasets.prepare import TRAIN, read_metadata
from forgetrace.encoding.latents import to_latents
from forgetrace.encoding.text import WEIGHTS_SHA256, token_states
from forgetrace.layout import Layout
from forgetrace.progress import progress
from forgetrace.randomness import generator

EMPTY = ""
AT_ONCE = 256  # images in memory


def encode(layout: Layout) -> None:
    """Encode the training split into ``layout.latents``, ``captions``, ``index`` and the manifest.

    Raises:
        UserError: an image is missing, truncated or of another size than the rest.
    """
    rows = _training_rows(layout)
    shape = read_json(layout.data_manifest)["image_shape"]
    captions = [*sorted({row["text"] for row in rows}), EMPTY]
    row_of = {caption: i for i, caption in enumerate(captions)}
    index = pd.DataFrame(
        {
            "image_id": [row["id"] for row in rows],
            "file_name": [row["file_name"] for row in rows],
            "caption": [row["text"] for row in rows],
            "caption_row": [row_of[row["text"]] for row in rows],
        }
    )
    latents = _latents(layout, [row["file_name"] for row in rows], tuple(shape))
    first = next(latents)
    write_array_in_parts(layout.latents, (len(rows), *first.shape[1:]), chain([first], latents))
    write_array(layout.captions, token_states(captions))
    made_by = provenance(layout.config.digest_of("encode"), {"metadata": layout.metadata, "data": layout.data_manifest})
    write_table(layout.index, index, made_by)
    write_json(
        layout.encode_manifest,
        {
            "images": len(rows),
            "image_shape": shape,
            "latent_shape": list(read_array(layout.latents, mmap=True).shape[1:]),
            "caption_shape": list(read_array(layout.captions, mmap=True).shape[1:]),
            # Equal on every machine, unlike the bits a text encoder computes on another CPU.
            "source": fingerprint([made_by["inputs"], made_by["config"], WEIGHTS_SHA256, layout.config.seed]),
            "sha256": {role: sha256_of(path) for role, path in _files(layout).items()},
            "made_by": made_by,
        },
    )


def _files(layout: Layout) -> dict[str, str]:
    return {"latents": layout.latents, "captions": layout.captions, "index": layout.index}


def _training_rows(layout: Layout) -> list[dict]:
    rows = [
        row | {"text": captions_of(row["text"])[0]} for row in read_metadata(layout.metadata) if row["split"] == TRAIN
    ]
    limit = layout.config.encode.max_images
    if limit is None or limit >= len(rows):
        return rows
    chosen = generator(layout.config.seed, "max_images").permutation(len(rows))[:limit]
    return [rows[i] for i in sorted(chosen)]


def _latents(layout: Layout, file_names: list[str], shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Latents of so many images at a time, (n, C, H, W), float32."""
    read = TrainingImages(layout)

    def pixels(name: str) -> np.ndarray:
        image = read(name)
        if image.shape != shape:
            raise UserError(
                f"{layout.data}/{name} has shape {image.shape}, the dataset has {shape}: "
                f"delete {layout.data_manifest} and run again to rebuild the dataset."
            )
        return image

    with progress(total=len(file_names), unit="image", what="encoding images") as bar:
        for start in range(0, len(file_names), AT_ONCE):
            names = file_names[start : start + AT_ONCE]
            yield to_latents(np.stack([pixels(name) for name in names]), layout.config.encode.factor)
            bar.update(len(names))
