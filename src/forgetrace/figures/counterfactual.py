"""A query regenerated, from the same noise and prompt, by models retrained without some images."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from forgetrace.artifacts import UserError, read_image, read_json, read_table
from forgetrace.config import RANDOM, SEED_SET
from forgetrace.figures.page import TILE, Page, lines
from forgetrace.figures.style import INK, MUTED, colour_of, look, save
from forgetrace.layout import Layout

MARGIN, GAP, GROUP_GAP = 0.25, 0.14, 0.38  # inches
SIZE = 1.25 * TILE
HEADER, ROW = 0.75, 1.95  # inches
OF_LOSSES = "How much the loss of this image rises in models retrained without some training images."
SUBTITLES = {
    "pool": "The same prompt and noise, drawn again by models retrained without some training images.",
    "file": OF_LOSSES,
    "release": OF_LOSSES,
}


@dataclass(frozen=True)
class _Group:
    """Models that share a heading, side by side."""

    title: str
    colour: str
    models: list[tuple[str, int, str]]


def draw(layout: Layout, name: str, query: str) -> None:
    """Draw the figure ``counterfactual-<query>``."""
    record = read_json(layout.query(query)["record"])
    original = read_image(layout.query(query)["image"])
    values = _values(layout, query)
    rows = {k: _groups(layout, query, k) for k in sorted(layout.config.retrain.k)}
    widest = max(_width(groups) for groups in rows.values())
    with look():
        width = max(2 * MARGIN + SIZE + widest, 6.0)
        prompt = lines(f"“{record['prompt']}”", width - 2 * MARGIN, 12)
        more = (len(prompt) - 1) * 0.23
        page = Page(width, 2 * MARGIN + HEADER + more + len(rows) * ROW - 0.2)
        page.text(MARGIN, MARGIN - 0.02, "\n".join(prompt), size=12, weight="bold")
        page.text(MARGIN, MARGIN + 0.26 + more, SUBTITLES[record["source"]], size=9, colour=MUTED)
        for i, groups in enumerate(rows.values()):
            _row(page, layout, query, MARGIN + HEADER + more + i * ROW, original, groups, values)
        save(page.figure, layout, name)


def _groups(layout: Layout, query: str, k: int) -> list[_Group]:
    """The row of one K: a group per method, then random's draws, then other seeds."""
    models = layout.measured_models(query)
    methods = [method for method in layout.config.retrain.methods if method != RANDOM]
    groups = [_Group(f"without top {k}\nof {m}", colour_of(layout, m), [(m, k, query)]) for m in methods]
    for method, title in ((RANDOM, f"without {k}\nat random"), (SEED_SET, "nothing removed,\nanother seed")):
        shared = [model for model in models if model[0] == method and model[1] in (k, 0)]
        if shared:
            groups.append(_Group(title, colour_of(layout, method), shared))
    return groups


def _width(groups: list[_Group]) -> float:
    return sum(GROUP_GAP + len(group.models) * (SIZE + GAP) - GAP for group in groups)


def _row(
    page: Page,
    layout: Layout,
    query: str,
    y: float,
    original: np.ndarray,
    groups: list[_Group],
    values: dict[tuple[str, int, str], dict[str, float]],
) -> None:
    top = y + 0.36
    page.text(MARGIN, y, "generated\nimage", size=7.5, weight="bold")
    page.rule(MARGIN, MARGIN + SIZE, top - 0.04, INK, 1.5)
    page.image(MARGIN, top, SIZE, original)
    x = MARGIN + SIZE + GROUP_GAP
    for group in groups:
        end = x + len(group.models) * (SIZE + GAP) - GAP
        page.text(x, y, group.title, size=7.5, colour=group.colour, weight="bold")
        page.rule(x, end, top - 0.04, group.colour, 1.5)
        for i, model in enumerate(group.models):
            left = x + i * (SIZE + GAP)
            _tile(page, layout, query, left, top, model, values[model])
        x = end + GROUP_GAP


def _tile(
    page: Page,
    layout: Layout,
    query: str,
    x: float,
    y: float,
    model: tuple[str, int, str],
    values: dict[str, float],
) -> None:
    """One regenerated image with its ΔL and squared pixel difference."""
    # Of a region, what is inside counts.
    inside = "_inside" if layout.config.region(query) else ""
    text = f"ΔL {values[f'delta_loss{inside}']:+.4f}".replace("-", "−")
    if f"delta_mse{inside}" in values:
        page.image(x, y, SIZE, read_image(layout.measure(*model, query)["image"]))
        text += f"\nMSE {values[f'delta_mse{inside}']:.4f}"
    else:
        page.blank(x, y, SIZE, "initial noise\nunknown")
    page.text(x + SIZE / 2, y + SIZE + 0.06, text, size=7.5, align="center")


def _values(layout: Layout, query: str) -> dict[tuple[str, int, str], dict[str, float]]:
    """Metrics of one query by model, from the table of single values."""
    path = layout.table("per_query")
    table: pd.DataFrame = read_table(path)
    values: dict = {}
    for row in table[table["query"] == query].itertuples():
        values.setdefault((row.method, row.k, row.member), {})[row.metric] = row.value
    if missing := [model for model in layout.measured_models(query) if model not in values]:
        method, k, member = missing[0]
        raise UserError(f"{path} lacks {method}, K = {k}, {member} for the query {query}: run `evaluate` again.")
    return values
