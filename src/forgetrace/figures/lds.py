"""How well the scores of each method foretell losses of models of random halves, and what pools of its tops did."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from forgetrace.artifacts import UserError, read_table
from forgetrace.config import CEILING, SEED_SET
from forgetrace.evaluation.metrics import METRICS
from forgetrace.figures import rows
from forgetrace.figures.style import INK, MUTED, PAPER, SEED_COLOUR, look, save
from forgetrace.layout import Layout

WIDTH, MARGIN = 4.4, 1.3  # inches of a panel, and of what is above and below its rows


def draw(layout: Layout, name: str) -> None:
    """Draw the figure ``lds``."""
    summary, values = read_table(layout.table("lds")), read_table(layout.table("lds_per_query"))
    if summary.empty:
        raise UserError(f"{layout.table('lds')} has no rows: train a half and run `evaluate` again.")
    pool = summary["queries"].iloc[0]  # the reported queries where there are any
    summary, values = summary[summary["queries"] == pool], values[values["queries"] == pool]
    methods = summary[~summary["method"].isin([SEED_SET, CEILING])]
    methods = methods.sort_values("mean", ascending=False, kind="stable")["method"].tolist()
    # A single pool has no controls to compare its targets with.
    pooled = read_table(layout.table("pooled")) if layout.config.retrain.pools > 1 else None
    pooled = None if pooled is not None and pooled.empty else pooled  # none has been trained yet
    with look():
        panels = 1 if pooled is None else 2
        size = (WIDTH * panels + 0.8, MARGIN + rows.HEIGHT * len(methods))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        _score(axes[0], layout, methods, summary, values)
        handles = _legend(summary)
        if pooled is not None:
            handles += _pooled(axes[1], layout, methods, pooled)
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)
        save(figure, layout, name)


def _score(axes: Axes, layout: Layout, methods: list[str], summary: pd.DataFrame, values: pd.DataFrame) -> None:
    for row in summary[summary["method"] == CEILING].itertuples():
        axes.axvspan(row.ci_low, row.ci_high, **_band())
        axes.axvline(row.mean, color=SEED_COLOUR, linewidth=1.4)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    rows.dots(axes, layout, methods, values.rename(columns={"lds": "value"}))
    rows.means(axes, layout, methods, summary)
    rows.label(axes, layout, methods)
    # Rows of an earlier evaluation may rest on fewer.
    halves = "–".join(str(int(count)) for count in sorted({summary["halves"].min(), summary["halves"].max()}))
    axes.set_title(f"Linear datamodeling score, {halves} halves")
    axes.set_xlabel("rank correlation of foretold and true losses →", color=MUTED)


def _pooled(axes: Axes, layout: Layout, methods: list[str], pooled: pd.DataFrame) -> list[Line2D]:
    """Rise of the targets' loss less that of the controls; handles of its K."""
    ks, handles = sorted(layout.config.retrain.pooled_k), []
    pooled = pooled[pooled["metric"] == "delta_loss"].rename(columns={"difference": "mean"})
    axes.axvline(0, color=MUTED, linewidth=0.8)
    for i, k in enumerate(ks):
        offset, filled = 0.5 * ((i + 0.5) / len(ks) - 0.5), i == 0
        rows.means(axes, layout, methods, pooled[pooled["k"] == k].dropna(subset="mean"), offset, filled)
        face = {} if filled else {"markerfacecolor": PAPER}
        handles.append(Line2D([], [], color=MUTED, marker="o", linewidth=0, label=f"pools of top {k}", **face))
    rows.label(axes, layout, methods, named=False)
    axes.set_title("Pools left out: targets less controls")
    axes.set_xlabel(f"{METRICS['delta_loss'].label} →", color=MUTED)
    return handles


def _band() -> dict:
    return {"facecolor": to_rgba(SEED_COLOUR, 0.2), "linewidth": 0}


def _legend(summary: pd.DataFrame) -> list:
    handles: list = [
        Line2D([], [], color=INK, linewidth=2, label="95% interval"),
        Line2D([], [], color=MUTED, marker="o", markersize=3, linewidth=0, label="one query"),
    ]
    if (summary["method"] == CEILING).any():
        handles.append(Patch(**_band(), label="ceiling: knowing the expected losses"))
    return handles
