"""What a partial evaluation keeps of an earlier one: rows of methods whose scores are not here.

Scores are large and in no repository, the tables are: in a clone, one more method is judged by the models of random
halves, and laid beside the others, without scoring all of them again.
"""

from pathlib import Path

import pandas as pd

from forgetrace.artifacts import read_table
from forgetrace.attribution.ranking import has_ranked
from forgetrace.config import CEILING, RANDOM, SEED_SET
from forgetrace.evaluation.lds import METRIC, ORIGINS
from forgetrace.evaluation.statistics import holm
from forgetrace.layout import Layout

PAIR = ["method_a", "method_b"]
# Tables that are taken from scores: the columns that name methods, by which rows are sorted, and what else tells them
# apart.
OF_SCORES = {
    "lds_per_query": (["method"], ["query", "method"], []),
    "lds": (["method"], ["queries", "method"], []),
    "agreement": (PAIR, ["k", *PAIR], []),
    "comparisons": (PAIR, PAIR, []),
    "cost": (["method"], ["method"], []),
    "regions": (["method"], ["query", "method"], ["region", "k", "shared"]),
}


def with_earlier(layout: Layout, tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The tables with the earlier rows, where there are any, about methods of the config that lack scores here.

    Of a row that is there twice, the one of more queries counts. Corrections for the number of methods are made anew.
    A pair of a method that is new with one whose scores are missing is in neither and stays out.

    Args:
        layout: the experiment.
        tables: those just made, by name.
    """
    queries = layout.config.queries()
    missing = [method for method in layout.config.score.methods if not has_ranked(layout, method, queries)]
    for name in OF_SCORES.keys() & tables.keys():
        if missing and Path(layout.table(name)).exists():
            tables = tables | {name: _merged(layout, name, tables[name], missing)}
    return tables


def _merged(layout: Layout, name: str, table: pd.DataFrame, missing: list[str]) -> pd.DataFrame:
    config, others, earlier = layout.config, table.iloc[:0], read_table(layout.table(name))
    if name == "comparisons":  # those of leave-K-out need no scores
        others, table = table[table["metric"] != METRIC], table[table["metric"] == METRIC]
        earlier = earlier[earlier["metric"] == METRIC]
    columns, by, more = OF_SCORES[name]
    origins = {config.origin(query) for query in config.queries()}
    methods = [*sorted(config.score.methods, key=lambda method: method == RANDOM), SEED_SET, CEILING]
    order = {"query": config.queries(), "queries": [origin for origin in ORIGINS if origin in origins]}
    order |= {"k": [0, *sorted({*config.retrain.k, *config.evaluate.precision_k})]} | dict.fromkeys(columns, methods)
    known = earlier[by].isin(order).all(axis=1)
    earlier = earlier[known & earlier[columns].isin(missing).any(axis=1)]
    if earlier.empty:
        return pd.concat([others, table]) if len(others) else table
    # The table of costs has a row of every method, empty where nothing was measured here.
    parts = (earlier, table) if name == "cost" else (table, earlier)
    rows = pd.concat([part for part in parts if len(part)])
    if "n_queries" in rows:
        rows = rows.sort_values("n_queries", ascending=False, kind="stable")
    places = {column: {value: place for place, value in enumerate(values)} for column, values in order.items()}
    rows = rows.drop_duplicates([*by, *more])
    rows = rows.sort_values(by, kind="stable", key=lambda column: column.map(places[column.name]))
    if name == "lds":
        rows["p_vs_random_holm"] = rows.groupby("queries")["p_vs_random"].transform(holm)
    if name == "comparisons":
        rows["p_holm"] = holm(rows["p"].to_numpy())
    return pd.concat([part for part in (others, rows) if len(part)], ignore_index=True)
