"""A query and, method by method, the training images ranked first for it."""

import textwrap
from dataclasses import dataclass

import numpy as np
import pandas as pd

from forgetrace.artifacts import UserError, read_image, read_json, read_table
from forgetrace.datasets.images import TrainingImages
from forgetrace.figures.page import TILE, Page, lines
from forgetrace.figures.style import MUTED, colour_of, look, save
from forgetrace.layout import Layout

MARGIN, GAP, LABEL = 0.25, 0.1, 1.15  # inches
CAPTION_WIDTH, CAPTION_LINES = 15, 3  # what fits under a tile
HEADER, ROW = 1.55, 1.55  # inches


@dataclass(frozen=True)
class Ranked:
    """One training image in a row: its pixels (height, width, 3), uint8, score and shortened caption."""

    pixels: np.ndarray
    score: float
    caption: str


def draw(layout: Layout, name: str, query: str) -> None:
    """Draw the figure ``attribution-<query>``."""
    record = read_json(layout.query(query)["record"])
    index = read_table(layout.index).set_index("image_id")
    read = TrainingImages(layout)
    rows = {method: ranked_first(layout, method, query, index, read) for method in layout.config.score.methods}
    longest = max(len(row) for row in rows.values())
    with look():
        label = max(LABEL, *(0.25 + 0.1 * len(method) for method in rows))
        width = 2 * MARGIN + label + longest * (TILE + GAP) - GAP
        page = Page(max(width, 6.0), 2 * MARGIN + HEADER + len(rows) * ROW - 0.1)
        _header(page, query, record["prompt"], read_image(layout.query(query)["image"]))
        for i, (method, ranked) in enumerate(rows.items()):
            row(page, MARGIN + HEADER + i * ROW, method, colour_of(layout, method), ranked, label)
        save(page.figure, layout, name)


def _header(page: Page, query: str, prompt: str, image: np.ndarray) -> None:
    size = 1.5 * TILE
    page.image(MARGIN, MARGIN, size, image)
    below = "Below: the training images that each method ranks first, from the left, with their scores."
    title(page, MARGIN + size + 0.25, prompt, f"the generated image {query}", below)


def title(page: Page, left: float, prompt: str, subtitle: str, below: str) -> None:
    """Write a query's prompt, what the image is and what stands below it, ``left`` inches from the edge."""
    top, width = MARGIN + 0.05, page.width - MARGIN - left
    for line in lines(f"“{prompt}”", width, 13, most=2):
        page.text(left, top, line, size=13, weight="bold")
        top += 0.25
    page.text(left, top + 0.08, subtitle, size=9.5, colour=MUTED)
    page.text(left, top + 0.42, "\n".join(lines(below, width, 8)), size=9.5)


def row(page: Page, y: float, title: str, colour: str, ranked: list[Ranked], label: float = LABEL) -> None:
    """Draw images side by side, y inches from the top, behind a title that has ``label`` inches."""
    page.rule(MARGIN, page.width - MARGIN, y - 0.12)
    page.text(MARGIN, y + TILE / 2, title, size=10.5, colour=colour, weight="bold", middle=True)
    for i, entry in enumerate(ranked):
        x = MARGIN + label + i * (TILE + GAP)
        height, width = entry.pixels.shape[:2]
        page.image(x, y + TILE * (1 - height / max(height, width)), TILE, entry.pixels)  # its lower edge on its score
        centre = x + TILE / 2
        page.text(centre, y + TILE + 0.05, _number(entry.score), size=7.5, align="center")
        page.text(centre, y + TILE + 0.19, entry.caption, size=7.0, align="center", colour=MUTED)


def ranked_first(layout: Layout, method: str, query: str, index: pd.DataFrame, read: TrainingImages) -> list[Ranked]:
    """The images a method ranks first, in order of rank."""
    path = layout.score(method, query)
    top = read_table(path).nsmallest(layout.config.figures.top, "rank")
    if unknown := [image for image in top["image_id"] if image not in index.index]:
        raise UserError(f"{path} ranks the image {unknown[0]}, which {layout.index} lacks: delete it and run again.")
    common = _words_of_all(index["caption"])
    return [
        Ranked(
            read(index.at[row.image_id, "file_name"]),
            row.score,
            _short(index.at[row.image_id, "caption"], common),
        )
        for row in top.itertuples()
    ]


def _number(score: float) -> str:
    """Three digits; a zero has no sign."""
    return f"{score + 0.0:.3g}".replace("-", "−")


def _words_of_all(captions: pd.Series) -> set[str]:
    """Words that every caption has: they tell nothing about an image."""
    return set.intersection(*(set(caption.split()) for caption in captions))


def _short(caption: str, leave_out: set[str]) -> str:
    """A caption without the given words, wrapped to a few short lines."""
    words = " ".join(word for word in caption.split() if word not in leave_out)
    return textwrap.fill(words or caption, CAPTION_WIDTH, max_lines=CAPTION_LINES, placeholder=" …")
