"""An image of a customised model and, method by method, the candidates ranked first for it, exemplars with a border."""

import pandas as pd

from forgetrace.artifacts import read_image, read_json, read_table
from forgetrace.attribution.asked import asked, manners_of
from forgetrace.attribution.candidates import exemplar_ids
from forgetrace.config import PLAIN
from forgetrace.datasets.images import TrainingImages
from forgetrace.figures.page import TILE, Page, lines
from forgetrace.figures.style import MUTED, colour_of, look, save
from forgetrace.layout import Layout

MARGIN, GAP, LABEL = 0.25, 0.1, 1.25  # inches
NARROWEST = 7.8  # what the header's lines need
HEADER, ROW, SMALL = 1.75, 1.1, 0.4
BORDER = "#00815E"


def draw(layout: Layout, name: str, query: str) -> None:
    """Draw the figure ``exemplars-<query>``."""
    model = query.rpartition("-")[0]
    record = read_json(layout.customized(model)["record"])
    entry = next(entry for entry in record["queries"] if entry["query"] == query)
    wanted = asked(layout, model, manners_of(record))
    methods = [method for method, queries in wanted.items() if query in queries]
    ranks = read_table(layout.ranks(model))
    ranks = ranks[ranks["query"] == query]
    files, read = read_table(layout.index).set_index("image_id")["file_name"], TrainingImages(layout)
    ids = exemplar_ids(model, len(record["exemplars"]))
    own = {ids[i]: read_image(layout.customized_image(model, f"exemplar-{i:02d}")) for i in range(len(ids))}
    with look():
        top = layout.config.figures.top
        width = max(NARROWEST, 2 * MARGIN + LABEL + top * (TILE + GAP))
        page = Page(width, 2 * MARGIN + HEADER + len(methods) * ROW)
        _header(page, query, entry, read_image(layout.customized_image(model, query)), list(own.values()))
        for i, method in enumerate(methods):
            y = MARGIN + HEADER + i * ROW
            page.rule(MARGIN, page.width - MARGIN, y - 0.15)
            page.text(MARGIN, y + 0.2, method, size=10.5, colour=colour_of(layout, method), weight="bold")
            page.text(MARGIN, y + 0.42, _places(ranks[ranks["method"] == method]), size=8, colour=MUTED)
            table = read_table(layout.retrieved(model, method, query)).nsmallest(top, "rank")
            for j, image in enumerate(table["image_id"]):
                x = MARGIN + LABEL + j * (TILE + GAP)
                if image in own:
                    page.border(x, y, TILE, BORDER)
                page.image(x, y, TILE, own[image] if image in own else read(files[image]))
        save(page.figure, layout, name)


def _header(page: Page, query: str, entry: dict, image, exemplars: list) -> None:
    size = 1.5 * TILE
    page.image(MARGIN, MARGIN, size, image)
    left = MARGIN + size + 0.25
    for i, line in enumerate(lines(f"“{entry['prompt']}”", page.width - left - MARGIN, 13, most=1)):
        page.text(left, MARGIN + 0.02 + 0.25 * i, line, size=13, weight="bold")
    about = ", of a prompt without V*" if entry["manner"] == PLAIN else ""
    said = f"the generated image {query}{about}; its model was customised on"
    page.text(left, MARGIN + 0.3, said, size=9.5, colour=MUTED)
    for i, exemplar in enumerate(exemplars):
        page.border(left + 0.05 + i * (SMALL + 0.12), MARGIN + 0.58, SMALL, BORDER)
        page.image(left + 0.05 + i * (SMALL + 0.12), MARGIN + 0.58, SMALL, exemplar)
    below = "Below: the candidates that each method ranks first; those exemplars have a border."
    page.text(left, MARGIN + 1.12, below, size=9.5)


def _places(ranks: pd.DataFrame) -> str:
    """Where the exemplars come."""
    places = sorted(ranks["rank"])
    first = ", ".join(f"{place}" for place in places[:2])
    return f"found at {first}" + (", …" if len(places) > 2 else "")
