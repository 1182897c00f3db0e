"""How well the exemplars of a customised model are found among its candidates (AbC, arXiv 2306.09345, section 5).

Every metric follows from the ranks r₁ < … < rₙ of a query's n exemplars among all candidates, ties broken by image id:

* average precision ``AP = (1/n) Σᵢ i / rᵢ``, the mean of the precision at every exemplar;
* ``Recall@k = #{i : rᵢ <= k} / n``, also divided by its ceiling ``min(k, n) / n``, which no ranking can exceed.

Images of *plain* prompts, in which V* is not, are in no row of all manners. A method that finds exemplars for them as
well finds them whether or not the concept was asked for.

Queries of one model are not independent: they share exemplars and weights. The unit of every interval and test is
therefore the model: its queries are averaged, and models are resampled.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from forgetrace.artifacts import UserError, read_json, read_table
from forgetrace.attribution.asked import costly_queries, manners_of
from forgetrace.config import LEARNED, MANNERS, PLAIN
from forgetrace.datasets import concepts
from forgetrace.evaluation.comparisons import Pair
from forgetrace.evaluation.statistics import bootstrap_means, holm, interval, sign_flip_test
from forgetrace.layout import Layout

CUTS = (5, 10, 100)
ALL, SUBSET = "all", "subset"  # queries that a row is over: all of them, or those that costly methods ranked for too
PER_QUERY = ["model", "kind", "manner", "query", "subset", "method", "metric", "value"]
SUMMARY = [
    "queries", "kind", "manner", "method", "metric", "n_models", "n_queries", "mean", "ci_low", "ci_high",
]  # fmt: skip
COMPARISONS = [
    "queries", "kind", "metric", "method_a", "method_b", "n_models", "mean_difference", "ci_low", "ci_high", "p",
    "p_holm",
]  # fmt: skip
COMPARED = ("ap", "recall_10_of_ceiling")


def average_precision(ranks: np.ndarray) -> float:
    """AP of n relevant items at the given ranks (from 1), shape (n,), in any order."""
    return float((np.arange(1, len(ranks) + 1) / np.sort(ranks)).mean())


def recall(ranks: np.ndarray, k: int) -> float:
    """Share of the n relevant items within the first k."""
    return float((ranks <= k).mean())


def ceiling(k: int, relevant: int) -> float:
    """The largest recall within the first k that n relevant items allow."""
    return min(k, relevant) / relevant


def metrics(ranks: np.ndarray) -> dict[str, float]:
    """Every metric of one query by name; ranks as :func:`average_precision` takes them."""
    values = {"ap": average_precision(ranks)}
    for k in CUTS:
        found = recall(ranks, k)
        values |= {f"recall_{k}": found, f"recall_{k}_of_ceiling": found / ceiling(k, len(ranks))}
    return values


def tables(layout: Layout, partial: bool = False) -> dict[str, pd.DataFrame]:
    """The tables ``retrieval_per_query``, ``retrieval`` and ``retrieval_comparisons``.

    Args:
        layout: the experiment.
        partial: make do with the models that have been ranked for.

    Raises:
        UserError: a table of ranks is missing or damaged.
    """
    resamples, seed = layout.config.evaluate.bootstrap, layout.config.seed
    values = per_query(layout, partial)
    return {
        "retrieval_per_query": values,
        "retrieval": summary(values, resamples, seed),
        "retrieval_comparisons": comparisons(values, resamples, seed),
    }


def per_query(layout: Layout, partial: bool = False) -> pd.DataFrame:
    """Every metric of every method on every query of the test models: the columns ``PER_QUERY``."""
    models = concepts.names(layout.config.customize, layout.config.seed)["test"]
    found = []
    for model in models:
        try:
            found.append(read_table(layout.ranks(model)))
        except UserError:
            if not partial:
                raise
    if not found:
        raise UserError("No customised model has been ranked for yet: run the stage retrieve.")
    there = {model for table in found for model in table["model"].unique()}
    if layout.config.learn and (not partial or Path(layout.learned["ranks"]).exists()):
        learned = read_table(layout.learned["ranks"])
        found.append(learned[learned["model"].isin(there)])
    records = {model: read_json(layout.customized(model)["record"]) for model in there}
    manners = {model: manners_of(record) for model, record in records.items()}
    subsets = {model: costly_queries(layout, model, own) for model, own in manners.items()}
    rows = []
    for (model, query, method), own in pd.concat(found).groupby(["model", "query", "method"], sort=False):
        about = (model, records[model]["kind"], manners[model][query], query, query in subsets[model], method)
        rows += [(*about, name, value) for name, value in metrics(own["rank"].to_numpy()).items()]
    return pd.DataFrame(rows, columns=PER_QUERY)


def summary(values: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Means over models by kind, manner of prompt and method, with 95% intervals that resample models.

    Rows over the ``subset`` hold all methods on the queries that costly ones ranked for, so that they compare.
    """
    rows = []
    for (queries, kind, manner, metric), part in _parts(values):
        for method, own in part.groupby("method", sort=False):
            rows.append((queries, kind, manner, method, metric, *mean_over_models(own, resamples, seed)))
    return pd.DataFrame(rows, columns=SUMMARY)


