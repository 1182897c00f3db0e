"""A query with the outlines of its regions, and the training images ranked first for each of them."""

import numpy as np

from forgetrace.artifacts import read_image, read_json, read_table
from forgetrace.datasets.images import TrainingImages
from forgetrace.diffusion.regions import region_of
from forgetrace.figures.attribution import GAP, MARGIN, ROW, ranked_first, row, title
from forgetrace.figures.page import TILE, Page
from forgetrace.figures.style import MUTED, colour_of, look, save
from forgetrace.layout import Layout

LABEL = 1.6  # inches
HEADER, TITLE = 1.55, 0.32  # inches
OUTLINES = ("#D55E00", "#0072B2", "#00815E", "#B2568A", "#B97A00", "#6e6e6e")  # of the regions


def draw(layout: Layout, name: str, query: str) -> None:
    """Draw the figure ``regions-<query>``."""
    config, regions = layout.config, layout.config.regions_of(query)
    record, image = read_json(layout.query(query)["record"]), read_image(layout.query(query)["image"])
    index, read = read_table(layout.index).set_index("image_id"), TrainingImages(layout)
    colours = {region: OUTLINES[i % len(OUTLINES)] for i, region in enumerate(regions)}
    masks = {region: region_of(layout, own) for region, own in regions.items()}
    block = TITLE + (1 + len(regions)) * ROW
    with look():
        width = 2 * MARGIN + LABEL + config.figures.top * (TILE + GAP) - GAP
        page = Page(max(width, 6.0), 2 * MARGIN + HEADER + len(config.score.methods) * block - 0.1)
        _header(page, record["prompt"], query, image, masks, colours)
        for i, method in enumerate(config.score.methods):
            top = MARGIN + HEADER + i * block
            page.text(MARGIN, top - 0.06, method, size=10.5, colour=colour_of(layout, method), weight="bold")
            for j, (region, own) in enumerate({**regions, "whole image": query}.items()):
                ranked = ranked_first(layout, method, own, index, read)
                row(page, top + TITLE + j * ROW, region, colours.get(region, MUTED), ranked, LABEL)
        save(page.figure, layout, name)


def _header(
    page: Page, prompt: str, query: str, image: np.ndarray, masks: dict[str, np.ndarray], colours: dict[str, str]
) -> None:
    size = 1.5 * TILE
    # The image's own proportions: a wide one is as high as a tile and a half allows.
    longer = size * max(image.shape[:2]) / image.shape[0]
    page.image(MARGIN, MARGIN, longer, image)
    pixel = size / image.shape[0]
    for region, inside in masks.items():
        page.outline(MARGIN, MARGIN, pixel, inside, colours[region])
    below = "Below: the training images ranked first for each region and for the whole image, with their scores."
    left = MARGIN + pixel * image.shape[1] + 0.25
    title(page, left, prompt, f"the generated image {query} and its regions", below)
