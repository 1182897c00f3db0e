"""One look for all figures: colours, fonts, and files that repeat byte for byte."""

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib as mpl
from matplotlib.figure import Figure

from forgetrace.artifacts import atomic
from forgetrace.config import LEARNED, RANDOM, SEED_SET
from forgetrace.layout import Layout

DPI = 160
INK, MUTED, FAINT = "#1a1a1a", "#595959", "#d4d4d4"
PAPER = "#f4f4f1"  # behind grids of images, so that a white image shows its edges
RANDOM_COLOUR, SEED_COLOUR = "#6e6e6e", "#8a7a1f"
# Okabe and Ito's colours, told apart with every kind of colour blindness; the light ones, which do not
# carry text on paper, a shade darker.
METHOD_COLOURS = ("#0072B2", "#D55E00", "#00815E", "#B2568A", "#2E8FC7", "#B97A00")
MARKERS = ("o", "s", "D", "^", "v", "P")

RC = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same glyphs on every machine
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.formatter.use_mathtext": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "hatch.linewidth": 0.5,
    "pdf.fonttype": 42,
    "image.composite_image": False,  # merging the tiles of a grid takes seconds
    "savefig.dpi": DPI,
    "figure.dpi": DPI,
}


@contextmanager
def look() -> Iterator[None]:
    """Draw and save inside this block; the user's own matplotlib settings do not leak in."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(RC)
        yield


def save(figure: Figure, layout: Layout, name: str) -> None:
    """Write a figure as PNG and PDF, without the creation date that would change its bytes."""
    metadata = {
        "png": {"Software": None},
        "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    }
    for suffix, fields in metadata.items():
        with atomic(layout.figure(name, suffix)) as temporary:
            figure.savefig(temporary, format=suffix, metadata=fields)


def colour_of(layout: Layout, method: str) -> str:
    """The colour a method has in every figure of the experiment."""
    if method == RANDOM:
        return RANDOM_COLOUR
    if method == SEED_SET:
        return SEED_COLOUR
    return METHOD_COLOURS[_place(layout, method) % len(METHOD_COLOURS)]


def marker_of(layout: Layout, method: str) -> str:
    """The marker a method has in every plot, for readers without colour; a colour's second method has another."""
    if method == RANDOM:
        return MARKERS[0]
    place = _place(layout, method)
    return MARKERS[(place + place // len(METHOD_COLOURS)) % len(MARKERS)]


def _place(layout: Layout, method: str) -> int:
    return [name for name in (*layout.config.score.methods, LEARNED) if name != RANDOM].index(method)
