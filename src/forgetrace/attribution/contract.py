"""What an attribution method is: it names its inputs and turns them into one score per image."""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from forgetrace.config import Config, Method
from forgetrace.layout import Layout


class Attributor(ABC):
    """One method's scores for the training images of an experiment.

    Subclasses import no torch at module level: Snakemake asks every method for its inputs while
    it builds the DAG.

    Attributes:
        summary: one line for the list of methods.
        reads: options of the entry under ``score.methods`` that the method uses; others are refused.
        layout: the experiment's files.
        method: the method's name in the config.
        options: its entry under ``score.methods``.
    """

    summary: ClassVar[str]
    reads: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, layout: Layout, method: str):
        self.layout = layout
        self.method = method
        self.options: Method = layout.config.score.methods[method]

    @classmethod
    def check(cls, config: Config, method: str) -> None:
        """Raise ``UserError`` where the config lacks what the method needs."""

    @abstractmethod
    def inputs(self, query: str) -> list[str]:
        """Files the scores of ``query`` are computed from."""

    @abstractmethod
    def scores(self, query: str) -> np.ndarray:
        """Influence scores of the N training images in index order, float64, larger = more."""
