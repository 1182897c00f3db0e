"""Gradient methods that score by inner products ⟨∇L(z), v⟩ with a direction v of the query.

* TracIn (Pruthi et al. 2020, eq. 2, checkpoints): ``τ(z) = Σ_s η_s ⟨∇L(z; θ_s), ∇L(ẑ; θ_s)⟩`` over the snapshots
  of training, η_s the mean learning rate between snapshots s - 1 and s.
* ReTrac (Diffusion-ReTrac, arXiv 2401.09031): the same with every timestep's gradient scaled to length 1, since a
  few timesteps with large gradients otherwise decide the score. The paper takes each image at the one timestep it
  was trained at in that step; here it is averaged over all.
* Influence functions (Koh and Liang 2017): ``τ(z) = ⟨∇L(z), (F + λ)⁻¹ ∇L(ẑ)⟩ / N`` with the diagonal Fisher or
  EK-FAC (K-FAC influence, arXiv 2410.13850). It is the derivative of AbU's score by the step size α at α = 0.
* DataInf (arXiv 2310.00902, eq. 5): the same with the inverse of each weight tensor's damped Fisher replaced by the
  mean of the inverses of its terms, see :mod:`forgetrace.curvature.datainf`.

A score is positive where training on the image lowers the query's loss. L is the mean over (t, ε). One pass over D
serves all queries; what it finds is kept as it comes, so that a killed one goes on: 4 bytes per image, timestep and
query. In memory are the directions of as many queries as fit into 4 GiB.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from forgetrace.artifacts import UserError, fingerprint
from forgetrace.attribution.contract import Together
from forgetrace.config import Config

if TYPE_CHECKING:
    from forgetrace.attribution.gradients import Gradients

TIMESTEPS, NOISES = 10, 16
DAMPING = 0.1


class InnerProducts(Together):
    """What these methods share: queries become directions, then one pass over D for each set of weights."""

    reads = frozenset({"weights", "timesteps"})
    directed_by: frozenset[str] = frozenset()  # options that change nothing but the directions

    @abstractmethod
    def models(self) -> list[str]:
        """Weights at which gradients are taken."""

    @abstractmethod
    def directions(self, gradients: Gradients, queries: list[str]) -> dict:
        """The v of every query at the current weights, by weight name, (queries, *shape)."""

    def more_inputs(self) -> list[str]:
        """Further files the directions depend on."""
        return []

    def inputs(self, query: str) -> list[str]:
        """The weights, the encoded data and the query."""
        layout = self.layout
        own = [layout.architecture, layout.scheduler, *layout.encoded, layout.query(query)["tensors"]]
        return [*self.models(), *self.more_inputs(), *own]

    def scores_of(self, queries: list[str]) -> dict[str, np.ndarray]:
        """Scores of several queries in one pass for each set of weights; of as many at once as fit into memory."""
        return self.scores_of_settings([self], queries)[0]

    def scores_of_settings(self, sources: Sequence[InnerProducts], queries: list[str]) -> list[dict[str, np.ndarray]]:
        """As :meth:`scores_of` for several settings of this method, in the same passes.

        Args:
            sources: this method with settings that differ in :attr:`directed_by` alone.
            queries: their names.

        Returns:
            For each setting the scores by query.
        """
        from forgetrace.attribution.gradients import Gradients

        options = self.options
        gradients = Gradients(self.layout, options.weights or "all", options.timesteps or TIMESTEPS, self.device)
        count = max(1, gradients.at_once() // len(sources))
        scores, partials = [{} for _ in sources], []
        for start in range(0, len(queries), count):
            block = queries[start : start + count]
            total = self._of_block(gradients, sources, block, partials)
            for number, of_setting in enumerate(scores):
                of_setting |= {query: total[:, number * len(block) + i] for i, query in enumerate(block)}
        # Not before the last: a killed run goes through all of them.
        for partial in partials:
            partial.unlink()
        return scores

    def _of_block(
        self, gradients: Gradients, sources: Sequence[InnerProducts], queries: list[str], kept: list[Path]
    ) -> np.ndarray:
        """Scores (N, settings · queries), the queries of a setting next to each other.

        What a killed run goes on from is added to ``kept``.
        """
        models = self.models()
        key = fingerprint([source.key(queries) for source in sources]) if len(sources) > 1 else self.key(queries)
        folder, total = Path(self.layout.checkpoints("score")), 0.0
        partials = [folder / f"{key}-{number}.npy" for number in range(len(models))]
        kept += partials
        for number, (weights, partial) in enumerate(zip(models, partials, strict=True)):
            gradients.load(weights)
            what = f"{self.method} {number + 1} of {len(models)}"
            found = gradients.products(_joined(sources, gradients, queries), partial, what)
            total = total + self.weight_of(weights) * self.reduce(found)
        if not np.isfinite(total).all():
            raise UserError(
                f"score.methods.{self.method}: a gradient is NaN or infinite; raise the method's damping where it has "
                "one, or see whether the training went wrong."
            )
        return total

    def reduce(self, found: np.ndarray) -> np.ndarray:
        """Inner products and squared norms (N, T, queries + 1) of all draws -> scores (N, queries)."""
        products = found[:, :, :-1]
        if self.unit_length:
            products = products / np.maximum(np.sqrt(found[:, :, -1:]), np.finfo(np.float32).tiny)
        return products.mean(axis=1, dtype=float)

    @property
    def unit_length(self) -> bool:
        """Whether the gradient of a training image is scaled to length 1 at every timestep."""
        return self.options.unit_length

    def weight_of(self, weights: str) -> float:
        """What the inner products at these weights are multiplied by."""
        return 1.0


def _joined(sources: Sequence[InnerProducts], gradients: Gradients, queries: list[str]) -> dict:
    """The directions of all settings, those of a setting next to each other."""
    import torch

    found = [source.directions(gradients, queries) for source in sources]
    gradients.known.clear()
    if len(found) == 1:
        return found[0]
    return {name: torch.cat([vectors[name] for vectors in found]) for name in found[0]}


class TracIn(InnerProducts):
    """Sum over snapshots of learning rate, on the way there, times inner product."""

    summary = "inner products of gradients at the snapshots of training, times their learning rates (TracIn)"
    reads = InnerProducts.reads | {"noises"}

    @classmethod
    def check(cls, config: Config, method: str) -> None:
        """Refuse a θ0 whose training nobody watched."""
        if config.train.pretrained:
            raise UserError(
                f"score.methods.{method} needs snapshots of θ0's training, which train.pretrained does not have: "
                "remove the method."
            )
        if config.customize:
            raise UserError(
                f"score.methods.{method} needs snapshots of a training from the start, which customised models do not "
                "have: remove the method."
            )

    def shaped_by(self) -> dict:
        """How a snapshot is weighed."""
        return {"weights": "mean learning rate since the snapshot before"}

    def models(self) -> list[str]:
        """The snapshots of training."""
        return self.layout.snapshots

    def weight_of(self, weights: str) -> float:
        """The mean learning rate of the steps since the snapshot before, or since the start."""
        from forgetrace.diffusion.training import learning_rate

        recipe, number = self.layout.config.train, self.layout.snapshots.index(weights)
        first, last = [0, *recipe.snapshot_steps()][number : number + 2]
        return sum(learning_rate(recipe, step) for step in range(first, last)) / (last - first)

    def directions(self, gradients: Gradients, queries: list[str]) -> dict:
        """Mean over timesteps of the query's gradients, each of the mean loss over the noises."""
        return gradients.of_queries(queries, self.options.noises or NOISES, self.unit_length)


