"""The ``score`` stage: one method's ranking of the training images for one query, or for all of them."""

from forgetrace.artifacts import UserError, provenance, read_table, read_table_provenance, stage_versions, write_table
from forgetrace.attribution.contract import Together
from forgetrace.attribution.ranking import rank
from forgetrace.attribution.registry import attributor
from forgetrace.layout import Layout


def score(layout: Layout, method: str, query: str | None = None, device: str = "auto") -> None:
    """Write the ranking for a query; without one, for every query that has none of these inputs and settings.

    Raises:
        UserError: an input is missing or damaged, or a score is not finite.
    """
    source = attributor(layout, method, device)
    image_ids = read_table(layout.index)["image_id"].tolist()
    made_by = {name: _made_by(layout, source, name) for name in ([query] if query else layout.config.queries())}
    if query is None:
        made_by = {name: made for name, made in made_by.items() if not _is_made(layout.score(method, name), made)}
    if isinstance(source, Together):
        scores = source.scores_of(list(made_by)) if made_by else {}
    else:
        scores = {name: source.scores(name) for name in made_by}
    for name, made in made_by.items():
        write_table(layout.score(method, name), rank(image_ids, scores[name]), made)


def _made_by(layout: Layout, source, query: str) -> dict:
    """What the scores of a query hang on."""
    inputs = {path.removeprefix(f"{layout.root}/"): path for path in source.inputs(query)}
    settings = {"method": source.options.model_dump(), "seed": layout.config.seed}
    return provenance(settings | {"versions": stage_versions("score")}, inputs)


def _is_made(path: str, made_by: dict) -> bool:
    """Whether an earlier run left scores of the same inputs and settings."""
    try:
        return read_table_provenance(path) == made_by
    except UserError:
        return False
