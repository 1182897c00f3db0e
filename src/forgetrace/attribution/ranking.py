"""From scores to a ranking, with ties broken by image id so that every machine ranks alike."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from forgetrace.artifacts import UserError, read_table
from forgetrace.layout import Layout


def rank(image_ids: list[str], scores: np.ndarray) -> pd.DataFrame:
    """Sort by descending score.

    Args:
        image_ids: N ids in index order.
        scores: shape (N,), larger = more influential.

    Returns:
        Table image_id, score, rank; rank 1 first.

    Raises:
        UserError: a score is NaN or infinite.
    """
    if not np.isfinite(scores).all():
        bad = image_ids[int(np.flatnonzero(~np.isfinite(scores))[0])]
        raise UserError(
            f"The score of image {bad} is not finite: what it was computed from is damaged, delete and rebuild that."
        )
    table = pd.DataFrame({"image_id": image_ids, "score": scores})
    table = table.sort_values(["score", "image_id"], ascending=[False, True], ignore_index=True)
    table["rank"] = np.arange(1, len(table) + 1)
    return table


def has_ranked(layout: Layout, method: str, queries: Iterable[str]) -> bool:
    """Whether a method's score tables of all these queries are there."""
    return all(Path(layout.score(method, query)).exists() for query in queries)


def read_ranking(layout: Layout, method: str, query: str, image_ids: list[str]) -> pd.DataFrame:
    """What a method's ``score`` stage left of a query, in index order.

    Args:
        layout: the experiment.
        method: a method of the experiment.
        query: a query of the experiment.
        image_ids: N ids in index order.

    Returns:
        Columns score and rank, N rows named by image id.

    Raises:
        UserError: the file is missing or damaged, or ranks other images.
    """
    path = layout.score(method, query)
    ranking = read_table(path).set_index("image_id")
    if sorted(ranking.index) != sorted(image_ids):
        raise UserError(f"{path} ranks other images than the experiment trains on: delete it and run again.")
    return ranking.loc[image_ids]
