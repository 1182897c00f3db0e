"""What an attribution method is: it names its inputs and turns them into one score per image.

A method that looks at one query at a time is an :class:`Attributor`. One that runs the model over the training
images had better do so once for many queries: it is a :class:`Together`. What a method needs of every training
image whatever the query, it leaves to the ``fit`` stage as :class:`Features`.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from forgetrace.config import Config, Method
from forgetrace.layout import Layout


class Features(ABC):
    """Something computed once for every training image and kept, for one method or several.

    Attributes:
        name: says every setting, so that equal ones share a file.
    """

    name: str

    @abstractmethod
    def inputs(self) -> list[str]:
        """Files they are computed from."""

    @abstractmethod
    def fit(self) -> None:
        """Write ``layout.features(name)``."""


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
        device: where to compute, as :func:`forgetrace.diffusion.device.pick_device` takes it.
    """

    summary: ClassVar[str]
    reads: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, layout: Layout, method: str, device: str = "auto"):
        self.layout = layout
        self.method = method
        self.options: Method = layout.config.score.methods[method]
        self.device = device

    @classmethod
    def check(cls, config: Config, method: str) -> None:
        """Raise ``UserError`` where the config lacks what the method needs."""

    def features(self) -> list[Features]:
        """What the ``fit`` stage must have computed of the training images; by default nothing."""
        return []

    @abstractmethod
    def inputs(self, query: str) -> list[str]:
        """Files the scores of ``query`` are computed from."""

    @abstractmethod
    def scores(self, query: str) -> np.ndarray:
        """Influence scores of the N training images in index order, float64, larger = more."""


class Together(Attributor):
    """A method for which many queries cost little more than one: a single job scores all that are missing."""

    @abstractmethod
    def scores_of(self, queries: list[str]) -> dict[str, np.ndarray]:
        """:meth:`scores` of several queries; those of one do not depend on the others."""

    def scores(self, query: str) -> np.ndarray:
        """Influence scores of the N training images in index order, float64, larger = more."""
        return self.scores_of([query])[query]
