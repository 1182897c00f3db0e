"""The pooled protocol (MUCS, arXiv 2605.17938): one model without the top images of several queries at once.

A pool's model is trained without the union of its queries' top K. A method that finds what matters to these queries,
its targets, and to no others raises their loss much and that of the controls, the judged queries of other pools,
little: the difference of the two counts, query by query. Cheap, and a harder question than leaving out the top images
of one query: never to be mixed with ``counterfactual.csv``.

Every judged query is the target of one pool's model and a control of all others, over which it is averaged. The
queries of a pool share its model; intervals and tests, which are over queries, take them as independent. Regions of
one image are not: their mean, with the whole image's where it is judged too, counts as one query.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from forgetrace.artifacts import read_table
from forgetrace.attribution.ranking import has_ranked
from forgetrace.config import RANDOM
from forgetrace.counterfactual.sets import top
from forgetrace.evaluation.measures import THETA0, Model, asked_queries, asks_all, read_brief, read_measure
from forgetrace.evaluation.statistics import bootstrap_means, holm, interval, sign_flip_test, standard_error
from forgetrace.layout import Layout

POOLED = [
    "method", "k", "metric", "n_queries", "pools", "union", "control_share",
    "target", "control", "difference", "se", "ci_low", "ci_high", "p_vs_random",
    "vs_reference", "p_vs_reference", "p_vs_random_holm", "p_vs_reference_holm",
]  # fmt: skip
METRICS = {"delta_loss": "loss", "delta_mse": "mse"}  # and what a model's record calls it


def pooled(layout: Layout, partial: bool = False) -> pd.DataFrame:
    """Every method, K and metric: means of targets and controls, their difference with interval and p against random.

    ``union`` is the mean number of images a pool left out, ``control_share`` the share of a control's own top K that
    was among them. With a single pool there are no controls, and their columns are empty. ``vs_reference`` is how much
    larger the difference is than that of ``evaluate.reference``, over the queries; empty where there is none.

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
        sizes = {method: _sizes(layout, method, k, partial) for method in models}
        for metric in METRICS:
            samples = {method: _values(layout, own, queries, metric) for method, own in models.items()}
            for method, values in samples.items():
                if len(values):
                    random, reference = (
                        samples.get(other) if other != method else None for other in (RANDOM, config.evaluate.reference)
                    )
                    found = *_summary(values, layout), _against(values, random, layout)[1]
                    pools, compared = config.retrain.pools, _against(values, reference, layout)
                    rows.append((method, k, metric, len(values), pools, *sizes[method], *found, *compared))
    table = pd.DataFrame(rows, columns=POOLED[:-2])
    if table.empty:  # nothing to group
        return table.reindex(columns=POOLED)
    ps = table.groupby(["k", "metric"])[["p_vs_random", "p_vs_reference"]].transform(holm)
    return table.join(ps.add_suffix("_holm"))


def _values(layout: Layout, models: list[Model], queries: list[str], metric: str) -> pd.DataFrame:
    """What a method's models say of the images of queries that have this metric: columns target, control."""
    key, rows = METRICS[metric], {}
    said = {member: read_brief(layout, (method, k, member)) for method, k, member in models}
    dealt = {member: layout.pool(member) for member in said}
    for query in queries:
        if key in said[models[0][2]][query]:
            base = _base_loss(layout, query) if metric == "delta_loss" else 0.0
            of = {member: measured[query][key] - base for member, measured in said.items()}
            target = next(value for member, value in of.items() if query in dealt[member])
            others = [value for member, value in of.items() if query not in dealt[member]]
            rows[query] = (target, np.mean(others) if others else np.nan)
    values = pd.DataFrame.from_dict(rows, orient="index", columns=["target", "control"])
    return values.groupby(layout.config.whole, sort=False).mean()


def _base_loss(layout: Layout, query: str) -> float:
    """θ0's loss on what pools are asked of a query: of a region, inside of it."""
    said = read_measure(layout, THETA0, query)
    return said.regions.get("inside", said.loss)


def _summary(values: pd.DataFrame, layout: Layout) -> tuple[float, ...]:
    """Columns target to ci_high of one row."""
    difference = (values["target"] - values["control"]).to_numpy()
    target, control = values["target"].mean(), values["control"].mean()
    if np.isnan(control):
        return (target, *[np.nan] * 5)
    seed = layout.config.seed
    low, high = interval(
        bootstrap_means([difference[:, None]], layout.config.evaluate.bootstrap, seed)[0], len(difference)
    )
    return target, control, difference.mean(), standard_error(difference), low, high


def _against(values: pd.DataFrame, other: pd.DataFrame | None, layout: Layout) -> tuple[float, float]:
    """How much larger the difference is than another method's, the mean over queries, and p; NaN without the other."""
    if other is None or other.empty or values["control"].isna().any():
        return np.nan, np.nan
    more = (values["target"] - values["control"]) - (other["target"] - other["control"])
    return more.mean(), sign_flip_test(more.to_numpy(), layout.config.seed)


def _sizes(layout: Layout, method: str, k: int, partial: bool) -> tuple[float, float]:
    """Mean size of a pool's union, and mean share of the controls' own top k in it.

    With ``partial``, as an earlier table says where scores are missing.
    """
    judged = layout.config.judged_queries()
    if partial and not has_ranked(layout, method, judged):
        earlier = read_table(layout.table("pooled")) if Path(layout.table("pooled")).exists() else None
        said = () if earlier is None else earlier[(earlier["method"] == method) & (earlier["k"] == k)].itertuples()
        return next(((row.union, row.control_share) for row in said), (np.nan, np.nan))
    image_ids = read_table(layout.index)["image_id"].tolist()
    tops = {query: top(layout, image_ids, method, k, query) for query in judged}
    unions, shares = [], []
    for i in range(layout.config.retrain.pools):
        targets = layout.pool(f"pool{i}")
        union = np.any([tops[query] for query in targets], axis=0)
        unions.append(union.sum())
        shares += [(own & union).sum() / k for query, own in tops.items() if query not in targets]
    return float(np.mean(unions)), float(np.mean(shares)) if shares else np.nan
