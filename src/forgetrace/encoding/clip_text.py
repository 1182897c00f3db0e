"""Captions to token states with the CLIP or OpenCLIP text encoder of a Stable Diffusion pipeline.

Every caption is padded to the tokenizer's length (77) and its states are kept at all positions, padding too: Stable
Diffusion and models conditioned like it attend to them without a mask. Longer captions are cut, as the pipelines do.
"""

import functools
import logging
from typing import TYPE_CHECKING

import numpy as np

from forgetrace.artifacts import UserError
from forgetrace.encoding.pipeline import TOKENIZER, hashes, load, parts

if TYPE_CHECKING:
    import torch

PARTS = ["text_encoder", TOKENIZER]


def clip_states(
    pipeline: str, captions: list[str], tokens: int | None = None, batch: int = 64, device: "torch.device | str" = "cpu"
) -> np.ndarray:
    """Last hidden states, after the final layer norm.

    Args:
        pipeline: a folder or hub name.
        captions: n captions.
        tokens: keep the states of so many first positions; by default all.
        batch: captions per forward pass.
        device: where the encoder runs.

    Returns:
        Shape (n, tokens, width), float32.

    Raises:
        UserError: the pipeline has no text encoder that can be read.
    """
    import torch

    tokenizer, model = _encoder(pipeline, device)
    length = tokenizer.model_max_length
    if cut := [
        caption for caption, ids in zip(captions, tokenizer(captions).input_ids, strict=True) if len(ids) > length
    ]:
        logging.getLogger(__name__).warning(
            "%d captions are longer than %d tokens and are cut, such as '%s'.", len(cut), length, cut[0]
        )
    states = []
    with torch.inference_mode():
        for start in range(0, len(captions), batch):
            ids = tokenizer(
                captions[start : start + batch],
                padding="max_length",
                max_length=length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            states.append(model(ids.to(model.device)).last_hidden_state[:, :tokens].cpu().numpy())
    return np.concatenate(states)


def text_files(pipeline: str) -> dict[str, str]:
    """SHA-256 of the files that shape the states, by path inside the pipeline."""
    return hashes(parts(pipeline, PARTS), PARTS)


@functools.lru_cache(maxsize=1)
def _encoder(pipeline: str, device: "torch.device | str") -> tuple:
    """Tokenizer and text encoder, loaded once."""
    return load_clip(pipeline, device)


def load_clip(pipeline: str, device: "torch.device | str" = "cpu") -> tuple:
    """A pipeline's tokenizer and text encoder, which nobody else holds.

    Raises:
        UserError: the pipeline has no text encoder that can be read.
    """
    from transformers import AutoTokenizer, CLIPTextModel

    folder = parts(pipeline, PARTS)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZER, local_files_only=True)
    except Exception as error:  # as in load
        raise UserError(
            f"{folder / TOKENIZER} cannot be read ({str(error).splitlines()[0]}): save or download the pipeline again."
        ) from error
    model = load(
        lambda: CLIPTextModel.from_pretrained(folder / PARTS[0], local_files_only=True, output_loading_info=True),
        folder / PARTS[0],
    )
    return tokenizer, model.to(device)
