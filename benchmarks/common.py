"""``python -m benchmarks.common CONFIG``: what the digits that methods rank first have in common with the prompt.

By method, mean over the reported queries: the share of the top K whose caption agrees with the prompt in the weight of
the stroke, ink, digit, slant and background; the share of the top K that another query's top K holds too. Random images
have the shares of the row ``random``. It looks at rankings alone and so needs no retraining; whether images that agree
with the prompt are influential it cannot say.
"""

import argparse
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from forgetrace.artifacts import UserError, read_json, read_table
from forgetrace.attribution.ranking import has_ranked, read_ranking
from forgetrace.datasets.digits import BACKGROUNDS, DIGITS, INKS, SLANTS, WEIGHTS
from forgetrace.datasets.prepare import read_metadata
from forgetrace.layout import Layout, load_layout

WORDS = {"weight": WEIGHTS, "ink": INKS, "digit": DIGITS, "slant": SLANTS, "background": BACKGROUNDS}


def described(caption: str) -> list[str]:
    """What a caption of the digits says, in the order of ``WORDS``.

    Raises:
        UserError: it is another caption.
    """
    found = [next((word for word in words if f" {word} " in caption), None) for words in WORDS.values()]
    if None in found:
        raise UserError(f"'{caption}' is no caption of the dataset digits, which this table is of.")
    return found


def in_common(layout: Layout, k: int) -> pd.DataFrame:
    """A row per method that has ranked for all reported queries; shares in [0, 1]."""
    ids = read_table(layout.index)["image_id"].tolist()
    said = {row["id"]: described(row["text"]) for row in read_metadata(layout.metadata)}
    queries, rows = layout.config.reported_queries(), {}
    for method in layout.config.score.methods:
        if not has_ranked(layout, method, queries):
            continue
        tops, shares = [], []
        for query in queries:
            ranks = read_ranking(layout, method, query, ids)["rank"]
            tops.append(set(ranks.index[ranks <= k]))
            prompt = described(read_json(layout.query(query)["record"])["prompt"])
            shares.append(np.mean([np.equal(said[image], prompt) for image in tops[-1]], axis=0))
        again = np.mean([len(one & other) / k for one, other in combinations(tops, 2)])
        rows[method] = [*np.mean(shares, axis=0), again]
    return pd.DataFrame.from_dict(rows, orient="index", columns=[*WORDS, "other query"])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--k", type=int, default=200)
    arguments = parser.parse_args()
    print(in_common(load_layout(arguments.config), arguments.k).to_string(float_format="{:.2f}".format))


if __name__ == "__main__":
    main()
