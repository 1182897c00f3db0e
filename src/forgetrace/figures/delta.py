"""What removing top-ranked images did: three metrics against K, method by method; of regions, inside and outside.

A few methods stand side by side above each K; many, or two of one colour, have a row each, in a panel per K.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from forgetrace.artifacts import read_table
from forgetrace.config import RANDOM, SEED_SET
from forgetrace.evaluation.metrics import METRICS, REGION_METRICS
from forgetrace.figures import rows
from forgetrace.figures.style import INK, MUTED, colour_of, look, marker_of, save
from forgetrace.layout import Layout

SHOWN = ("delta_loss", "delta_mse", "similarity")
OF_REGIONS = ("delta_loss_inside", "delta_loss_outside", "delta_mse_inside", "delta_mse_outside")
LABELLED = METRICS | REGION_METRICS
SIDE_BY_SIDE = 6  # methods; more have a row each
SPREAD = 0.6  # share of the space between two K over which the methods stand side by side


def draw(layout: Layout, name: str) -> None:
    """Draw the figure ``delta``."""
    summary, values = read_table(layout.table("counterfactual")), read_table(layout.table("per_query"))
    shown = [
        metric
        for metric in (OF_REGIONS if layout.config.synthesize.regions else SHOWN)
        if (summary["metric"] == metric).any()
    ]
    methods = _measured(layout, summary)
    apart = len({colour_of(layout, method) for method in methods}) == len(methods)
    with look():
        if apart and len(methods) <= SIDE_BY_SIDE:
            figure = _side_by_side(layout, shown, summary, values)
        else:
            figure = _in_rows(layout, shown, methods, summary, values)
        save(figure, layout, name)


def _measured(layout: Layout, summary: pd.DataFrame) -> list[str]:
    """The judged methods but random: all of them, unless the evaluation was partial."""
    found = set(summary["method"])
    return [method for method in layout.config.retrain.methods if method != RANDOM and method in found]


def _side_by_side(layout: Layout, shown: list[str], summary: pd.DataFrame, values: pd.DataFrame) -> Figure:
    """A panel per metric."""
    figure = Figure(figsize=(3.6 * len(shown) + 0.2, 4.0), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, metric in zip(panels, shown, strict=True):
        _panel(axes, layout, metric, summary[summary["metric"] == metric], values[values["metric"] == metric])
    figure.legend(handles=_legend(layout, summary), loc="outside lower center", ncols=6, fontsize=8)
    return figure


def _in_rows(
    layout: Layout, shown: list[str], methods: list[str], summary: pd.DataFrame, values: pd.DataFrame
) -> Figure:
    """A panel per K and metric, whose rows are sorted by ΔL at the smallest K."""
    ks, losses = sorted(layout.config.retrain.k), summary[summary["metric"] == "delta_loss"]
    order = losses[losses["k"] == ks[0]].set_index("method")["mean"].reindex(methods)
    methods = order.sort_values(ascending=False, kind="stable").index.tolist()
    size = (3.6 * len(shown) + 1.5, 0.9 + len(ks) * (0.75 + rows.HEIGHT * len(methods)))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(ks), len(shown), squeeze=False, sharex="col")
    for k, of_k in zip(ks, grid, strict=True):
        for axes, metric in zip(of_k, shown, strict=True):
            own = summary[(summary["metric"] == metric) & summary["k"].isin([k, 0])]
            for row in own[own["method"].isin([RANDOM, SEED_SET])].itertuples():
                _upright_band(axes, row, _band_style(layout, row.method))
            rows.dots(axes, layout, methods, values[(values["metric"] == metric) & (values["k"] == k)])
            rows.means(axes, layout, methods, own)
            for row in own[own["method"].isin(methods)].itertuples():
                rows.note(axes, methods.index(row.method), f"{row.p_vs_random_holm:.2g}")
            rows.label(axes, layout, methods, named=axes is of_k[0])
            axes.set_title(f"{LABELLED[metric].label}, K = {k}")
            axes.set_xlabel("more forgotten →" if LABELLED[metric].forgotten > 0 else "← more forgotten", color=MUTED)
    handles = _legend(layout, summary)[-len(_bands(summary)) - 2 :]
    handles[-1].set_label("95% interval (right: p against random, Holm)")
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _upright_band(axes: Axes, row, style: dict) -> None:
    """The mean of random or other-seed models as an upright line, its interval as a band."""
    if np.isfinite(row.ci_low):
        axes.axvspan(row.ci_low, row.ci_high, **style)
    axes.axvline(row.mean, linestyle="--" if style["hatch"] else "-", color=style["edgecolor"], linewidth=1.4)


def _panel(axes: Axes, layout: Layout, metric: str, summary: pd.DataFrame, values: pd.DataFrame) -> None:
    ks = sorted(layout.config.retrain.k)
    methods = _measured(layout, summary)
    for row in summary[summary["method"] == SEED_SET].itertuples():
        _band(axes, row, -0.5, len(ks) - 0.5, _band_style(layout, SEED_SET))
    for row in summary[summary["method"] == RANDOM].itertuples():
        place = ks.index(row.k)
        _band(axes, row, place - 0.5, place + 0.5, _band_style(layout, RANDOM))
    for i, method in enumerate(methods):
        offset = SPREAD * ((i + 0.5) / len(methods) - 0.5)
        _method(axes, layout, method, offset, ks, summary, values)
    axes.margins(y=0.08)
    _p_values(axes, layout, methods, ks, summary)
    axes.set_title(LABELLED[metric].label)
    # Turned by 90°, the arrow points where the query is forgotten.
    axes.set_ylabel("more forgotten →" if LABELLED[metric].forgotten > 0 else "← more forgotten", color=MUTED)
    axes.set_xlabel("training images left out")
    axes.set_xticks(range(len(ks)), [f"K = {k}" for k in ks])
    axes.set_xlim(-0.5, len(ks) - 0.5)
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _band(axes: Axes, row, left: float, right: float, style: dict) -> None:
    """The mean of random or other-seed models as a line, its interval as a band."""
    if np.isfinite(row.ci_low):
        axes.fill_between([left, right], row.ci_low, row.ci_high, **style)
    dashes = "--" if style["hatch"] else "-"
    axes.plot([left, right], [row.mean, row.mean], dashes, color=style["edgecolor"], linewidth=1.4)


def _band_style(layout: Layout, method: str) -> dict:
    """Random is a plain band, other seeds a hatched one: the two often overlap."""
    colour = colour_of(layout, method)
    face = to_rgba(colour, 0.25) if method == RANDOM else "none"
    return {
        "facecolor": face,
        "edgecolor": colour,
        "hatch": None if method == RANDOM else "///",
        "linewidth": 0,
    }


def _method(
    axes: Axes,
    layout: Layout,
    method: str,
    offset: float,
    ks: list[int],
    summary: pd.DataFrame,
    values: pd.DataFrame,
) -> None:
    """One method: a dot per query, mean and interval per K."""
    colour, marker = colour_of(layout, method), marker_of(layout, method)
    for row in summary[summary["method"] == method].itertuples():
        x = ks.index(row.k) + offset
        dots = values[(values["method"] == method) & (values["k"] == row.k)].sort_values("query")["value"]
        axes.scatter(np.full(len(dots), x - 0.05), dots, s=9, color=colour, alpha=0.45, linewidths=0)
        if np.isfinite(row.ci_low):
            axes.plot([x, x], [row.ci_low, row.ci_high], color=colour, linewidth=2.0)
        axes.plot(x, row.mean, marker, color=colour, markersize=7, markeredgecolor="white")


def _p_values(axes: Axes, layout: Layout, methods: list[str], ks: list[int], summary: pd.DataFrame) -> None:
    """Write Holm's p against random above each K, one line per method, in room made above the data."""
    line = 0.05  # of the height of the panel
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + (high - low) * line * len(methods))
    for i, method in enumerate(methods):
        for row in summary[summary["method"] == method].itertuples():
            axes.annotate(
                f"{method}: {row.p_vs_random_holm:.2g}" if len(ks) == 1 else f"p = {row.p_vs_random_holm:.2g}",
                xy=(ks.index(row.k), 1.0 - line * i),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="top",
                fontsize=7,
                color=colour_of(layout, method),
            )


def _bands(summary: pd.DataFrame) -> dict[str, str]:
    """What is drawn as a band, with its label."""
    labels = {RANDOM: "random images", SEED_SET: "nothing left out, other seeds"}
    return {method: label for method, label in labels.items() if (summary["method"] == method).any()}


def _legend(layout: Layout, summary: pd.DataFrame) -> list:
    """A handle per method, band and dot."""
    handles: list = []
    for method in _measured(layout, summary):
        look_of = {"color": colour_of(layout, method), "marker": marker_of(layout, method)}
        handles.append(Line2D([], [], markeredgecolor="white", markersize=7, label=method, **look_of))
    handles += [Patch(**_band_style(layout, method), label=label) for method, label in _bands(summary).items()]
    dot = Line2D([], [], color=MUTED, marker="o", markersize=3, linewidth=0, label="one query")
    interval = Line2D([], [], color=INK, linewidth=2, label="95% interval (above: p against random, Holm)")
    return [*handles, dot, interval]
