"""Similarity of image features: the encoders that AbU's Table 1 (arXiv 2406.09408) compares with, and any other.

They know nothing of the attributed model. Scores are cosines.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from forgetrace.artifacts import UserError, read_image, read_table, safe_name
from forgetrace.attribution.baselines import cosine
from forgetrace.attribution.similarity import Comparable, FeatureSimilarity
from forgetrace.config import Config
from forgetrace.datasets.images import TrainingImages
from forgetrace.diffusion.regions import bounding_box, region_of
from forgetrace.layout import Layout
from forgetrace.progress import progress

if TYPE_CHECKING:
    from forgetrace.encoding.image_encoder import ImageEncoder

AT_ONCE = 256  # images in memory


class EncodedImages(Comparable):
    """What an image encoder makes of the images."""

    def __init__(self, layout: Layout, encoder: str, device: str = "auto"):
        """Args: encoder, as :func:`forgetrace.encoding.images.load_encoder` takes it."""
        super().__init__(layout, features_name(encoder), device)
        self.encoder = encoder

    def inputs(self) -> list[str]:
        """The list of training images, and the dataset's manifest, which hashes all of them."""
        return [self.layout.index, self.layout.data_manifest]

    def settings(self) -> dict:
        """The encoder's name and the SHA-256 of its files."""
        return {"encoder": self.encoder, "files": self._encode.files}

    def of_training_images(self, first: int = 0) -> np.ndarray:
        """(N - first, d), float32: of all training images, or of those behind the first."""
        names = read_table(self.layout.index)["file_name"][first:]
        return self._features(names.tolist(), TrainingImages(self.layout))

    def query_input(self, query: str) -> str:
        """Its image."""
        return self.layout.query(query)["image"]

    def of_queries(self, queries: list[str]) -> np.ndarray:
        """(n, d), float32; of a region, those of the smallest box around it."""
        return self._features(queries, self._query_image)

    def of_mirrored(self, queries: list[str]) -> np.ndarray:
        """(n, d), float32."""
        return self._features(queries, lambda query: self._query_image(query)[:, ::-1])

    def _query_image(self, query: str) -> np.ndarray:
        """(height, width, 3), uint8."""
        image, inside = read_image(self.query_input(query)), region_of(self.layout, query)
        if inside is None:
            return image
        x0, y0, x1, y1 = bounding_box(inside)
        return image[y0:y1, x0:x1]

    def _features(self, names: list[str], read: Callable[[str], np.ndarray]) -> np.ndarray:
        parts = []
        with progress(total=len(names), unit="image", what=self.encoder) as bar:
            for start in range(0, len(names), AT_ONCE):
                images = [read(name) for name in names[start : start + AT_ONCE]]
                # One pass for all, unless crops of regions differ in size.
                same = len({image.shape for image in images}) == 1
                for block in [np.stack(images)] if same else [image[None] for image in images]:
                    parts.append(self._encode(block).astype(np.float32))
                bar.update(len(images))
        return np.concatenate(parts)

    @functools.cached_property
    def _encode(self) -> "ImageEncoder":
        from forgetrace.diffusion.device import pick_device
        from forgetrace.encoding.images import load_encoder

        return load_encoder(self.encoder, pick_device(self.device))


class ImageFeatures(FeatureSimilarity):
    """Cosine similarity of the features of an encoder that the config names."""

    summary = "cosine similarity of the features of the image encoder given as option encoder"
    reads = frozenset({"encoder"})
    encoder: ClassVar[str | None] = None

    similarity = staticmethod(cosine)

    @classmethod
    def check(cls, config: Config, method: str) -> None:
        """An encoder must be named where there is no default."""
        if not (config.score.methods[method].encoder or cls.encoder):
            raise UserError(
                f"score.methods.{method}: give 'encoder', an image encoder of transformers as owner/model or a folder."
            )

    def compared(self) -> EncodedImages:
        """Features of the images."""
        return EncodedImages(self.layout, self.options.encoder or self.encoder, self.device)


class EfficientNet(ImageFeatures):
    """The encoder that is always there; the evaluation's similarity column uses it too."""

    summary = "cosine similarity of EfficientNet-Lite0 features; needs no download"
    reads = frozenset()
    encoder = "efficientnet-lite0"


class Clip(ImageFeatures):
    """CLIP's projected image embedding."""

    encoder = "openai/clip-vit-base-patch32"
    summary = f"cosine similarity of CLIP image embeddings (by default {encoder})"


class Dino(ImageFeatures):
    """DINO's class token."""

    encoder = "facebook/dino-vits16"
    summary = f"cosine similarity of DINO features (by default {encoder})"


class DinoV2(ImageFeatures):
    """DINOv2's class token."""

    encoder = "facebook/dinov2-small"
    summary = f"cosine similarity of DINOv2 features (by default {encoder})"


def features_name(encoder: str) -> str:
    """A file name for an encoder's features: legible, and no two encoders share one."""
    return f"image-{safe_name(encoder)}"
