"""How much of a query a retrained model has forgotten.

Every metric is one number per query and model. ``delta_loss`` compares losses, the others compare
the query image with what the model regenerates from the same initial noise and prompt. Pixels count
in [0, 1].
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import uniform_filter

from forgetrace.diffusion.regions import bounding_box

# Maps images (n, height, width, 3), uint8, to features (n, d), float64.
Encoder = Callable[[np.ndarray], np.ndarray]

SSIM_WINDOW = 7
SSIM_STABILISERS = (0.01**2, 0.03**2)  # (K1·L)² and (K2·L)² for pixels of range L = 1


@dataclass(frozen=True)
class Metric:
    """What a metric means.

    Attributes:
        label: name on an axis.
        forgotten: +1 where larger values mean that more was forgotten, -1 where smaller ones do.
    """

    label: str
    forgotten: int


METRICS = {
    "delta_loss": Metric("ΔL: rise of the query's loss", +1),
    "delta_mse": Metric("ΔG: squared pixel difference", +1),
    "similarity": Metric("Similarity of image features", -1),
    "ssim": Metric("Structural similarity (SSIM)", -1),
}
# Of queries that are a region of an image; the contrast is inside minus outside.
REGION_METRICS = {
    "delta_loss_inside": Metric("ΔL inside the region", +1),
    "delta_loss_outside": Metric("ΔL outside the region", +1),
    "delta_loss_contrast": Metric("ΔL inside − outside", +1),
    "delta_mse_inside": Metric("ΔG inside: squared difference", +1),
    "delta_mse_outside": Metric("ΔG outside: squared difference", +1),
    "delta_mse_contrast": Metric("ΔG inside − outside", +1),
    "similarity_inside": Metric("Similarity of the region's features", -1),
}


def image_metrics(original: np.ndarray, regenerated: np.ndarray, encode: Encoder) -> dict[str, np.ndarray]:
    """Compare regenerated images with the query image.

    Args:
        original: the query image, shape (height, width, 3), uint8.
        regenerated: images of the models, shape (n, height, width, 3), uint8.
        encode: image encoder behind ``similarity``.

    Returns:
        ``delta_mse``, ``similarity`` and, where the image is large enough for its window, ``ssim``;
        arrays of shape (n,), float64.
    """
    features = encode(np.concatenate([original[None], regenerated]))
    values = {
        "delta_mse": mean_squared_error(original, regenerated),
        "similarity": cosine(features[0], features[1:]),
    }
    if min(original.shape[:2]) >= SSIM_WINDOW:
        values["ssim"] = np.array([structural_similarity(original, image) for image in regenerated])
    return values


def region_metrics(
    original: np.ndarray, regenerated: np.ndarray, inside: np.ndarray, encode: Encoder
) -> dict[str, np.ndarray]:
    """Compare regenerated images with the query image inside and outside a region.

    Args:
        original: the query image, shape (height, width, 3), uint8.
        regenerated: images of the models, shape (n, height, width, 3), uint8.
        inside: the region's pixels, shape (height, width), bool.
        encode: image encoder behind ``similarity_inside``, which sees the smallest box around the region.

    Returns:
        ``delta_mse_inside``, ``similarity_inside`` and, where there is an outside, ``delta_mse_outside`` and
        ``delta_mse_contrast``; arrays of shape (n,), float64.
    """
    squares = np.square((regenerated.astype(np.float64) - original) / 255).mean(axis=3)
    x0, y0, x1, y1 = bounding_box(inside)
    crops = np.concatenate([original[None], regenerated])[:, y0:y1, x0:x1]
    features = encode(np.ascontiguousarray(crops))
    values = {
        "delta_mse_inside": squares[:, inside].mean(axis=1),
        "similarity_inside": cosine(features[0], features[1:]),
    }
    if not inside.all():
        values["delta_mse_outside"] = squares[:, ~inside].mean(axis=1)
        values["delta_mse_contrast"] = values["delta_mse_inside"] - values["delta_mse_outside"]
    return values


def mean_squared_error(original: np.ndarray, regenerated: np.ndarray) -> np.ndarray:
    """Mean over pixels and channels of the squared difference, pixels in [0, 1].

    Args:
        original: shape (height, width, 3), uint8.
        regenerated: shape (n, height, width, 3), uint8.

    Returns:
        Shape (n,), float64, in [0, 1].
    """
    difference = (regenerated.astype(np.float64) - original.astype(np.float64)) / 255
    return np.square(difference).mean(axis=(1, 2, 3))


def cosine(reference: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Cosine of the angle between one feature vector and several others.

    Args:
        reference: shape (d,).
        features: shape (n, d).

    Returns:
        Shape (n,), float64, in [-1, 1].
    """
    norms = np.linalg.norm(features, axis=1) * np.linalg.norm(reference)
    return features @ reference / norms


def structural_similarity(original: np.ndarray, regenerated: np.ndarray) -> float:
    """Structural similarity of two images (Wang et al. 2004, eq. 13).

    Local means, variances and covariance are those of a uniform 7x7 window, which leaves 10x10
    windows in a 16x16 image where the Gaussian one of 11x11 would leave 6x6. Only windows that lie
    inside the image count; channels are averaged.

    Args:
        original: shape (height, width, 3), uint8, at least 7x7.
        regenerated: the same shape.

    Returns:
        In [-1, 1]; 1 for identical images.
    """
    x, y = original / 255, regenerated / 255
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    variance_x = _window_mean(x * x) - mean_x**2
    variance_y = _window_mean(y * y) - mean_y**2
    covariance = _window_mean(x * y) - mean_x * mean_y
    c1, c2 = SSIM_STABILISERS
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return float((luminance * structure).mean())


def _window_mean(image: np.ndarray) -> np.ndarray:
    """Mean of every 7x7 window inside an image (height, width, channels)."""
    inside = slice(SSIM_WINDOW // 2, -(SSIM_WINDOW // 2))
    return uniform_filter(image, size=(SSIM_WINDOW, SSIM_WINDOW, 1))[inside, inside]
