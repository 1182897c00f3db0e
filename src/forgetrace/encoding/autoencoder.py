"""Stable Diffusion's autoencoder (``AutoencoderKL``) between images and the latents of a latent diffusion model.

A latent is the mean of the encoder's normal distribution, not a draw from it, so that encoding is repeatable, less
``shift_factor`` and times ``scaling_factor`` where the autoencoder's config has them (0.18215 for Stable Diffusion 1
and 2), which bring latents to about unit variance.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from forgetrace.artifacts import UserError
from forgetrace.encoding.codec import Codec
from forgetrace.encoding.pipeline import hashes, load, parts

if TYPE_CHECKING:
    import torch

PART = "vae"
PIXELS = 2**20  # of the images that are encoded or decoded at once: 64 of 128 pixels' side, 4 of 512


class Autoencoder(Codec):
    """An ``AutoencoderKL``, frozen, in fp32."""

    def __init__(self, pipeline: str, device: "torch.device | str" = "cpu"):
        """Args: pipeline, a folder or hub name; device.

        Raises:
            UserError: the pipeline has no autoencoder that can be read.
        """
        from diffusers import AutoencoderKL

        folder = parts(pipeline, [PART])
        self.files = hashes(folder, [PART])
        self.model = load(
            lambda: AutoencoderKL.from_pretrained(folder / PART, local_files_only=True, output_loading_info=True),
            folder / PART,
        ).to(device)
        config = self.model.config
        self.scale, self.shift = config.scaling_factor, getattr(config, "shift_factor", None) or 0.0
        self.patch = 2 ** (len(config.block_out_channels) - 1)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Images (n, height, width, 3), uint8 -> latents (n, C, height / 8, width / 8), float32 (8 for SD's)."""
        height, width = pixels.shape[1:3]
        if height % self.patch or width % self.patch:
            raise UserError(
                f"encode.pipeline: its autoencoder takes images whose sides are multiples of {self.patch}, not "
                f"{height}x{width}: change prepare.size."
            )
        return self._batches(pixels, height * width, self._encode)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents (n, C, H, W), float32 -> images (n, 8 H, 8 W, 3), uint8."""
        return self._batches(latents, latents[0, 0].size * self.patch**2, self._decode)

    def _encode(self, pixels: "torch.Tensor") -> "torch.Tensor":
        images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        return (self.model.encode(images).latent_dist.mode() - self.shift) * self.scale

    def _decode(self, latents: "torch.Tensor") -> "torch.Tensor":
        images = self.model.decode(latents / self.scale + self.shift).sample
        return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)

    def _batches(self, array: np.ndarray, pixels: int, step: Callable) -> np.ndarray:
        import torch

        count = max(1, PIXELS // pixels)
        batches = (array[start : start + count] for start in range(0, len(array), count))
        with torch.inference_mode():
            done = [step(torch.from_numpy(np.ascontiguousarray(batch)).to(self.model.device)) for batch in batches]
            return torch.cat(done).cpu().numpy()
