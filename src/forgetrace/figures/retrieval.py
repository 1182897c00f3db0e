"""How well each method finds the exemplars of customised models: AP and recall with intervals over models."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from forgetrace.artifacts import read_table
from forgetrace.config import PLAIN
from forgetrace.evaluation.retrieval import ALL, SUBSET, methods
from forgetrace.figures import rows
from forgetrace.figures.style import INK, MUTED, PAPER, look, save
from forgetrace.layout import Layout

WIDTH, MARGIN = 3.2, 0.75  # inches of a panel, and of what is above and below its rows
PLAIN_AT = -0.25  # rows below the middle
METRICS = {"ap": "Average precision", "recall_10_of_ceiling": "Recall@10, of its ceiling"}


def draw(layout: Layout, name: str) -> None:
    """Draw the figure ``retrieval``: a row of panels per kind of model; more where costly methods have ranked.

    Empty markers above are of plain prompts: what is found of exemplars where nobody asked for the concept.
    """
    summary = read_table(layout.table("retrieval"))
    values = read_table(layout.table("retrieval_per_query"))
    values = values[values["manner"] != PLAIN]
    plain, summary = summary[summary["manner"] == PLAIN], summary[summary["manner"] == ALL]
    parts = [(queries, kind) for queries in (ALL, SUBSET) for kind in dict.fromkeys(summary["kind"])]
    parts = [part for part in parts if len(_of(summary, *part))]
    named = [method for method in methods(layout) if (summary["method"] == method).any()]
    with look():
        height = MARGIN + rows.HEIGHT * len(named)
        figure = Figure(figsize=(WIDTH * len(METRICS) + 1.2, height * len(parts) + 0.3), layout="constrained")
        axes = figure.subplots(len(parts), len(METRICS), squeeze=False)
        for i, part in enumerate(parts):
            for j, metric in enumerate(METRICS):
                of_part = _of(summary, *part)
                shown = [method for method in named if (of_part["method"] == method).any()]
                own = of_part[of_part["metric"] == metric]
                dots = values[(values["kind"] == part[1]) & (values["metric"] == metric)]
                dots = dots[dots["subset"] | (part[0] == ALL)].groupby(["method", "model"])["value"].mean()
                rows.dots(axes[i, j], layout, shown, dots.reset_index())
                unasked = _of(plain, *part)
                rows.means(axes[i, j], layout, shown, unasked[unasked["metric"] == metric], PLAIN_AT, filled=False)
                rows.means(axes[i, j], layout, shown, own)
                rows.label(axes[i, j], layout, shown, named=j == 0)
                axes[i, j].set_xlim(-0.02, 1.02)
                axes[i, j].set_title(_title(part, own) if j == 0 else "")
                axes[i, j].set_xlabel(f"{METRICS[metric]} →", color=MUTED)
        interval = Line2D([], [], color=INK, linewidth=2, label="95% interval over models")
        dot = Line2D([], [], color=MUTED, marker="o", markersize=3, linewidth=0, label="one model")
        empty = {"markerfacecolor": PAPER, "markeredgecolor": MUTED}
        unasked = Line2D([], [], marker="o", linewidth=0, label="images of prompts without V*", **empty)
        handles = [interval, dot, *([unasked] if len(plain) else [])]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)
        save(figure, layout, name)


def _of(summary: pd.DataFrame, queries: str, kind: str) -> pd.DataFrame:
    return summary[(summary["queries"] == queries) & (summary["kind"] == kind)]


def _title(part: tuple[str, str], own: pd.DataFrame) -> str:
    queries = "" if part[0] == ALL else ", where costly methods ranked"
    return f"{part[1].capitalize()}s{queries}: {own['n_models'].max()} models, {own['n_queries'].max()} images"
