"""Linear datamodeling score: do a method's scores foretell the losses of models of random halves of D?

Protocol of TRAK (arXiv 2303.14186) and D-TRAK (arXiv 2311.00500). The scores of a query foretell its loss under a
model that trained on the half S as ``−Σ_{z∈S} τ(z)``: images that help the query lower it. The score of a query is
Spearman's correlation of what is foretold with what came true, over the halves; where a half was trained several
times, with the mean of its trainings.

Trainings differ by their seed, so that even the expected losses would not reach 1. Two rows say what can be reached:

* ``seed``: mean Spearman's correlation of two trainings, ρ. What one retraining foretells of another.
* ``ceiling``: what a method would reach that knew the expected loss of every half. Against the mean of s trainings
  that is the square root of the mean's reliability, by Spearman and Brown's formula ``√(sρ / (1 + (s − 1)ρ))``: above
  ρ, because the method's own side would have no noise. It takes ρ as a mean over queries (a single one is too noisy
  for a root) and training noise as of one size and normal, for which ranks and values correlate nearly alike.

Both need at least two trainings of each half. The first has θ0's seed, so a method may know a little of what is θ0's
own, and reach beyond the ceiling by that.

Standard errors and intervals cover two factors: another choice of queries, and another choice of halves (with the
noise of their trainings), which all queries share; see :func:`forgetrace.evaluation.statistics.crossed_interval`.
The halves are resampled for that, the same for every method, and the ranks taken anew in every sample. Tests (sign
flips over queries) take the halves as given.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from forgetrace.artifacts import read_table
from forgetrace.attribution.ranking import read_ranking
from forgetrace.config import CEILING, RANDOM, SEED_SET
from forgetrace.counterfactual.sets import half
from forgetrace.evaluation.comparisons import Pair, family
from forgetrace.evaluation.measures import asks_all, read_brief
from forgetrace.evaluation.statistics import crossed_interval, holm, resampling_counts, sign_flip_test, spearman
from forgetrace.layout import Layout
from forgetrace.randomness import generator

LDS_PER_QUERY = ["query", "queries", "method", "lds"]
LDS = [
    "queries", "method", "n_queries", "halves", "seeds",
    "mean", "se", "ci_low", "ci_high", "p_vs_random", "p_vs_random_holm",
]  # fmt: skip
METRIC = "lds"  # its name in comparisons.csv
ORIGINS = ("report", "tuning", "own")

# By method and query: its score, then that of every bootstrap sample of the halves, shape (1 + resamples,).
Correlations = dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Halves:
    """Random halves of D and what the models that trained on them say.

    Attributes:
        kept: the images of each half, (halves, N), bool.
        losses: by query, its loss under each model, (seeds, halves), float64.
    """

    kept: np.ndarray
    losses: dict[str, np.ndarray]

    @property
    def shape(self) -> tuple[int, int]:
        """(halves, seeds)."""
        return len(self.kept), len(next(iter(self.losses.values())))


def read_halves(layout: Layout, partial: bool = False) -> Halves:
    """Read what the models of random halves say of every query.

    Args:
        layout: the experiment.
        partial: make do with the halves that have been trained once; their further trainings count where all of these
            halves have them.

    Raises:
        UserError: a file is missing or damaged.
    """
    models, count = layout.half_models(), layout.config.retrain.subsets
    repetitions = [models[start : start + count] for start in range(0, len(models), count)]
    if partial:
        there = [i for i, model in enumerate(repetitions[0]) if asks_all(layout, model)]
        repetitions = [[models[i] for i in there] for models in repetitions]
        repetitions = [
            models
            for models in repetitions
            if models == repetitions[0] or all(asks_all(layout, model) for model in models)
        ]
    images = len(read_table(layout.index))
    kept = np.array([half(layout, images, draw) for _, _, draw in repetitions[0]]).reshape(-1, images)
    said = [[read_brief(layout, model) for model in models] for models in repetitions]
    return Halves(
        kept,
        {
            query: np.array([[measured[query]["loss"] for measured in models] for models in said])
            for query in layout.config.queries()
        },
    )


def read_scores(layout: Layout, partial: bool = False) -> dict[str, dict[str, np.ndarray]]:
    """Scores of the N images in index order by method and query; with ``partial``, those that are there."""
    image_ids = read_table(layout.index)["image_id"].tolist()
    return {
        method: {
            query: read_ranking(layout, method, query, image_ids)["score"].to_numpy()
            for query in layout.config.queries()
            if not partial or Path(layout.score(method, query)).exists()
        }
        for method in layout.config.score.methods
    }


def correlations(
    halves: Halves, scores: Mapping[str, Mapping[str, np.ndarray]], resamples: int, seed: int
) -> Correlations:
    """The score of every method and query, and of ``seed`` where halves were trained more than once.

    Args:
        halves: the models.
        scores: those of the N images, by method and query.
        resamples: bootstrap samples of the halves, the same for all methods and queries.
        seed: of the bootstrap.
    """
    count, seeds = halves.shape
    if not count:
        return {}  # of a partial evaluation
    counts = np.ones((1 + resamples, count))
    counts[1:] = resampling_counts(count, resamples, generator(seed, "lds", "halves"))
    found: Correlations = {
        method: {
            query: spearman(-(halves.kept @ of_query), halves.losses[query].mean(axis=0), counts)
            for query, of_query in of_method.items()
        }
        for method, of_method in scores.items()
    }
    if seeds > 1:
        found[SEED_SET] = {
            query: np.mean([spearman(a, b, counts) for a, b in combinations(losses, 2)], axis=0)
            for query, losses in halves.losses.items()
        }
    return found


def per_query(layout: Layout, found: Correlations) -> pd.DataFrame:
    """The score of every query and method: query, queries (the pool it is from), method, lds."""
    rows = [
        (query, layout.config.origin(query), method, values[query][0])
        for query in layout.config.queries()
        for method, values in found.items()
        if query in values
    ]
    return pd.DataFrame(rows, columns=LDS_PER_QUERY)


def summary(layout: Layout, found: Correlations, shape: tuple[int, int]) -> pd.DataFrame:
    """Mean over the queries of each pool (``queries``) with standard error, 95% interval and p against random.

    n counts queries, an image with its regions as one; standard error and interval are over queries and halves. p is
    of the two-sided sign-flip test over queries and takes the halves as given; with Holm's correction for the number of
    methods beside it.

    Args:
        layout: the experiment.
        found: of :func:`correlations`.
        shape: halves and seeds behind them.
    """
    rows = []
    for origin in ORIGINS:
        pool = {method: _of(layout, values, origin) for method, values in found.items()}
        for method, values in pool.items():
            if not values:
                continue
            images = _by_image(layout, values)
            points, (error, *ends) = _points(images), _spread(images)
            low, high = np.clip(ends, -1, 1)
            p = _p_against(layout, pool.get(RANDOM, {}), values, method)
            rows.append((origin, method, len(points), *shape, points.mean(), error, low, high, p))
            if method == SEED_SET:
                mean, low, high = (ceiling(value, shape[1]) for value in (points.mean(), low, high))
                rows.append((origin, CEILING, len(points), *shape, mean, np.nan, low, high, np.nan))
    table = pd.DataFrame(rows, columns=LDS[:-1])
    return table.assign(p_vs_random_holm=table.groupby("queries")["p_vs_random"].transform(holm))


def ceiling(agreement: float, seeds: int) -> float:
    """What perfect predictions reach against the mean of s trainings (Spearman and Brown).

    Args:
        agreement: correlation ρ of two trainings; an end of its interval beyond 0 or 1 counts as that.
        seeds: trainings s of each half.
    """
    agreement = np.clip(agreement, 0.0, 1.0)
    return float(np.sqrt(seeds * agreement / (1 + (seeds - 1) * agreement)))


def comparisons(layout: Layout, found: Correlations) -> list[tuple]:
    """Rows of ``comparisons.csv``, metric ``lds``, K = 0: every pair of methods on the reported queries."""
    reported, pairs = layout.config.reported_queries(), []
    methods = sorted((method for method in found if method != SEED_SET), key=lambda method: method == RANDOM)
    for a, b in combinations(methods, 2):
        both = [query for query in reported if query in found[a] and query in found[b]]
        if both:
            difference = _by_image(layout, {query: found[a][query] - found[b][query] for query in both})
            pairs.append(Pair(a, b, _points(difference), _spread(difference)[1:]))
    return family(0, METRIC, pairs, layout.config.seed)


def _of(layout: Layout, values: dict[str, np.ndarray], origin: str) -> dict[str, np.ndarray]:
    return {query: value for query, value in values.items() if layout.config.origin(query) == origin}


def _by_image(layout: Layout, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The mean over an image and its regions, which are no independent queries, in their place."""
    images: dict[str, list[np.ndarray]] = {}
    for query, value in values.items():
        images.setdefault(layout.config.whole(query), []).append(value)
    return {image: np.mean(own, axis=0) for image, own in images.items()}


def _points(values: dict[str, np.ndarray]) -> np.ndarray:
    """The scores themselves, one per query."""
    return np.array([value[0] for value in values.values()])


def _spread(values: dict[str, np.ndarray]) -> tuple[float, float, float]:
    """Standard error and interval of the mean score."""
    return crossed_interval(_points(values), np.stack([value[1:] for value in values.values()], axis=1))


def _p_against(layout: Layout, random: dict[str, np.ndarray], values: dict[str, np.ndarray], method: str) -> float:
    both = [query for query in values if query in random]
    if method in (RANDOM, SEED_SET) or not both:
        return float("nan")
    difference = _by_image(layout, {query: values[query] - random[query] for query in both})
    return sign_flip_test(_points(difference), layout.config.seed)
