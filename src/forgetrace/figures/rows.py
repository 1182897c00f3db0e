"""Methods as rows of a panel, each with its mean and interval: room for as many as there are."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from forgetrace.figures.style import INK, PAPER, colour_of, marker_of
from forgetrace.layout import Layout

HEIGHT = 0.27  # inches of a row


def label(axes: Axes, layout: Layout, methods: list[str], named: bool = True) -> None:
    """Set up the rows, the first method on top, and name each in its colour unless the panel to the left does."""
    axes.set_yticks(range(len(methods)), methods if named else [""] * len(methods))
    for text, method in zip(axes.get_yticklabels(), methods, strict=True):
        text.set_color(colour_of(layout, method))
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def means(
    axes: Axes, layout: Layout, methods: list[str], summary: pd.DataFrame, offset: float = 0.0, filled: bool = True
) -> None:
    """Draw a marker and an interval per method.

    Args:
        axes: the panel.
        layout: the experiment.
        methods: those of the rows.
        summary: columns method, mean, ci_low, ci_high; methods without a row are left out.
        offset: how far below the middle of its row, in rows.
        filled: a full or an empty marker.
    """
    for row in summary[summary["method"].isin(methods)].itertuples():
        y, colour = methods.index(row.method) + offset, colour_of(layout, row.method)
        if np.isfinite(row.ci_low):
            axes.plot([row.ci_low, row.ci_high], [y, y], color=colour, linewidth=2.0)
        edges = {"markeredgecolor": "white"} if filled else {"markeredgecolor": colour, "markerfacecolor": PAPER}
        axes.plot(row.mean, y, marker_of(layout, row.method), color=colour, markersize=6.5, **edges)


def dots(axes: Axes, layout: Layout, methods: list[str], values: pd.DataFrame) -> None:
    """Draw a dot per query below the mean; columns method, value."""
    for method, own in values[values["method"].isin(methods)].groupby("method"):
        y = np.full(len(own), methods.index(method) + 0.25)
        axes.scatter(own["value"], y, s=7, color=colour_of(layout, method), alpha=0.4, linewidths=0)


def note(axes: Axes, row: int, text: str) -> None:
    """Write behind a row, to the right of the panel."""
    place = {"xy": (1, row), "xycoords": ("axes fraction", "data"), "xytext": (4, 0), "textcoords": "offset points"}
    axes.annotate(text, **place, va="center", fontsize=6.5, color=INK)
