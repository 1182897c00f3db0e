"""Whether attributing one side of a picture finds images that share that side, and not the other.

In the dataset digit-pairs captions say what is on which side. Of the images a method ranks first for a side of a query,
``regions.csv`` holds the share that has the same digit, ink or both on that side (``own``), the share that has what the
query shows on its other side there (``other``), and the share that attribution of the whole image finds of the first
kind (``whole``). ``chance`` is what a random order finds on average. ``regions_summary.csv`` averages the two sides of
a query first: its intervals and tests count queries, as those of leave-K-out do.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from forgetrace.artifacts import read_json, read_table
from forgetrace.attribution.ranking import read_ranking
from forgetrace.config import Config
from forgetrace.datasets.digit_pairs import facts
from forgetrace.evaluation.statistics import bootstrap_means, interval, sign_flip_test
from forgetrace.layout import Layout

SHARED = {"digit": ("digit",), "ink": ("ink",), "both": ("digit", "ink")}
OPPOSITE = {"left": "right", "right": "left"}
PRECISION = ["query", "region", "method", "k", "shared", "own", "other", "whole", "chance", "chance_other"]
AVERAGED = ["own", "other", "whole", "chance", "chance_other"]
DIFFERENCES = {"own_minus_other": ("own", "other"), "own_minus_whole": ("own", "whole")}


def read_precision(layout: Layout, partial: bool = False) -> pd.DataFrame:
    """The table ``regions.csv`` of the reported queries; with ``partial``, of what has been scored.

    Raises:
        UserError: a ranking is missing or damaged, or a caption is none of digit-pairs.
    """
    index = read_table(layout.index)
    image_ids, seen = index["image_id"].tolist(), pd.DataFrame([facts(text) for text in index["caption"]])
    rows = []
    for whole in (query for query in layout.config.reported_queries() if layout.config.whole(query) == query):
        regions = layout.config.regions_of(whole)
        paths = {m: [layout.score(m, q) for q in (whole, *regions.values())] for m in layout.config.score.methods}
        methods = [m for m, files in paths.items() if not partial or all(Path(file).exists() for file in files)]
        prompt = facts(read_json(layout.query(whole)["record"])["prompt"]) if methods else {}
        for method in methods:
            ranks = {
                query: read_ranking(layout, method, query, image_ids)["rank"].to_numpy()
                for query in (whole, *regions.values())
            }
            for region, query in regions.items():
                for k in layout.config.evaluate.precision_k:
                    found = precision(seen, prompt, region, ranks[query] <= k, ranks[whole] <= k)
                    rows += [(whole, region, method, k, *row) for row in found]
    return pd.DataFrame(rows, columns=PRECISION)


def precision(
    seen: pd.DataFrame, prompt: dict[str, str], region: str, top: np.ndarray, top_of_whole: np.ndarray
) -> list[tuple]:
    """Rows of :func:`read_precision` from ``shared`` on, for one side of one query.

    Args:
        seen: :func:`forgetrace.datasets.digit_pairs.facts` of the N training images.
        prompt: those of the query.
        region: ``left`` or ``right``.
        top: the images ranked first for the region, (N,), bool.
        top_of_whole: those ranked first for the whole image, (N,), bool.
    """
    rows = []
    for shared, words in SHARED.items():
        own, other = (
            np.all([seen[f"{side}_{word}"] == prompt[f"{side}_{word}"] for word in words], axis=0)
            for side in (region, OPPOSITE[region])
        )
        rows.append((shared, own[top].mean(), other[top].mean(), own[top_of_whole].mean(), own.mean(), other.mean()))
    return rows


def summary(table: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Means over queries with bootstrap 95% intervals, paired differences and their sign-flip p.

    Args:
        table: as :func:`read_precision` gives it.
        resamples: bootstrap samples of every interval.
        seed: of bootstrap and permutations.
    """
    rows = []
    for (method, k, shared), part in table.groupby(["method", "k", "shared"], sort=False):
        queries = part.groupby("query")[AVERAGED].mean()  # over the two sides
        row = {"method": method, "k": k, "shared": shared, "n_queries": len(queries), "n_regions": len(part)}
        for name in ("own", "other", "whole"):
            row |= _mean(name, queries[name].to_numpy(), resamples, seed)
        row |= {"chance": queries["chance"].mean()}
        for name, (a, b) in DIFFERENCES.items():
            difference = (queries[a] - queries[b]).to_numpy()
            row |= _mean(name, difference, resamples, seed) | {f"{name}_p": sign_flip_test(difference, seed)}
        rows.append(row)
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=["method", "k", "shared", "n_queries", "n_regions"])


def by_image(config: Config, values: pd.DataFrame) -> pd.DataFrame:
    """Values of leave-K-out models with the mean over an image's regions in their place.

    Regions of one image share it, its noise and the models of ``random`` and ``seed``: they are no independent queries.

    Args:
        config: the experiment's.
        values: :func:`forgetrace.evaluation.tables.per_query`.
    """
    images = {query: config.whole(query) for query in values["query"].unique()}
    members = values["member"].replace(images)  # of a query's own models
    keys = [name for name in values if name != "value"]
    return (
        values.assign(query=values["query"].map(images), member=members)
        .groupby(keys, sort=False, as_index=False)
        .mean()
    )


def _mean(name: str, values: np.ndarray, resamples: int, seed: int) -> dict[str, float]:
    """Mean of one value per query, with the ends of its interval."""
    low, high = interval(bootstrap_means([values[:, None]], resamples, seed)[0], len(values))
    return {name: values.mean(), f"{name}_low": low, f"{name}_high": high}
