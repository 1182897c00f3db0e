"""Several methods' scores as one: they err in different places, and what they agree on stays.

``τ(z) = Σ_m (τ_m(z) − mean τ_m) / sd τ_m`` over the training images of one query. Standardised, since scores of
different methods are in different units; not ranked, since how far an image stands out is what a method says of it.
"""

import numpy as np

from forgetrace.artifacts import UserError, read_table
from forgetrace.attribution.contract import Attributor
from forgetrace.attribution.ranking import read_ranking
from forgetrace.config import RANDOM, Config

ROUNDING = 1e-12  # of the largest score, below which differences say nothing


class Ensemble(Attributor):
    """Sum of the standardised scores of other methods of the experiment."""

    summary = "sum of the standardised scores of other methods"
    reads = frozenset({"methods"})

    @classmethod
    def check(cls, config: Config, method: str) -> None:
        """The members must be two other methods or more, none of them random or an ensemble itself."""
        key, members = f"score.methods.{method}.methods", config.score.methods[method].methods or []
        if len(set(members)) < 2 or len(set(members)) < len(members):
            raise UserError(f"{key}: name two different methods or more.")
        for member in members:
            options = config.score.methods.get(member)
            if options is None or member == RANDOM or (options.attributor or member) == "ensemble":
                raise UserError(f"{key}: '{member}' is no other method of score.methods; name those with scores.")
            costly = config.retrieve.costly.methods if config.retrieve else []
            if member in costly and method not in costly:
                raise UserError(f"{key}: '{member}' is one of retrieve.costly.methods; name '{method}' there too.")

    def inputs(self, query: str) -> list[str]:
        """The members' scores, and the order of the images."""
        return [*(self.layout.score(member, query) for member in self.options.methods), self.layout.index]

    def scores(self, query: str) -> np.ndarray:
        """Sum over the members; one that scores all images alike says nothing and adds nothing."""
        image_ids = read_table(self.layout.index)["image_id"].tolist()
        members = [
            read_ranking(self.layout, member, query, image_ids)["score"].to_numpy() for member in self.options.methods
        ]
        return np.sum([standardised(scores) for scores in members], axis=0)


def standardised(scores: np.ndarray) -> np.ndarray:
    """Scores (N,) with mean 0 and standard deviation 1; zeros where all are equal but for rounding."""
    centred = scores - scores.mean()
    spread = centred.std()
    return centred / spread if spread > ROUNDING * np.abs(scores).max() else np.zeros_like(centred)
