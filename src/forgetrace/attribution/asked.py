"""What there is of customised models: their images, and for which of these each method ranks the candidates."""

from forgetrace.datasets import concepts
from forgetrace.layout import Layout


def customised_files(layout: Layout) -> set[str]:
    """Every file the stages customize, retrieve and learn write for the current config."""
    settings = layout.config.customize
    parts, files = concepts.names(settings, layout.config.seed), set(layout.learned.values())
    for model in [name for own in parts.values() for name in own]:
        queries = concepts.query_manners(settings, model)
        shown = concepts.exemplar_count(settings, model)
        images = [*queries, *(f"exemplar-{i:02d}" for i in range(shown))]
        files |= {*layout.customized(model).values(), *(layout.customized_image(model, image) for image in images)}
        if model in parts["test"]:
            ranked = asked(layout, model, queries).items()
            files |= {layout.retrieved(model, method, query) for method, own in ranked for query in own}
            files.add(layout.ranks(model))
    return files


def costly_queries(layout: Layout, model: str, manners: dict[str, str]) -> list[str]:
    """Those of a model's queries that costly methods rank for too, spread evenly over its prompts; every control.

    Args:
        layout: the experiment.
        model: its name.
        manners: of the prompts of its queries.
    """
    costly = layout.config.retrieve.costly if layout.config.retrieve else None
    tested = concepts.names(layout.config.customize, layout.config.seed)["test"]
    alike = [name for name in tested if name.partition("-")[0] == model.partition("-")[0]]
    if costly is None or not costly.methods or model not in alike[: costly.models]:
        return []
    queries = concepts.of_concept(manners)
    count = min(costly.queries, len(queries))
    some = {queries[i * len(queries) // count] for i in range(count)}
    return [query for query in manners if query in some or query not in queries]


def asked(layout: Layout, model: str, manners: dict[str, str]) -> dict[str, list[str]]:
    """The queries of a model that each method ranks for; methods with none are left out."""
    costly = layout.config.retrieve.costly.methods if layout.config.retrieve else []
    some = costly_queries(layout, model, manners)
    per_method = {method: some if method in costly else list(manners) for method in layout.config.score.methods}
    return {method: own for method, own in per_method.items() if own}


def manners_of(record: dict) -> dict[str, str]:
    """The manner of the prompt of each query in a customised model's record."""
    return {entry["query"]: entry["manner"] for entry in record["queries"]}
