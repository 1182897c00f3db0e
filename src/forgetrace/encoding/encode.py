"""The ``encode`` stage: the training images as memory-mappable latents, the captions as token states."""

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from forgetrace.artifacts import (
    UserError,
    fingerprint,
    provenance,
    read_array,
    read_json,
    sha256_of,
    write_array_in_parts,
    write_json,
    write_table,
)
from forgetrace.datasets.contract import captions_of
from forgetrace.datasets.images import TrainingImages
from forgetrace.datasets.prepare import TRAIN, read_metadata
from forgetrace.encoding.captions import caption_parts, text_source
from forgetrace.encoding.codec import Codec, codec_of
from forgetrace.encoding.given import EMPTY, distinct, encoded_files, take_encoded
from forgetrace.encoding.text import longest
from forgetrace.layout import Layout
from forgetrace.progress import progress
from forgetrace.randomness import generator

if TYPE_CHECKING:
    import torch

AT_ONCE = 256  # images in memory


def encode(layout: Layout, device: "torch.device | str" = "cpu") -> None:
    """Encode the training split into ``layout.latents``, ``captions``, ``index`` and the manifest.

    Args:
        layout: the experiment.
        device: where encoders of a pipeline run; the others stay on the CPU.

    Raises:
        UserError: an image is missing, truncated or of another size than the rest, or an encoder's weights are; or
            what ``encode.given`` names does not fit.
    """
    settings = layout.config.encode
    rows = _training_rows(layout)
    shape = read_json(layout.data_manifest)["image_shape"]
    texts = [captions_of(row["text"]) for row in rows]
    captions = [*(distinct(texts) if settings.given else sorted(set(chain(*texts)))), EMPTY]
    row_of = {caption: i for i, caption in enumerate(captions)}
    index = pd.DataFrame(
        {
            "image_id": [row["id"] for row in rows],
            "file_name": [row["file_name"] for row in rows],
            "caption": [own[0] for own in texts],
            "caption_row": [row_of[own[0]] for own in texts],
        }
    )
    if any(len(own) > 1 for own in texts):
        index["caption_rows"] = [[row_of[caption] for caption in own] for own in texts]
    inputs = {"metadata": layout.metadata, "data": layout.data_manifest}
    if settings.given:
        take_encoded(layout, [row["id"] for row in rows], texts, device)
        # Which holds the hashes of the rest.
        encoders = [text_source(settings) if settings.pipeline else None]  # of the empty caption's state
        inputs |= {"given": encoded_files(settings.given)["manifest"]}
    else:
        encoders = _run_encoders(layout, [row["file_name"] for row in rows], captions, tuple(shape), device)
    made_by = provenance(layout.config.digest_of("encode"), inputs)
    write_table(layout.index, index, made_by)
    # Equal on every machine, unlike the bits a text encoder computes on another CPU.
    source = [made_by["inputs"], made_by["config"], encoders[0], layout.config.seed, *encoders[1:]]
    write_json(
        layout.encode_manifest,
        {
            "images": len(rows),
            "image_shape": shape,
            "latent_shape": list(read_array(layout.latents, mmap=True).shape[1:]),
            "caption_shape": list(read_array(layout.captions, mmap=True).shape[1:]),
            "source": fingerprint(source),
            "sha256": {role: sha256_of(path) for role, path in _files(layout).items()},
            "made_by": made_by,
        },
    )


def _run_encoders(
    layout: Layout, names: list[str], captions: list[str], shape: tuple[int, ...], device: "torch.device | str"
) -> list:
    """Write latents and token states; what tells the encoders from others, that of the text first."""
    settings = layout.config.encode
    codec = codec_of(settings, device)
    orientations = [False, True] if settings.flips else [False]
    parts = chain(*(_latents(layout, codec, names, shape, mirrored) for mirrored in orientations))
    _write(layout.latents, len(orientations) * len(names), parts)
    states = caption_parts(settings, captions, device, _tokens(layout))
    _write(layout.captions, len(captions), states, settings.caption_dtype)
    return [text_source(settings), *([codec.files] if codec.files else [])]


def _files(layout: Layout) -> dict[str, str]:
    return {"latents": layout.latents, "captions": layout.captions, "index": layout.index}


def _tokens(layout: Layout) -> int | None:
    """Tokens of the longest caption of one's own data, held-out ones among them: queries are generated from those."""
    if not layout.config.prepare.path or layout.config.encode.text_encoder != "minilm":
        return None
    return longest([caption for row in read_metadata(layout.metadata) for caption in captions_of(row["text"])])


def _write(path: str, count: int, parts: Iterator[np.ndarray], dtype: str = "float32") -> None:
    """Write ``count`` rows that come in parts."""
    first = next(parts)
    write_array_in_parts(path, (count, *first.shape[1:]), chain([first], parts), dtype)


def _training_rows(layout: Layout) -> list[dict]:
    rows = [row for row in read_metadata(layout.metadata) if row["split"] == TRAIN]
    limit = layout.config.encode.max_images
    if limit is None or limit >= len(rows):
        return rows
    chosen = generator(layout.config.seed, "max_images").permutation(len(rows))[:limit]
    return [rows[i] for i in sorted(chosen)]


def _latents(
    layout: Layout, codec: Codec, file_names: list[str], shape: tuple[int, ...], mirrored: bool
) -> Iterator[np.ndarray]:
    """Latents of so many images at a time, (n, C, H, W), float32."""
    read, what = TrainingImages(layout), "encoding mirror images" if mirrored else "encoding images"

    def pixels(name: str) -> np.ndarray:
        image = read(name)
        if image.shape != shape:
            raise UserError(
                f"{layout.data}/{name} has shape {image.shape}, the dataset has {shape}: "
                f"delete {layout.data_manifest} and run again to rebuild the dataset."
            )
        return np.ascontiguousarray(image[:, ::-1]) if mirrored else image

    with progress(total=len(file_names), unit="image", what=what) as bar:
        for start in range(0, len(file_names), AT_ONCE):
            names = file_names[start : start + AT_ONCE]
            yield codec.encode(np.stack([pixels(name) for name in names]))
            bar.update(len(names))
