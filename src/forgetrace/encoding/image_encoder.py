"""What an image encoder is: images in, one feature vector each out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

BATCH = 16


@dataclass(frozen=True)
class ImageEncoder:
    """A frozen network with the preparation its images need.

    Attributes:
        prepare: images (n, height, width, 3), uint8 -> network input (n, 3, side, side), float32.
        network: network input on ``device`` -> features (n, d).
        files: SHA-256 of every file that shapes the features, by file name.
        device: where the network is.
    """

    prepare: Callable[[np.ndarray], np.ndarray]
    network: Callable[["torch.Tensor"], "torch.Tensor"]
    files: dict[str, str]
    device: "torch.device | str" = "cpu"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(n, height, width, 3), uint8 -> (n, d), float64."""
        import torch

        features = []
        with torch.no_grad():
            for start in range(0, len(images), BATCH):
                pixels = torch.from_numpy(self.prepare(images[start : start + BATCH]))
                features.append(self.network(pixels.to(self.device)).cpu().double().numpy())
        return np.concatenate(features)