def mean_over_models(values: pd.DataFrame, resamples: int, seed: int) -> tuple[int, int, float, float, float]:
    """Models, queries, mean over models of the mean over their queries, and its 95% interval, which resamples models.

    Args:
        values: one metric of one method, the columns model and value.
        resamples: of the bootstrap.
        seed: its seed.
    """
    of_models = values.groupby("model")["value"].mean().to_numpy()
    low, high = interval(bootstrap_means([of_models[:, None]], resamples, seed)[0], len(of_models))
    return len(of_models), len(values), of_models.mean(), low, high


def comparisons(values: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Pairs of methods on the same models: mean difference, 95% interval, p over models, corrected in its family."""
    rows = []
    for (queries, kind, manner, metric), part in _parts(values):
        if manner != ALL or metric not in COMPARED:
            continue
        of_models = part.groupby(["model", "method"], sort=False)["value"].mean().unstack("method").dropna()
        means = bootstrap_means([of_models[[method]].to_numpy() for method in of_models], resamples, seed)
        pairs = []
        for i, a in enumerate(of_models):
            for j in range(i + 1, of_models.shape[1]):
                difference = (of_models[a] - of_models.iloc[:, j]).to_numpy()
                pairs.append(Pair(a, of_models.columns[j], difference, interval(means[i] - means[j], len(difference))))
        p = np.array([sign_flip_test(pair.difference, seed) for pair in pairs])
        for pair, own, corrected in zip(pairs, p, holm(p), strict=True):
            count, mean = len(pair.difference), pair.difference.mean()
            rows.append((queries, kind, metric, pair.a, pair.b, count, mean, *pair.interval, own, corrected))
    return pd.DataFrame(rows, columns=COMPARISONS)


def _parts(values: pd.DataFrame):
    """(queries, kind, manner, metric) with its rows; on all queries only the methods that have them all."""
    plain = values["manner"] == PLAIN
    on_all = pd.concat([_of_all(values[~plain]), _of_all(values[plain])])
    for queries, some in ((ALL, on_all), (SUBSET, values[values["subset"]])):
        for kind in dict.fromkeys(some["kind"]):
            for manner, manners in (ALL, MANNERS), *((one, [one]) for one in (*MANNERS, PLAIN)):
                own = some[(some["kind"] == kind) & some["manner"].isin(manners)]
                for metric, part in own.groupby("metric", sort=False):
                    yield (queries, kind, manner, metric), part


def _of_all(values: pd.DataFrame) -> pd.DataFrame:
    """The rows of methods that ranked for all queries."""
    counts = values.groupby("method", sort=False)["query"].nunique()
    return values[values["method"].isin(counts[counts == values["query"].nunique()].index)]


def headline(table: pd.DataFrame) -> dict:
    """What DVC reads of the summary: AP by kind and method, over all queries."""
    rows = table[(table["queries"] == ALL) & (table["manner"] == ALL) & (table["metric"] == "ap")]
    kinds = {kind: own.set_index("method")["mean"] for kind, own in rows.groupby("kind", sort=False)}
    return {kind: {method: float(value) for method, value in own.items()} for kind, own in kinds.items()}


def methods(layout: Layout) -> list[str]:
    """Methods of the tables in the order of the config, what was learned last."""
    return [*layout.config.score.methods, *([LEARNED] if layout.config.learn else [])]
