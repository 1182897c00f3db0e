"""What turns images into the latents a model works on, and back."""

import functools
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from forgetrace.config import Encode
from forgetrace.encoding.latents import to_latents, to_pixels

if TYPE_CHECKING:
    import torch


class Codec(ABC):
    """Images to latents and back.

    Attributes:
        files: SHA-256 of every file that shapes the latents, by name.
    """

    files: dict[str, str]

    @abstractmethod
    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Images (n, height, width, 3), uint8 -> latents (n, C, H, W), float32.

        Raises:
            UserError: images of this size have no latents.
        """

    @abstractmethod
    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents (n, C, H, W), float32 -> images (n, height, width, 3), uint8."""


class PixelUnshuffle(Codec):
    """Every factor×factor patch folded into channels: exact, without weights."""

    def __init__(self, factor: int):
        """Args: factor, the patch size."""
        self.factor, self.files = factor, {}

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """See :func:`forgetrace.encoding.latents.to_latents`."""
        return to_latents(pixels, self.factor)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """See :func:`forgetrace.encoding.latents.to_pixels`."""
        return to_pixels(latents, self.factor)


@functools.lru_cache(maxsize=1)
def codec_of(settings: Encode, device: "torch.device | str" = "cpu") -> Codec:
    """The codec of a config, loaded once.

    Args:
        settings: the section encode.
        device: where a codec with weights runs.

    Raises:
        UserError: its weights are not there.
    """
    if settings.image_encoder == "pixel-unshuffle":
        return PixelUnshuffle(settings.factor)
    from forgetrace.encoding.autoencoder import Autoencoder

    return Autoencoder(settings.pipeline, device)


def clipped(settings: Encode, latents: np.ndarray) -> np.ndarray:
    """Sampled latents (n, C, H, W) brought to where latents of images can be; pixel-unshuffle's are in [-1, 1]."""
    return np.clip(latents, -1, 1) if settings.image_encoder == "pixel-unshuffle" else latents
