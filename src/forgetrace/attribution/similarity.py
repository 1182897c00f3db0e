"""Similarity of features: what is kept of every training image against the same of the query."""

from abc import abstractmethod

import numpy as np

from forgetrace.artifacts import write_array, write_json
from forgetrace.attribution.contract import Features, Together
from forgetrace.layout import Layout


class Comparable(Features):
    """Features that a query has as well as a training image."""

    def __init__(self, layout: Layout, name: str, device: str = "auto"):
        """Args: the experiment, what the features are called, where to compute."""
        self.layout, self.name, self.device = layout, name, device

    @abstractmethod
    def of_training_images(self) -> np.ndarray:
        """(N, width), float32, in index order."""

    @abstractmethod
    def query_input(self, query: str) -> str:
        """The file of the query that is looked at."""

    @abstractmethod
    def of_queries(self, queries: list[str]) -> np.ndarray:
        """(n, width), float32; the row of a query does not depend on the others."""

    def of_mirrored(self, queries: list[str]) -> np.ndarray | None:
        """:meth:`of_queries` for the mirror images of the queries; None where mirroring would change nothing."""
        return None

    def fit(self) -> None:
        """Write ``layout.features(name)``, then its record."""
        made_by = self.made_by()
        write_array(self.layout.features(self.name), self.of_training_images())
        write_json(self.layout.features_record(self.name), made_by)


class FeatureSimilarity(Together):
    """A method that compares the features of the query with those of the training images."""

    @abstractmethod
    def compared(self) -> Comparable:
        """The features."""

    @staticmethod
    @abstractmethod
    def similarity(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
        """(N, width) and (width,) -> (N,), float64."""

    def features(self) -> list[Features]:
        """One kind of them."""
        return [self.compared()]

    def inputs(self, query: str) -> list[str]:
        """The list of training images, their features and the file of the query."""
        compared = self.compared()
        own = [self.layout.query(query)["tensors"]] if self.layout.config.region(query) else []
        return [self.layout.index, self.layout.features(compared.name), compared.query_input(query), *own]

    def shaped_by(self) -> dict:
        """Whether queries are compared mirrored too."""
        return {"flips": True} if self.layout.config.encode.flips else {}

    def scores_of(self, queries: list[str]) -> dict[str, np.ndarray]:
        """Similarity of every training image to each query; where D is flipped, to the nearer of its orientations."""
        compared = self.compared()
        rows = compared.kept().astype(float)

        def similar(features: np.ndarray) -> dict[str, np.ndarray]:
            pairs = zip(queries, features.astype(float), strict=True)
            return {query: self.similarity(rows, row) for query, row in pairs}

        scores = similar(compared.of_queries(queries))
        mirrored = compared.of_mirrored(queries) if self.layout.config.encode.flips else None
        if mirrored is None:
            return scores
        return {query: np.maximum(scores[query], other) for query, other in similar(mirrored).items()}
