"""Are calibrated probabilities over candidates to be relied upon?

The truth of a query is S, uniform on its model's n exemplars. Of candidates that were given about the same probability,
the mean of S should be that probability; and the exemplars together should be given all of it, which is their mass.
"""

import numpy as np
import pandas as pd

from forgetrace.artifacts import read_json, read_table
from forgetrace.evaluation.statistics import bootstrap_means, interval
from forgetrace.layout import Layout

EDGES = np.array([0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1])
MASS = ["kind", "n_models", "n_queries", "mass", "ci_low", "ci_high", "chance"]
BINS = ["kind", "low", "high", "candidates", "probability", "truth"]


def tables(layout: Layout) -> dict[str, pd.DataFrame]:
    """``calibration``: mass on the exemplars by kind of test model; ``reliability``: bins of probability."""
    found = read_table(layout.learned["probabilities"])
    found = found.assign(kind=found["model"].str.partition("-")[0])
    candidates = read_json(layout.encode_manifest)["images"]
    return {
        "calibration": mass(found, candidates, layout.config.evaluate.bootstrap, layout.config.seed),
        "reliability": bins(found),
    }


def mass(found: pd.DataFrame, images: int, resamples: int, seed: int) -> pd.DataFrame:
    """Probability on the exemplars, the mean over models of the mean over queries; intervals resample models.

    Args:
        found: model, query, image_id, probability, exemplar, kind.
        images: of the base set; the mass that equal probabilities give is ``chance``.
        resamples: of the intervals.
        seed: of the intervals.
    """
    rows = []
    for kind, own in found.groupby("kind"):
        exemplars = own[own["exemplar"]]
        of_queries = exemplars.groupby(["model", "query"])["probability"].sum()
        of_models = of_queries.groupby("model").mean().to_numpy()
        low, high = interval(bootstrap_means([of_models[:, None]], resamples, seed)[0], len(of_models))
        count = len(exemplars) / len(of_queries)
        rows.append((kind, len(of_models), len(of_queries), of_models.mean(), low, high, count / (images + count)))
    return pd.DataFrame(rows, columns=MASS)


def bins(found: pd.DataFrame) -> pd.DataFrame:
    """Candidates by probability above 0: how many, their mean probability and their mean of S."""
    exemplars = found.groupby("query")["exemplar"].transform("sum")
    found = found.assign(truth=found["exemplar"] / exemplars)
    found = found[found["probability"] > 0]
    place = np.searchsorted(EDGES, found["probability"], side="left") - 1
    rows = []
    for (kind, i), own in found.groupby(["kind", place]):
        values = own["probability"].mean(), own["truth"].mean()
        rows.append((kind, EDGES[i], EDGES[i + 1], len(own), *values))
    return pd.DataFrame(rows, columns=BINS)
