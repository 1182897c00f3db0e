"""Images to latents and back by pixel-unshuffle: exact, invertible, nothing to train."""

import numpy as np

from forgetrace.artifacts import UserError


def to_latents(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Fold each factor×factor patch into channels.

    Args:
        pixels: shape (n, height, width, 3), uint8.
        factor: patch size.

    Returns:
        Shape (n, 3·factor², height/factor, width/factor), float32 in [-1, 1].

    Raises:
        UserError: height or width is not a multiple of ``factor``.
    """
    n, height, width, channels = pixels.shape
    if height % factor or width % factor:
        raise UserError(f"encode.factor: images of {height}x{width} do not divide into {factor}x{factor} patches.")
    patches = pixels.reshape(n, height // factor, factor, width // factor, factor, channels)
    folded = patches.transpose(0, 5, 2, 4, 1, 3).reshape(n, -1, height // factor, width // factor)
    return folded.astype(np.float32) / 127.5 - 1


def to_pixels(latents: np.ndarray, factor: int) -> np.ndarray:
    """Inverse of :func:`to_latents`; values outside [-1, 1] are clipped."""
    n, channels, height, width = latents.shape
    colours = channels // factor**2
    unfolded = latents.reshape(n, colours, factor, factor, height, width).transpose(0, 4, 2, 5, 3, 1)
    pixels = unfolded.reshape(n, height * factor, width * factor, colours)
    return np.rint((np.clip(pixels, -1, 1) + 1) * 127.5).astype(np.uint8)