class ReTrac(TracIn):
    """TracIn with gradients of length 1 at every timestep."""

    summary = "TracIn with the gradient of every timestep scaled to length 1 (Diffusion-ReTrac)"

    unit_length = True


class Influence(InnerProducts):
    """Influence function with the Fisher as curvature."""

    summary = "influence function: inner product weighted by the inverse Fisher, diagonal or EK-FAC"
    reads = InnerProducts.reads | {"damping", "curvature", "unit_length", "draws"}
    directed_by = frozenset({"damping", "curvature", "draws"})

    def models(self) -> list[str]:
        """θ0."""
        return [self.layout.weights]

    def more_inputs(self) -> list[str]:
        """The fitted curvature."""
        return self.layout.fitted(self.options.curvature or "diagonal")[:1]

    def directions(self, gradients: Gradients, queries: list[str]) -> dict:
        """(F + λ)⁻¹ ∇L(ẑ) / N, with the gradient an unlearning step takes."""
        damping = DAMPING if self.options.damping is None else self.options.damping
        return gradients.preconditioned(queries, self.options.curvature or "diagonal", damping, self.options.draws)


class DataInf(InnerProducts):
    """Influence function with DataInf's approximate inverse."""

    summary = "influence function with the mean of inverses in place of the inverse of the mean (DataInf)"
    reads = InnerProducts.reads | {"damping", "unit_length"}
    directed_by = frozenset({"damping"})

    def models(self) -> list[str]:
        """θ0."""
        return [self.layout.weights]

    def shaped_by(self) -> dict:
        """How many draws stand for the training data."""
        return {"draws": self.layout.config.fit.draws}

    def directions(self, gradients: Gradients, queries: list[str]) -> dict:
        """DataInf's H⁻¹ ∇L(ẑ), from the draws the Fisher is estimated on."""
        return gradients.datainf(queries, DAMPING if self.options.damping is None else self.options.damping)
