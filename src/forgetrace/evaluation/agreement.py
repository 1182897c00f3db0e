"""Whether two methods say the same: rank correlation of their scores, share of their top images in common."""

from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from forgetrace.artifacts import read_table
from forgetrace.attribution.ranking import has_ranked, read_ranking
from forgetrace.evaluation.statistics import standard_error
from forgetrace.layout import Layout

AGREEMENT = ["k", "metric", "method_a", "method_b", "n_queries", "mean", "se"]


def agreement(layout: Layout, partial: bool = False) -> pd.DataFrame:
    """Every pair of methods, mean over the reported queries.

    ``spearman`` (K = 0) is the correlation of the ranks of all images; images of equal score share a rank, and a
    method whose scores are all equal agrees with none (0). ``overlap`` is the share of common images among the top K,
    for every K of ``retrain.k``; two random orders share K / N.

    Args:
        layout: the experiment.
        partial: make do with the methods that have scored every reported query.

    Raises:
        UserError: a ranking is missing or damaged.
    """
    image_ids, found = read_table(layout.index)["image_id"].tolist(), []
    methods, queries = list(layout.config.score.methods), layout.config.reported_queries()
    if partial:
        methods = [method for method in methods if has_ranked(layout, method, queries)]
    for query in queries if methods else []:
        rankings = [read_ranking(layout, method, query, image_ids) for method in methods]
        found.append(_of_query(rankings, layout.config.retrain.k))
    rows = []
    for key in found[0] if found else []:
        for a, b in combinations(range(len(methods)), 2):
            values = np.array([of_query[key][a, b] for of_query in found])
            error = standard_error(values)
            rows.append((*key, methods[a], methods[b], len(values), values.mean(), error))
    return pd.DataFrame(rows, columns=AGREEMENT)


def _of_query(rankings: list[pd.DataFrame], ks: list[int]) -> dict[tuple[int, str], np.ndarray]:
    """Matrices (methods, methods) by (K, metric)."""
    ranks = rankdata([ranking["score"] for ranking in rankings], axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    length = np.linalg.norm(ranks, axis=1)
    unit = np.divide(ranks, length[:, None], out=np.zeros_like(ranks), where=length[:, None] > 0)
    found = {(0, "spearman"): unit @ unit.T}
    for k in sorted(ks):
        tops = np.array([ranking["rank"] <= k for ranking in rankings], dtype=float)
        found[k, "overlap"] = tops @ tops.T / k
    return found
