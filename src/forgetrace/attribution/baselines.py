"""Baselines that look at no weights of the attributed model: pixels, captions, chance.

Pixel and text similarity are the rows of AbU's Table 1 (arXiv 2406.09408); ``pixel-l2`` stands beside
the cosine because a cosine of pixels is dominated by the background's brightness.
"""

import numpy as np

from forgetrace.artifacts import read_array, read_arrays, read_image, read_table
from forgetrace.attribution.contract import Attributor
from forgetrace.datasets.images import TrainingImages
from forgetrace.diffusion.regions import region_of
from forgetrace.randomness import generator

AT_ONCE = 2**26  # float64 numbers in memory, half a gigabyte: all digits
CAPTIONS = 2**8  # captions in memory


class Pixel(Attributor):
    """Cosine similarity of pixels in [-1, 1]; the training images are read once for all queries of a job."""

    summary = "cosine similarity of the pixels"
    opens_images = True

    def inputs(self, query: str) -> list[str]:
        """The index (for file names), the dataset and the query's image."""
        own = [self.layout.query(query)["tensors"]] if self.layout.config.region(query) else []
        return [self.layout.index, self.layout.data_manifest, self.layout.query(query)["image"], *own]

    def shaped_by(self) -> dict:
        """Whether queries are compared mirrored too."""
        return {"flips": True} if self.layout.config.encode.flips else {}

    def scores(self, query: str) -> np.ndarray:
        """:meth:`scores_of` a single query."""
        return self.scores_of([query])[query]

    def scores_of(self, queries: list[str]) -> dict[str, np.ndarray]:
        """Similarity of every training image to each query; where D is flipped, to the nearer of its orientations.

        Of a region, only its pixels are compared.
        """
        views = [self._views(query) for query in queries]
        names, read = read_table(self.layout.index)["file_name"].tolist(), TrainingImages(self.layout)
        block = max(1, AT_ONCE // read_image(self.layout.query(queries[0])["image"]).size)
        scores = np.empty((len(queries), len(names)))
        for start in range(0, len(names), block):
            images = np.stack([read(name) for name in names[start : start + block]])
            flat = {}  # by mask, which most queries share
            for row, own in zip(scores, views, strict=True):
                for mask, _ in own:
                    if mask.tobytes() not in flat:
                        flat[mask.tobytes()] = self._flat(images[:, mask])
                near = [self.similarity(flat[mask.tobytes()], view) for mask, view in own]
                row[start : start + block] = np.max(near, axis=0)
        return dict(zip(queries, scores, strict=True))

    def _views(self, query: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """The query's orientations: which pixels are compared, (H, W), bool, and their numbers."""
        pixels, inside = read_image(self.layout.query(query)["image"]), region_of(self.layout, query)
        inside = np.ones(pixels.shape[:2], dtype=bool) if inside is None else inside
        sides = [1, -1] if self.layout.config.encode.flips else [1]
        masks = [inside[:, ::side] for side in sides]
        own = [self._flat(pixels[None, :, ::side][:, mask])[0] for side, mask in zip(sides, masks, strict=True)]
        return list(zip(masks, own, strict=True))

    @staticmethod
    def similarity(images: np.ndarray, query: np.ndarray) -> np.ndarray:
        """(N, D) and (D,) -> (N,)."""
        return cosine(images, query)

    @staticmethod
    def _flat(pixels: np.ndarray) -> np.ndarray:
        """(n, pixels, 3), uint8 -> (n, 3 · pixels) in [-1, 1]."""
        return pixels.reshape(len(pixels), -1).astype(float) / 127.5 - 1


class PixelL2(Pixel):
    """Negative squared distance of pixels in [-1, 1]."""

    summary = "negative squared distance of the pixels"

    @staticmethod
    def similarity(images: np.ndarray, query: np.ndarray) -> np.ndarray:
        """(N, D) and (D,) -> (N,)."""
        return -np.square(images - query).sum(axis=1)


class Text(Attributor):
    """Cosine similarity of the caption's and the prompt's mean token state."""

    summary = "cosine similarity of caption and prompt"

    def inputs(self, query: str) -> list[str]:
        """Encoded captions and the query's prompt."""
        return [self.layout.index, self.layout.captions, self.layout.query(query)["tensors"]]

    def scores(self, query: str) -> np.ndarray:
        """Similarity of every training caption to the prompt; of several captions of an image the most similar's."""
        index = read_table(self.layout.index)
        prompt = read_arrays(self.layout.query(query)["tensors"])["prompt"]
        states = read_array(self.layout.captions, mmap=True)
        parts = (states[start : start + CAPTIONS] for start in range(0, len(states), CAPTIONS))
        pooled = np.concatenate([pool_tokens(part) for part in parts])
        similarity = cosine(pooled, pool_tokens(prompt[None])[0])
        if "caption_rows" in index:
            return np.array([similarity[rows].max() for rows in index["caption_rows"]])
        return similarity[index["caption_row"].to_numpy()]


class Random(Attributor):
    """A seeded permutation per query."""

    summary = "a seeded random order per query"

    def inputs(self, query: str) -> list[str]:
        """Only the list of training images."""
        return [self.layout.index]

    def scores(self, query: str) -> np.ndarray:
        """Independent uniform scores."""
        count = len(read_table(self.layout.index))
        return generator(self.layout.config.seed, "score-random", query).random(count)


def cosine(rows: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Cosine of each row with a vector, 0 where either is zero; (N, D) and (D,) -> (N,)."""
    norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(vector)
    return np.divide(rows @ vector, norms, out=np.zeros(len(rows)), where=norms > 0)


def pool_tokens(states: np.ndarray) -> np.ndarray:
    """Mean of the token states that are not zero; (n, tokens, width) -> (n, width), float64.

    MiniLM's padding is zeros and left out, see :mod:`forgetrace.encoding.text`. CLIP's is not: its states come after
    the caption's end and have read all of it, so that they belong to a summary as much as the caption's own.
    """
    states = states.astype(float)
    real = np.abs(states).sum(axis=2) > 0
    return states.sum(axis=1) / np.maximum(real.sum(axis=1, keepdims=True), 1)
