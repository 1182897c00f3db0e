"""Attribution by unlearning (AbU, arXiv 2406.09408, eq. 6): what is forgotten along with the query.

``τ(z) = L(z, c; θ_Q) − L(z, c; θ0)`` with the same (t, ε) in both terms, mean over timesteps. The
score ``skew`` is that of MUCS (arXiv 2605.17938): the mean of ``(L_Q − L_0) / (L_Q + L_0 + 1e-3)``, here over the
timesteps of the scan and not over MUCS's own grid of noise levels.
"""

import numpy as np

from forgetrace.artifacts import UserError, read_arrays
from forgetrace.attribution.contract import Attributor
from forgetrace.attribution.narrowing import balanced_means
from forgetrace.config import Config


class ByUnlearning(Attributor):
    """What methods share that look at a model which has unlearned the query."""

    @classmethod
    def check(cls, config: Config, method: str) -> None:
        """The variant must be one of the section ``unlearn``."""
        variant = config.score.methods[method].variant or method
        if variant not in config.unlearn:
            raise UserError(
                f"score.methods.{method}: the section 'unlearn' has no variant '{variant}' "
                f"(it has {', '.join(config.unlearn) or 'none'})."
            )

    @property
    def variant(self) -> str:
        """How the query is unlearned: a name of the section ``unlearn``."""
        return self.options.variant or self.method


class Unlearning(ByUnlearning):
    """Loss increase of each training image after unlearning the query."""

    summary = "loss increase of a training image after the model has unlearned the query (AbU)"
    reads = frozenset({"variant", "score", "flips"})

    @classmethod
    def check(cls, config: Config, method: str) -> None:
        """The score must be one that a narrowed scan serves."""
        super().check(config, method)
        if config.scan.narrowing and config.score.methods[method].score != "difference":
            raise UserError(f"score.methods.{method}: scan.narrowing spends its draws by score: difference.")
        if config.score.methods[method].flips and not config.encode.flips:
            raise UserError(f"score.methods.{method}.flips has no effect without encode.flips: remove the key.")

    def inputs(self, query: str) -> list[str]:
        """The scan of θ0 and the one of the unlearned weights."""
        return [self.layout.base_scan, self.layout.scan(self.variant, query)]

    def scores(self, query: str) -> np.ndarray:
        """Mean over draws of the chosen score; of an image and its mirror image the larger, or the mean."""
        before, after = (read_arrays(path) for path in self.inputs(query))
        if not np.array_equal(before["timesteps"], after["timesteps"]):
            raise UserError(f"{self.inputs(query)[1]} was scanned at other timesteps than θ0: delete both scans.")
        if before.get("drawn_on") != after.get("drawn_on"):
            raise UserError(
                f"{self.inputs(query)[1]} and the scan of θ0 have noise that was drawn on different kinds of devices "
                "(scan.noise: release): delete both and scan again on one kind of GPU."
            )
        values = SCORES[self.options.score](before["losses"].astype(float), after["losses"].astype(float))
        # Only a narrowed scan may lack losses; elsewhere a missing one makes the score NaN, which is refused.
        scores = balanced_means(values) if self.layout.config.scan.narrowing else values.mean(axis=1)
        if not self.layout.config.encode.flips:
            return scores
        both = scores.reshape(2, -1)
        return both.mean(axis=0) if self.options.flips == "mean" else both.max(axis=0)


def difference(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """AbU's score of each draw: the increase."""
    return after - before


def skew(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """MUCS's score of each draw: the relative increase, in (-1, 1).

    The 1e-3 keeps draws that both models predict almost perfectly from deciding. MUCS adds it to losses weighted as
    in EDM, of order 1 for an untrained model. Unweighted, as here, an untrained model's loss is of order 1 as well, and
    a trained one's smaller: in the default experiment θ0's is .08 in the median and .007 at least, so that 1e-3 takes
    .6% from the median draw's score and never more than 7%. For a model whose losses come near 1e-3 it would turn
    relative increases into absolute ones.
    """
    return (after - before) / (after + before + 1e-3)


SCORES = {"difference": difference, "skew": skew}
