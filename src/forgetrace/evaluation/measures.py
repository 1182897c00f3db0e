"""What ``retrain`` left of every model and query, read with checks."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from forgetrace.artifacts import UserError, read_image, read_json
from forgetrace.diffusion.regions import region_of
from forgetrace.layout import BASE, Layout

Model = tuple[str, int, str]  # (method, k, member)
THETA0: Model = (BASE, 0, BASE)


@dataclass(frozen=True)
class Measure:
    """What one model says of one query.

    Attributes:
        loss: mean loss on the query.
        timesteps: the timesteps it averages over.
        image: the query regenerated, shape (height, width, 3), uint8; None for a user's image,
            whose initial noise is unknown.
        regions: of a region, the mean losses ``inside`` and, where there is one, ``outside``.
    """

    loss: float
    timesteps: tuple[int, ...]
    image: np.ndarray | None
    regions: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class QueryMeasures:
    """What all models say of one query.

    Attributes:
        original: the query image, shape (height, width, 3), uint8.
        measures: by model; θ0 is among them.
        inside: of a region, its pixels, (height, width), bool.
    """

    original: np.ndarray
    measures: dict[Model, Measure]
    inside: np.ndarray | None = None


def asked_queries(layout: Layout, partial: bool = False) -> list[str]:
    """The judged queries; with ``partial``, those of them that θ0 has been asked about."""
    queries = layout.config.judged_queries()
    return [query for query in queries if not partial or Path(layout.measure(*THETA0, query)["losses"]).exists()]


def read_query(layout: Layout, query: str, partial: bool = False) -> QueryMeasures:
    """Read a query and what every model of the experiment says of it; with ``partial``, those that were asked.

    Raises:
        UserError: a file is missing or damaged, or was measured otherwise than θ0's; the message
            names it.
    """
    original = read_image(layout.query(query)["image"])
    base = read_measure(layout, THETA0, query)
    measures = {}
    for model in layout.measured_models(query):
        path = layout.measure(*model, query)["losses"]
        if partial and not Path(path).exists():
            continue
        measure = read_measure(layout, model, query)
        if measure.timesteps != base.timesteps:
            raise UserError(f"{path} averages over other timesteps than θ0's: {_rebuild(path)}")
        if (measure.image is None) != (base.image is None):
            raise UserError(f"{path} and θ0's disagree on whether there is a regenerated image: {_rebuild(path)}")
        if measure.image is not None and measure.image.shape != original.shape:
            image = layout.measure(*model, query)["image"]
            raise UserError(f"{image} has another size than the query image: {_rebuild(image)}")
        measures[model] = measure
    return QueryMeasures(original, measures, region_of(layout, query))


def read_measure(layout: Layout, model: Model, query: str) -> Measure:
    """Read what one model says of one query.

    Raises:
        UserError: a file is missing, damaged, or holds no finite loss.
    """
    paths = layout.measure(*model, query)
    content = read_json(paths["losses"])
    try:
        loss, timesteps = float(content["loss"]), tuple(content["timesteps"])
        regenerated = content.get("regenerated", True)
        regions = {part: float(value) for part, value in content.get("regions", {}).items()}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        path = paths["losses"]
        raise UserError(f"{path} is damaged (no loss or timesteps in it): {_rebuild(path)}") from error
    if not np.isfinite([loss, *regions.values()]).all():
        path = paths["losses"]
        raise UserError(f"{path} holds the loss {loss}: the model diverged; lower train.learning_rate.")
    return Measure(loss, timesteps, read_image(paths["image"]) if regenerated else None, regions)


def read_brief(layout: Layout, model: Model) -> dict[str, dict[str, float]]:
    """What a model of a random half or of a pool says of every query: ``loss`` and, unless it is a user's, ``mse``.

    Raises:
        UserError: the file is missing, damaged, lacks a query or holds a loss that is not finite.
    """
    path = layout.losses(*model)
    content = read_json(path)
    found = {}
    for query in layout.config.queries():
        try:
            entry = content["queries"][query]
            found[query] = {name: float(entry[name]) for name in ("loss", "mse") if name == "loss" or name in entry}
        except (TypeError, KeyError, ValueError) as error:
            method, k, member = model
            raise UserError(
                f"{path} says nothing of the query {query}: run forgetrace retrain --method {method} --k {k} "
                f"--member {member} again, which keeps what is there."
            ) from error
        if not np.isfinite(found[query]["loss"]):
            loss = found[query]["loss"]
            raise UserError(f"{path} holds the loss {loss} for {query}: the model diverged; lower train.learning_rate.")
    return found


def asks_all(layout: Layout, model: Model) -> bool:
    """Whether a model of a random half or of a pool has been asked about every query."""
    try:
        return set(layout.config.queries()) <= set(read_json(layout.losses(*model))["queries"])
    except (UserError, KeyError, TypeError):
        return False


def _rebuild(path: str) -> str:
    return f"delete {path} and run again to rebuild it."
