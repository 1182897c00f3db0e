"""The pooled protocol (MUCS, arXiv 2605.17938): one model without the top images of several queries at once.

A pool's model is trained without the union of its queries' top K. A method that finds what matters to these queries,
its targets, and to no others raises their loss much and that of the controls, the judged queries of other pools,
little: the difference of the two counts, query by query. Cheap, and a harder question than leaving out the top images
of one query: never to be mixed with ``counterfactual.csv``.

Every judged query is the target of one pool's model and a control of all others, over which it is averaged. The
queries of a pool share its model; intervals and tests, which are over queries, take them as independent.
"""

import numpy as np
import pandas as pd

from forgetrace.artifacts import read_table
from forgetrace.config import RANDOM
from forgetrace.counterfactual.sets import top
from forgetrace.evaluation.measures import THETA0, Model, asked_queries, asks_all, read_brief, read_measure
from forgetrace.evaluation.statistics import bootstrap_means, holm, interval, sign_flip_test, standard_error
from forgetrace.layout import Layout

POOLED = [
    "method", "k", "metric", "n_queries", "pools", "union", "control_share",
    "target", "control", "difference", "se", "ci_low", "ci_high", "p_vs_random", "p_vs_random_holm",
]  # fmt: skip
METRICS = {"delta_loss": "loss", "delta_mse": "mse"}  # and what a model's record calls it


def pooled(layout: Layout, partial: bool = False) -> pd.DataFrame:
    """Every method, K and metric: means of targets and controls, their difference with interval and p against random.

    ``union`` is the mean number of images a pool left out, ``control_share`` the share of a control's own top K that
    was among them. With a single pool there are no controls, and their columns are empty.

    Args:
        layout: the experiment.
        partial: make do with the methods and K whose pools have all been trained.

    Raises:
        UserError: a measure or a ranking is missing or damaged.
    """
    config, queries, rows = layout.config, asked_queries(layout, partial), []
    for k in config.retrain.pooled_k:
        models = {
            method: [model for model in layout.pooled_models() if model[:2] == (method, k)]
            for method in sorted(config.score.methods, key=lambda method: method == RANDOM)
        }
        if partial:
            models = {m: own for m, own in models.items() if all(asks_all(layout, model) for model in own)}
        sizes = {method: _sizes(layout, method, k) for method in models}
        for metric in METRICS:
            samples = {method: _values(layout, own, queries, metric) for method, own in models.items()}
            for method, values in samples.items():
                if len(values):
                    random = samples.get(RANDOM) if method != RANDOM else None
                    pools, found = config.retrain.pools, _summary(values, random, layout)
                    rows.append((method, k, metric, len(values), pools, *sizes[method], *found))
    table = pd.DataFrame(rows, columns=POOLED[:-1])
    return table.assign(p_vs_random_holm=table.groupby(["k", "metric"])["p_vs_random"].transform(holm))


def _values(layout: Layout, models: list[Model], queries: list[str], metric: str) -> pd.DataFrame:
    """What a method's models say of the queries that have this metric: columns target, control."""
    key, rows = METRICS[metric], {}
    said = {member: read_brief(layout, (method, k, member)) for method, k, member in models}
    for query in queries:
        if key in said[models[0][2]][query]:
            base = read_measure(layout, THETA0, query).loss if metric == "delta_loss" else 0.0
            of = {member: measured[query][key] - base for member, measured in said.items()}
            target = next(value for member, value in of.items() if query in layout.pool(member))
            others = [value for member, value in of.items() if query not in layout.pool(member)]
            rows[query] = (target, np.mean(others) if others else np.nan)
    return pd.DataFrame.from_dict(rows, orient="index", columns=["target", "control"])


def _summary(values: pd.DataFrame, random: pd.DataFrame | None, layout: Layout) -> tuple[float, ...]:
    """Columns target to p_vs_random of one row; ``random`` holds the values of random images where there are any."""
    difference = (values["target"] - values["control"]).to_numpy()
    target, control = values["target"].mean(), values["control"].mean()
    if np.isnan(control):
        return (target, *[np.nan] * 6)
    seed = layout.config.seed
    low, high = interval(
        bootstrap_means([difference[:, None]], layout.config.evaluate.bootstrap, seed)[0], len(difference)
    )
    p = np.nan
    if random is not None:
        p = sign_flip_test(difference - (random["target"] - random["control"]).to_numpy(), seed)
    return target, control, difference.mean(), standard_error(difference), low, high, p


def _sizes(layout: Layout, method: str, k: int) -> tuple[float, float]:
    """Mean size of a pool's union, and mean share of the controls' own top k in it."""
    image_ids = read_table(layout.index)["image_id"].tolist()
    tops = {query: top(layout, image_ids, method, k, query) for query in layout.config.judged_queries()}
    unions, shares = [], []
    for i in range(layout.config.retrain.pools):
        targets = layout.pool(f"pool{i}")
        union = np.any([tops[query] for query in targets], axis=0)
        unions.append(union.sum())
        shares += [(own & union).sum() / k for query, own in tops.items() if query not in targets]
    return float(np.mean(unions)), float(np.mean(shares)) if shares else np.nan
