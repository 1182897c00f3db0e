"""What unlearning does to the images: the forgotten queries, and others that it should leave alone."""

import numpy as np

from forgetrace.artifacts import read_arrays
from forgetrace.figures.page import TILE, Page
from forgetrace.figures.style import MUTED, look, save
from forgetrace.layout import Layout

MARGIN, GAP, LABEL, BETWEEN, HEADER = 0.25, 0.06, 1.25, 0.3, 0.5  # inches
SHOWN = 6  # queries, and others


def draw(layout: Layout, name: str) -> None:
    """Draw the figure ``unlearning``: a row of images by θ0, then one per variant."""
    found = {variant: read_arrays(layout.regenerated(variant)) for variant in layout.config.unlearn}
    first = next(iter(found.values()))
    rows = {"before": (first["targets"], first["others"])}
    rows |= {variant: (of["targets_unlearned"], of["others_unlearned"][0]) for variant, of in found.items()}
    queries, others = (min(SHOWN, len(first[key])) for key in ("targets", "others"))
    right = MARGIN + LABEL + queries * (TILE + GAP) + BETWEEN
    with look():
        height = 2 * MARGIN + HEADER + len(rows) * (TILE + GAP)
        page = Page(right + others * (TILE + GAP) + MARGIN, height)
        forgotten = layout.config.forgotten_queries()[0]
        page.text(MARGIN + LABEL, MARGIN, "queries, each forgotten on its own", size=9.5, colour=MUTED)
        page.text(right, MARGIN, f"other images, with {forgotten} forgotten", size=9.5, colour=MUTED)
        for i, (label, (of_queries, of_others)) in enumerate(rows.items()):
            y = MARGIN + HEADER + i * (TILE + GAP)
            page.text(MARGIN, y + TILE / 2, label, size=10, weight="bold", middle=True)
            _row(page, MARGIN + LABEL, y, of_queries[:queries])
            _row(page, right, y, of_others[:others])
        save(page.figure, layout, name)


def _row(page: Page, x: float, y: float, images: np.ndarray) -> None:
    for i, pixels in enumerate(images):
        page.image(x + i * (TILE + GAP), y, TILE, pixels)
