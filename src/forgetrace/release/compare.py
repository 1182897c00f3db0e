"""``forgetrace compare-release``: this package's scores beside published ones of the same queries."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from forgetrace.artifacts import UserError, read_array, read_arrays, read_table
from forgetrace.attribution.ranking import read_ranking
from forgetrace.config import GivenQueries
from forgetrace.layout import Layout
from forgetrace.release.pickles import array_of, read_pickle

TOPS = (50, 200, 1000)
SUBSETS = "influence_subset", "rank_influence_subset"


class Published(NamedTuple):
    """Published scores of a query.

    Attributes:
        query: its name in the experiment.
        images: rows of the training images that have a score, (n,), int64.
        scores: of each, (n,), float64.
        full: whether all training images have one.
    """

    query: str
    images: np.ndarray
    scores: np.ndarray
    full: bool


def unlearning_method(layout: Layout) -> str:
    """The first method of the experiment that unlearns.

    Raises:
        UserError: there is none.
    """
    methods = layout.config.score.methods
    if own := [name for name, options in methods.items() if (options.attributor or name) == "unlearning"]:
        return own[0]
    raise UserError(f"score.methods has no method that unlearns; choose one by --method ({', '.join(methods)}).")


def compare(layout: Layout, influence: Path, method: str) -> pd.DataFrame:
    """A row per query that both have scored.

    Args:
        layout: an experiment with a release's queries.
        influence: a folder of ``influence_<i>.pkl``, or ``influence_test.pkl`` or ``influence_train.pkl``.
        method: a method of the experiment.

    Returns:
        Columns query; images, how many are compared; spearman, the rank correlation of the scores; overlap_<K>, the
        share of common images among the top K of those (NaN where there are fewer); largest_difference of the scores,
        NaN where only some images have a published one.

    Raises:
        UserError: the published files are missing or damaged or of other queries or images, or nothing was scored.
    """
    if method not in layout.config.score.methods:
        known = ", ".join(layout.config.score.methods)
        raise UserError(f"--method {method}: the experiment has no such method (it has {known}).")
    image_ids = read_table(layout.index)["image_id"].tolist()
    rows = []
    for published in _published(layout, influence, len(image_ids)):
        if Path(layout.score(method, published.query)).exists():
            own = read_ranking(layout, method, published.query, image_ids)["score"].to_numpy()
            rows.append({"query": published.query} | _row(published, own[published.images]))
    if not rows:
        raise UserError(
            f"{method} has scored none of the queries in {influence}: run `make reproduce EXPERIMENT={layout.name}` "
            "first."
        )
    return pd.DataFrame(rows)


def compare_losses(layout: Layout, path: Path) -> dict[str, float]:
    """θ0's losses beside AbU's ``pretrain_loss.npy``, which no unseeded gradient stands between.

    Args:
        layout: an experiment whose θ0 was scanned.
        path: array (2N,), the mean over captions and timesteps.

    Returns:
        The number of ``latents``, ``spearman``, ``mean_difference`` (ours less theirs) and ``largest_difference``.

    Raises:
        UserError: a file is missing or damaged, or of other images.
    """
    if not path.is_file():
        raise UserError(f"--losses {path}: there is no such file; name the release's pretrain_loss.npy.")
    own, theirs = read_arrays(layout.base_scan)["losses"].mean(axis=1, dtype=float), read_array(path)
    if theirs.shape != own.shape or theirs.dtype.kind != "f" or not np.isfinite(theirs).all():
        raise UserError(
            f"{path} has {theirs.dtype} of shape {theirs.shape}, expected finite losses of shape {own.shape}: take the "
            "losses of the release that was imported."
        )
    difference = own - theirs
    found = {"latents": len(own), "spearman": float(spearmanr(own, theirs).statistic)}
    return found | {"mean_difference": difference.mean(), "largest_difference": np.abs(difference).max()}


def _row(published: Published, own: np.ndarray) -> dict:
    theirs = published.scores
    found = {"images": len(own), "spearman": spearmanr(own, theirs).statistic}
    orders = [np.argsort(-scores, kind="stable") for scores in (own, theirs)]
    for top in TOPS:
        common = len(np.intersect1d(*(order[:top] for order in orders)))
        found[f"overlap_{top}"] = common / top if top <= len(own) else np.nan
    return found | {"largest_difference": np.abs(own - theirs).max() if published.full else np.nan}


def _published(layout: Layout, influence: Path, images: int) -> Iterator[Published]:
    """The published scores, query after query, checked."""
    if influence.is_dir():
        yield from _of_folder(layout, influence, images)
        return
    named = re.fullmatch(r"influence_(test|train)\.pkl", influence.name)
    if not named:
        raise UserError(
            f"--influence {influence}: name a folder of influence_<i>.pkl, or a file influence_test.pkl or "
            "influence_train.pkl."
        )
    names, count = _set(layout, named[1])
    content = read_pickle(influence).get("random")
    if not isinstance(content, dict):
        raise UserError(f"{influence} lacks the mapping 'random': download it again.")
    if SUBSETS[0] in content:
        yield from _of_subsets(influence, content, names, images)
        return
    scores = array_of(influence, content, "influence", (None, images))
    orders = array_of(influence, content, "rank", scores.shape)
    _check_count(influence, len(scores), count)
    for query, own, order in zip(names, scores, orders, strict=False):
        yield _full(influence, query, own, order)


def _of_folder(layout: Layout, folder: Path, images: int) -> Iterator[Published]:
    """AbU's files, one for each query."""
    names, _ = _set(layout, None)
    numbers = {
        int(found[1]): path for path in folder.iterdir() if (found := re.fullmatch(r"influence_(\d+)\.pkl", path.name))
    }
    if not numbers:
        raise UserError(f"--influence {folder}: there is no influence_<i>.pkl; name the folder that holds them.")
    for number, path in sorted(numbers.items()):
        if number < len(names):
            content = read_pickle(path)
            yield _full(
                path, names[number], *(array_of(path, content, key, (images,)) for key in ("influence", "rank"))
            )


