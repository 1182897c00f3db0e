"""Captions to token states by the text encoder a config names."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from forgetrace.config import Encode
from forgetrace.encoding import text

if TYPE_CHECKING:
    import torch


AT_ONCE = 2**10  # captions in memory, of CLIP 0.3 GB; a multiple of what an encoder takes at once


def caption_states(
    settings: Encode, captions: list[str], tokens: int | None = None, device: "torch.device | str" = "cpu"
) -> np.ndarray:
    """Token states of n captions.

    Args:
        settings: the section encode.
        captions: n captions.
        tokens: positions to give each; by default as the config says.
        device: where a text encoder of a pipeline runs; MiniLM stays on the CPU.

    Returns:
        Shape (n, tokens, width), float32.

    Raises:
        UserError: the encoder is not there, or MiniLM is given a caption longer than ``tokens``.
    """
    tokens = tokens or settings.tokens
    if settings.text_encoder == "minilm":
        return text.token_states(captions, tokens)
    from forgetrace.encoding.clip_text import clip_states

    return clip_states(settings.pipeline, captions, tokens, device=device)


def caption_parts(
    settings: Encode, captions: list[str], device: "torch.device | str" = "cpu", tokens: int | None = None
) -> Iterator[np.ndarray]:
    """:func:`caption_states` of some captions after the other, so that many never are in memory together.

    ``tokens`` counts where the config names none; by default it is the longest caption's.
    """
    tokens = settings.tokens or tokens
    if len(captions) > AT_ONCE and settings.text_encoder == "minilm":
        tokens = tokens or text.longest(captions)
    for start in range(0, len(captions), AT_ONCE):
        yield caption_states(settings, captions[start : start + AT_ONCE], tokens, device)


def text_source(settings: Encode) -> object:
    """What tells one text encoder from another: the hashes of its files."""
    if settings.text_encoder == "minilm":
        return text.WEIGHTS_SHA256
    from forgetrace.encoding.clip_text import text_files

    return text_files(settings.pipeline)
