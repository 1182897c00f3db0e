"""The ``encode`` stage: the training images as memory-mappable latents, the captions as token states."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from forgetrace.artifacts import (
    UserError,
    fingerprint,
    provenance,
    read_array,
    read_image,
    read_json,
    sha256_of,
    write_array,
    write_json,
    write_table,
)
from forgetrace.datasets.prepare import TRAIN, read_metadata
from forgetrace.encoding.captions import caption_states, text_source
from forgetrace.encoding.codec import codec_of
from forgetrace.layout import Layout
from forgetrace.randomness import generator

if TYPE_CHECKING:
    import torch

EMPTY = ""


def encode(layout: Layout, device: "torch.device | str" = "cpu") -> None:
    """Encode the training split into ``layout.latents``, ``captions``, ``index`` and the manifest.

    Args:
        layout: the experiment.
        device: where encoders of a pipeline run; the others stay on the CPU.

    Raises:
        UserError: an image is missing, truncated or of another size than the rest, or an encoder's weights are.
    """
    settings = layout.config.encode
    rows = _training_rows(layout)
    shape = tuple(read_json(layout.data_manifest)["image_shape"])
    pixels = np.stack([_image(f"{layout.data}/{row['file_name']}", shape) for row in rows])
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
    codec = codec_of(settings, device)
    write_array(layout.latents, codec.encode(pixels))
    write_array(layout.captions, caption_states(settings, captions, device=device))
    made_by = provenance(layout.config.digest_of("encode"), {"metadata": layout.metadata, "data": layout.data_manifest})
    write_table(layout.index, index, made_by)
    # Equal on every machine, unlike the bits a text encoder computes on another CPU.
    source = [made_by["inputs"], made_by["config"], text_source(settings), layout.config.seed]
    source += [codec.files] if codec.files else []
    write_json(
        layout.encode_manifest,
        {
            "images": len(rows),
            "image_shape": list(pixels.shape[1:]),
            "latent_shape": list(read_array(layout.latents, mmap=True).shape[1:]),
            "caption_shape": list(read_array(layout.captions, mmap=True).shape[1:]),
            "source": fingerprint(source),
            "sha256": {role: sha256_of(path) for role, path in _files(layout).items()},
            "made_by": made_by,
        },
    )


def _files(layout: Layout) -> dict[str, str]:
    return {"latents": layout.latents, "captions": layout.captions, "index": layout.index}


def _training_rows(layout: Layout) -> list[dict]:
    rows = [row for row in read_metadata(layout.metadata) if row["split"] == TRAIN]
    limit = layout.config.encode.max_images
    if limit is None or limit >= len(rows):
        return rows
    chosen = generator(layout.config.seed, "max_images").permutation(len(rows))[:limit]
    return [rows[i] for i in sorted(chosen)]


def _image(path: str, shape: tuple[int, ...]) -> np.ndarray:
    try:
        pixels = read_image(path)
        problem = None if pixels.shape == shape else f"has shape {pixels.shape}, the dataset has {shape}"
    except UserError:
        problem = "is missing or damaged"
    if problem:
        folder = Path(path).parents[1]
        raise UserError(f"{path} {problem}: delete {folder}/manifest.json and run again to rebuild the dataset.")
    return pixels
