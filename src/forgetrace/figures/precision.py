"""How many top-ranked images share a region's content, how many that of the other region, and what chance gives."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from forgetrace.artifacts import read_table
from forgetrace.figures import rows
from forgetrace.figures.style import INK, MUTED, PAPER, look, save
from forgetrace.layout import Layout

KINDS = {"own": ("o", 0.0, True), "other": ("s", 0.22, False), "whole": ("D", 0.44, True)}
LABELS = {"own": "shares the region's", "other": "shares the other side's", "whole": "whole image: shares the region's"}


def draw(layout: Layout, name: str) -> None:
    """Draw the figure ``precision``: a row of panels per K, a panel for digit, ink and both."""
    table = read_table(layout.table("regions_summary"))
    methods, ks = table["method"].unique().tolist(), sorted(table["k"].unique())
    shared = table["shared"].unique().tolist()
    with look():
        size = (3.4 * len(shared) + 1.2, 0.9 + len(ks) * (0.8 + 2 * rows.HEIGHT * len(methods)))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(ks), len(shared), squeeze=False, sharex=True)
        for k, of_k in zip(ks, grid, strict=True):
            for what, axes in zip(shared, of_k, strict=True):
                _panel(axes, layout, methods, table[(table["k"] == k) & (table["shared"] == what)])
                rows.label(axes, layout, methods, named=axes is of_k[0])
                axes.set_title(f"{what}, top {k}")
                axes.set_xlabel("share of the top-ranked images")
        figure.legend(handles=_legend(), loc="outside lower center", ncols=4, fontsize=8)
        save(figure, layout, name)


def _panel(axes: Axes, layout: Layout, methods: list[str], table) -> None:
    for kind, (marker, offset, filled) in KINDS.items():
        for entry in table.to_dict("records"):
            y, colour = methods.index(entry["method"]) + offset - 0.22, rows.colour_of(layout, entry["method"])
            axes.plot([entry[f"{kind}_low"], entry[f"{kind}_high"]], [y, y], color=colour, linewidth=1.6)
            face = colour if filled else PAPER
            axes.plot(entry[kind], y, marker, color=colour, markerfacecolor=face, markersize=5)
    axes.axvline(table["chance"].mean(), color=MUTED, linestyle="--", linewidth=1)


def _legend() -> list[Line2D]:
    handles = [
        Line2D([], [], color=INK, marker=marker, markerfacecolor=INK if filled else PAPER, label=LABELS[kind])
        for kind, (marker, _, filled) in KINDS.items()
    ]
    return [*handles, Line2D([], [], color=MUTED, linestyle="--", label="chance")]
