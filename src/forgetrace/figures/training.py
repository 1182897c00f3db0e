"""The training curve of θ0: loss and learning rate against optimiser steps."""

import pandas as pd
from matplotlib.figure import Figure

from forgetrace.artifacts import read_table
from forgetrace.figures.style import FAINT, METHOD_COLOURS, MUTED, look, save
from forgetrace.layout import Layout

SMOOTHED_SHARE = 0.05  # the smoothed line is a running median over this share of the curve


def draw(layout: Layout, name: str) -> None:
    """Draw the figure ``training``."""
    curve = read_table(layout.curve)
    with look():
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        loss.plot(curve["step"], curve["loss"], color=FAINT, linewidth=0.8, label="every recorded step")
        loss.plot(
            curve["step"],
            _smoothed(curve["loss"]),
            color=METHOD_COLOURS[0],
            linewidth=1.8,
            label="running median",
        )
        loss.set_yscale("log")
        loss.set_ylabel("training loss")
        loss.set_title(f"Training of θ0, experiment {layout.name}")
        loss.grid(axis="y", which="both")
        loss.set_axisbelow(True)
        loss.legend(loc="upper right")
        rate.plot(curve["step"], curve["learning_rate"], color=MUTED, linewidth=1.4)
        rate.set_ylabel("learning rate")
        rate.set_xlabel("optimiser step")
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        rate.set_ylim(bottom=0)
        rate.set_xlim(0, curve["step"].max())
        figure.align_ylabels()
        save(figure, layout, name)


def _smoothed(loss: pd.Series) -> pd.Series:
    window = max(1, round(len(loss) * SMOOTHED_SHARE))
    return loss.rolling(window, center=True, min_periods=1).median()
