"""The ``score`` stage: one method's ranking of the training images for one query."""

from forgetrace.artifacts import provenance, read_table, write_table
from forgetrace.attribution.ranking import rank
from forgetrace.attribution.registry import attributor
from forgetrace.layout import Layout


def score(layout: Layout, method: str, query: str) -> None:
    """Write the ranking.

    Raises:
        UserError: an input is missing or damaged, or a score is not finite.
    """
    source = attributor(layout, method)
    image_ids = read_table(layout.index)["image_id"].tolist()
    inputs = {path.removeprefix(f"{layout.root}/"): path for path in source.inputs(query)}
    made_by = provenance({"method": source.options.model_dump(), "seed": layout.config.seed}, inputs)
    write_table(layout.score(method, query), rank(image_ids, source.scores(query)), made_by)
