"""Which figures an experiment has, and drawing one by name."""

from importlib import import_module

from forgetrace.artifacts import UserError
from forgetrace.datasets import concepts
from forgetrace.layout import Layout

GRIDS = 3  # test models of each kind with figures of their own


def names(layout: Layout) -> list[str]:
    """Names of all figures; those of a query end with its name."""
    config = layout.config
    wholes = config.whole_queries()
    grids = [f"attribution-{query}" for query in wholes if not config.regions_of(query)]
    grids += [f"regions-{query}" for query in wholes if config.regions_of(query)]
    grids += [f"counterfactual-{query}" for query in config.judged_queries()]
    grids += [f"exemplars-{query}" for query in shown(layout)]
    first = [] if config.train.pretrained else ["training"]
    last = {"delta": config.leaves_out, "lds": config.retrain.subsets, "unlearning": config.evaluate.others}
    last |= {"retrieval": config.customize, "reliability": config.learn}
    last |= {"precision": config.evaluate.precision_k}
    return [*first, *grids, *(name for name, wanted in last.items() if wanted)]


def shown(layout: Layout) -> list[str]:
    """Images of customised models whose candidates are shown: the first, the last, a control of a few test models."""
    config, chosen = layout.config, []
    models = concepts.names(config.customize, config.seed)["test"] if config.customize else []
    for kind in ("object", "style"):
        for model in [name for name in models if name.startswith(kind)][:GRIDS]:
            manners = concepts.query_manners(config.customize, model)
            queries = concepts.of_concept(manners)
            controls = [query for query in manners if query not in queries]
            chosen += dict.fromkeys([queries[0], queries[-1], *controls[:1]])
    return chosen


def draw(layout: Layout, name: str) -> None:
    """Write one figure as PNG and PDF; the same inputs give the same bytes.

    Raises:
        UserError: there is no such figure, or a table or image it shows is missing or damaged.
    """
    if name not in names(layout):
        raise UserError(f"There is no figure '{name}'; this experiment has {', '.join(names(layout))}.")
    kind, _, query = name.partition("-")
    # Imported here so that listing names does not load matplotlib.
    module = import_module(f"forgetrace.figures.{kind}")
    module.draw(layout, name, *([query] if query else []))
