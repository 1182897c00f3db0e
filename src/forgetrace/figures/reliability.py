"""Calibrated probabilities over candidates against the truth, by kind of test model."""

import numpy as np
from matplotlib.figure import Figure

from forgetrace.artifacts import read_table
from forgetrace.figures.style import FAINT, METHOD_COLOURS, MUTED, look, save
from forgetrace.layout import Layout


def draw(layout: Layout, name: str) -> None:
    """Draw the figure ``reliability``."""
    bins, mass = read_table(layout.table("reliability")), read_table(layout.table("calibration"))
    kinds = list(dict.fromkeys(mass["kind"]))
    with look():
        figure = Figure(figsize=(3.4 * len(kinds), 3.4), layout="constrained")
        for i, axes in enumerate(figure.subplots(1, len(kinds), squeeze=False)[0]):
            own, total = bins[bins["kind"] == kinds[i]], mass[mass["kind"] == kinds[i]].iloc[0]
            axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1.2)
            sizes = 12 + 14 * np.log10(own["candidates"])
            axes.scatter(own["probability"], own["truth"], s=sizes, color=METHOD_COLOURS[i], alpha=0.8)
            axes.plot(own["probability"], own["truth"], color=METHOD_COLOURS[i], linewidth=1)
            axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
            axes.set_title(f"{kinds[i].capitalize()}s, {total.n_queries:.0f} images")
            text = f"mass on exemplars {total.mass:.2f}\n[{total.ci_low:.2f}, {total.ci_high:.2f}]"
            axes.text(0.03, 0.97, text, transform=axes.transAxes, va="top", fontsize=8)
            axes.set_xlabel("probability given →", color=MUTED)
            axes.set_ylabel("share of the truth →" if i == 0 else "", color=MUTED)
        save(figure, layout, name)
