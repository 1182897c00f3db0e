"""What an attribution method is: it names its inputs and turns them into one score per image.

A method that looks at one query at a time is an :class:`Attributor`. One that runs the model over the training
images had better do so once for many queries: it is a :class:`Together`. What a method needs of every training
image whatever the query, it leaves to the ``fit`` stage as :class:`Features`.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from forgetrace.artifacts import UserError, fingerprint, provenance, read_array, read_json, stage_versions
from forgetrace.config import Config, Method
from forgetrace.layout import Layout


class Features(ABC):
    """Something computed once for every training image and kept, for one method or several.

    A record beside it says what it was computed from, so that a query never meets features of another model, of other
    data or of other settings.

    Attributes:
        layout: the experiment's files.
        name: says every setting, so that equal ones share a file.
    """

    layout: Layout
    name: str

    @abstractmethod
    def inputs(self) -> list[str]:
        """Files they are computed from."""

    @abstractmethod
    def settings(self) -> dict:
        """Everything that shapes them beside :meth:`inputs`, as plain data."""

    @abstractmethod
    def fit(self) -> None:
        """Write ``layout.features(name)``, then its record by :meth:`made_by`."""

    def made_by(self) -> dict:
        """What the features hang on, for their record."""
        inputs = {path.removeprefix(f"{self.layout.root}/"): path for path in self.inputs()}
        return provenance(self.settings() | {"versions": stage_versions("fit")}, inputs)

    def kept(self) -> np.ndarray:
        """What :meth:`fit` wrote; (N, width), float32, memory-mapped.

        Raises:
            UserError: it is missing, damaged or of other settings, files or weights than the queries would meet.
        """
        path, record = self.layout.features(self.name), self.layout.features_record(self.name)
        features = read_array(path, mmap=True)
        found, wanted = read_json(record), self.made_by()
        if any(found.get(key) != wanted[key] for key in ("config", "inputs")):
            raise UserError(
                f"{path} was computed from other data, weights or settings: delete it and run the fit stage again "
                f"(forgetrace fit --features {self.name})."
            )
        return features


class Attributor(ABC):
    """One method's scores for the training images of an experiment.

    Subclasses import no torch at module level: Snakemake asks every method for its inputs while
    it builds the DAG.

    Attributes:
        summary: one line for the list of methods.
        reads: options of the entry under ``score.methods`` that the method uses; others are refused.
        opens_images: whether its scores need the files of all training images, which takes hours where there are many.
        layout: the experiment's files.
        method: the method's name in the config.
        options: its entry under ``score.methods``.
        device: where to compute, as :func:`forgetrace.diffusion.device.pick_device` takes it.
    """

    summary: ClassVar[str]
    reads: ClassVar[frozenset[str]] = frozenset()
    opens_images: ClassVar[bool] = False

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

    def shaped_by(self) -> dict:
        """Settings outside the method's own entry that its scores hang on, as plain data; by default none."""
        return {}

    @abstractmethod
    def inputs(self, query: str) -> list[str]:
        """Files the scores of ``query`` are computed from."""

    @abstractmethod
    def scores(self, query: str) -> np.ndarray:
        """Influence scores of the N training images in index order, float64, larger = more."""

    def scores_of(self, queries: list[str]) -> dict[str, np.ndarray]:
        """:meth:`scores` of several queries, of which those of one do not depend on the others."""
        return {query: self.scores(query) for query in queries}


class Together(Attributor):
    """A method for which many queries cost little more than one: a single job scores all that are missing."""

    @abstractmethod
    def scores_of(self, queries: list[str]) -> dict[str, np.ndarray]:
        """:meth:`scores` of several queries; those of one do not depend on the others."""

    def scores(self, query: str) -> np.ndarray:
        """Influence scores of the N training images in index order, float64, larger = more."""
        return self.scores_of([query])[query]

    def key(self, queries: list[str]) -> str:
        """Fingerprint of all that a pass for these queries depends on: methods must not share what they found."""
        made_by = provenance({}, {path: path for query in queries for path in self.inputs(query)})
        settings = [self.options.model_dump(), self.shaped_by(), self.layout.config.seed, queries]
        return fingerprint([type(self).__qualname__, self.method, made_by, settings, stage_versions("fit", "score")])