def _full(path: Path, query: str, scores: np.ndarray, order: np.ndarray) -> Published:
    """Scores of all images, of which ``rank`` must be the order."""
    _check_order(path, query, order, scores, np.arange(len(scores)))
    return Published(query, np.arange(len(scores)), scores.astype(float), True)


def _check_order(path: Path, query: str, order: np.ndarray, scores: np.ndarray, images: np.ndarray) -> None:
    """Refuse an order that does not have each of the images once, or not by falling score.

    Args:
        path: the file.
        query: of which query.
        order: places in ``scores``, most influential first, (n,).
        scores: (n,).
        images: the training images that are ranked, (n,).
    """
    whole = np.array_equal(np.sort(order), np.arange(len(scores))) and len(np.unique(images)) == len(images)
    if not whole or (np.diff(scores[order.astype(np.int64)]) > 0).any():
        raise UserError(
            f"{path} has no ranking for {query} that has each image once, the most influential first: take the scores "
            "of the release that was imported."
        )


def _of_subsets(path: Path, content: dict, names: list[str], images: int) -> Iterator[Published]:
    """FastGDA's scores of some images for each query.

    ``rank`` names them, most influential first; ``rank_influence_subset`` tells where each stands in
    ``influence_subset``.
    """
    scores = array_of(path, content, SUBSETS[0], (None, None))
    places, ranked = (array_of(path, content, key, scores.shape) for key in (SUBSETS[1], "rank"))
    _check_count(path, len(scores), len(names))
    for query, own, place, order in zip(names, scores, places, ranked, strict=False):
        _check_order(path, query, place, own, order)
        if order.min() < 0 or order.max() >= images:
            raise UserError(
                f"{path} ranks image {order.max()} for {query}, the experiment has {images}: take the scores of the "
                "release that was imported."
            )
        yield Published(query, order.astype(np.int64), own[place.astype(np.int64)].astype(float), False)


def _set(layout: Layout, name: str | None) -> tuple[list[str], int]:
    """Names of the experiment's queries of a published set, the only or the named one, and how many there are."""
    entries = [entry for entry in layout.config.synthesize.queries if isinstance(entry, GivenQueries)]
    own = [entry for entry in entries if name is None or entry.name == name]
    if len(own) != 1:
        found = ", ".join(entry.name for entry in entries) or "none"
        wanted = f"the set '{name}'" if name else "one set"
        raise UserError(f"synthesize.queries: expected {wanted} of a release's queries, there is {found}.")
    return own[0].names(), own[0].count


def _check_count(path: Path, found: int, count: int) -> None:
    if found < count:
        raise UserError(
            f"{path} has scores of {found} queries, the experiment has {count}: give the file of its queries."
        )
