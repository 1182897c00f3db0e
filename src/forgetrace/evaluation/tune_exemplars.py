"""``forgetrace tune`` where models are customised: how well a method finds the exemplars of validation models.

Nothing is reported of validation models, and their concepts are others than those of the models that are. What came out
for a value and an image is kept as it comes, so that a killed run goes on.
"""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pandas as pd

from forgetrace.artifacts import fingerprint, provenance, read_json, stage_versions, write_json
from forgetrace.attribution.candidates import Candidates, candidates, discard, exemplar_ids, validation_images
from forgetrace.attribution.ranking import rank
from forgetrace.attribution.registry import attributor
from forgetrace.attribution.retrieve import scan_for
from forgetrace.encoding.store import load_encoded
from forgetrace.evaluation.retrieval import average_precision
from forgetrace.evaluation.tune import fit_missing, trial, underlying
from forgetrace.layout import Layout

COLUMNS = ["value", "model", "query", "ap"]


def tune_on_exemplars(
    layout: Layout, method: str, option: str, values: list[str], count: int, device: str = "auto"
) -> pd.DataFrame:
    """Rank the candidates of images of validation models with every value of an option.

    Args:
        layout: an experiment with customised validation models.
        method: one of ``score.methods``.
        option: a key of its entry, or, with unlearning, of its variant.
        values: of the option, as YAML.
        count: images.
        device: where to compute.

    Returns:
        The columns ``COLUMNS``, a row per value and image; ``ap`` is the average precision of the model's exemplars.

    Raises:
        UserError: there are not so many images, or a value that the option cannot have.
    """
    trials = {value: trial(layout, method, option, value) for value in values}
    together = _together(layout, method, trials)
    queries = defaultdict(list)
    for model, query in validation_images(layout, count):
        queries[model].append(query)
    for tried in trials.values():
        fit_missing(layout, _curvature(tried, method), device)
    rows = {value: [] for value in values}
    for model, own_queries in queries.items():
        own = None
        for value, tried in trials.items():
            for query in own_queries:
                path = _kept(tried, method, model, query)
                if not Path(path).exists():
                    own = own or candidates(together, model, list(trials))
                    write_json(path, {"ap": _precision(own, value, query, device)})
                rows[value].append((value, model, query, read_json(path)["ap"]))
        if own:
            discard(own)
    return pd.DataFrame([row for own_rows in rows.values() for row in own_rows], columns=COLUMNS)


def _together(layout: Layout, method: str, trials: dict[str, Layout]) -> Layout:
    """One experiment with a method for every value: they share what is made of a customised model."""
    methods, variants = {}, dict(layout.config.unlearn)
    for value, tried in trials.items():
        entry = tried.config.score.methods[method]
        # The method's own name, which these are by default, is another here.
        own = {"attributor": entry.attributor or method}
        own |= {"variant": method} if not entry.variant and method in tried.config.unlearn else {}
        methods[value] = entry.model_copy(update=own)
        variants |= tried.config.unlearn
    score = layout.config.score.model_copy(update={"methods": methods})
    return replace(layout, config=layout.config.model_copy(update={"score": score, "unlearn": variants}))


def _curvature(tried: Layout, method: str) -> str:
    """The curvature of the base model that a method weighs by, or ``none``."""
    entry = tried.config.score.methods[method]
    if (entry.attributor or method) == "influence":
        return entry.curvature or "diagonal"
    variant = tried.config.unlearn.get(entry.variant or method)
    return variant.curvature if variant else "none"


def _kept(tried: Layout, method: str, model: str, query: str) -> str:
    """Where the result of a value and an image is kept; named by all it hangs on."""
    entry = tried.config.score.methods[method]
    variant = tried.config.unlearn.get(entry.variant or method)
    settings = [method, entry.model_dump(mode="json"), variant and variant.model_dump(mode="json"), query]
    curvature = _curvature(tried, method)
    fitted = {"fitted": tried.fitted(curvature)[0]} if curvature != "none" else {}
    inputs = provenance({}, tried.customized(model) | fitted)["inputs"]
    return tried.tuned(fingerprint([settings, underlying(tried), inputs, stage_versions("score")]))


def _precision(own: Candidates, method: str, query: str, device: str) -> float:
    """Average precision of the exemplars by one method."""
    source = attributor(own, method, device)
    scan_for(own, source, query, device)
    ranks = rank(load_encoded(own).image_ids, source.scores_of([query])[query]).set_index("image_id")["rank"]
    count = len(read_json(own.base.customized(own.concept)["record"])["exemplars"])
    return average_precision(ranks.loc[exemplar_ids(own.concept, count)].to_numpy())
