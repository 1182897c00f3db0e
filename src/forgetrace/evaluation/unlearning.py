"""The table of unlearning quality: whether each variant forgets its query and nothing else.

``loss`` is the rise of the loss, of the query and of a fixed sample of training images; the other metrics compare
images generated before and after (:mod:`forgetrace.unlearning.quality`), of the query and of others. A good variant
changes the first much and the second little; AbU reports .093 against .022 (squared error) and .65 against .89 (CLIP)
on COCO.
"""

import numpy as np
import pandas as pd

from forgetrace.artifacts import UserError, read_arrays, read_json
from forgetrace.evaluation.metrics import Encoder, image_metrics
from forgetrace.evaluation.statistics import bootstrap_means, holm, interval, sign_flip_test, standard_error
from forgetrace.layout import Layout

UNLEARNING = [
    "variant", "metric", "n_queries", "n_others", "target", "target_se", "others", "others_se",
    "difference", "ci_low", "ci_high", "p", "p_holm",
]  # fmt: skip
LOSS = "loss"


def unlearning(layout: Layout, encode: Encoder, partial: bool = False) -> pd.DataFrame:
    """Every variant and metric: means over queries, 95% interval and p (sign-flip, Holm) of query less others.

    Args:
        layout: the experiment.
        encode: image encoder behind ``similarity``.
        partial: make do with the variants whose images are there.

    Raises:
        UserError: a file of a variant is missing or damaged.
    """
    rows = []
    for variant in layout.config.unlearn:
        try:
            values = variant_values(layout, variant, encode)
        except UserError:
            if not partial:
                raise
            continue
        rows += [(variant, metric, *_summary(layout, *_by_image(layout, *pair))) for metric, pair in values.items()]
    table = pd.DataFrame(rows, columns=UNLEARNING[:-1])
    return table.assign(p_holm=table.groupby("metric")["p"].transform(holm))


def variant_values(layout: Layout, variant: str, encode: Encoder) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By metric, what unlearning changed of each query, (queries,), and of the others beside it, (queries, others).

    The rise of the loss of other training images is known as their mean alone: (queries, 1).
    """
    # Before the images, whose encoding takes minutes.
    records = [read_json(layout.unlearned(variant, query)["losses"]) for query in layout.config.forgotten_queries()]
    arrays = read_arrays(layout.regenerated(variant))
    pairs = zip(arrays["targets"], arrays["targets_unlearned"], strict=True)
    of_query = _joined([image_metrics(before, after[None], encode) for before, after in pairs])
    # One of the other images at a time, with all it became.
    pairs = zip(arrays["others"], arrays["others_unlearned"].swapaxes(0, 1), strict=True)
    of_others = _joined([image_metrics(before, after, encode) for before, after in pairs])
    queries = len(arrays["targets"])
    values = {metric: (of_query[metric], of_others[metric].reshape(-1, queries).T) for metric in of_query}
    rise = np.array([[r["after"][what] - r["before"][what] for what in ("query", "others")] for r in records])
    return {LOSS: (rise[:, 0], rise[:, 1:])} | values


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {metric: np.concatenate([part[metric] for part in parts]) for metric in parts[0]}


def _by_image(layout: Layout, of_query: np.ndarray, of_others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean over an image and its regions, which are no independent queries, in their place."""
    images = pd.Series(map(layout.config.whole, layout.config.forgotten_queries()))
    return tuple(pd.DataFrame(of).groupby(images, sort=False).mean().to_numpy() for of in (of_query, of_others))


def _summary(layout: Layout, of_query: np.ndarray, of_others: np.ndarray) -> tuple[float, ...]:
    """Columns n_queries to p of one row."""
    of_query, beside = of_query.mean(axis=1), of_others.mean(axis=1)
    difference, settings = of_query - beside, layout.config
    low, high = interval(
        bootstrap_means([difference[:, None]], settings.evaluate.bootstrap, settings.seed)[0], len(difference)
    )
    means = of_query.mean(), standard_error(of_query), beside.mean(), standard_error(beside), difference.mean()
    p = sign_flip_test(difference, settings.seed)
    return len(of_query), settings.evaluate.others, *means, low, high, p
