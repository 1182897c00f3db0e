"""``forgetrace tune``: an option of a method, chosen on tuning queries by either of two counterfactuals.

The linear datamodeling score costs no training once the halves are there, and tells little where an image matters
little: half of its top images stay in every half. Leaving out the top K of all tuning queries together costs a training
per value and moves every query's loss by many times what trainings differ.

No counterfactual of a reported query is looked at. What an unlearning variant leaves for a value is kept under the
name of its settings, so that a killed run goes on with the next; ``forgetrace tidy`` finds it when it is over.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from forgetrace.artifacts import (
    UserError,
    fingerprint,
    provenance,
    read_tensors_provenance,
    sha256_of,
    stage_versions,
    write_json,
)
from forgetrace.attribution.influence import InnerProducts
from forgetrace.attribution.ranking import rank, read_ranking
from forgetrace.attribution.registry import ATTRIBUTORS, attributor, check_methods
from forgetrace.attribution.scan import scan
from forgetrace.attribution.unlearning import ByUnlearning
from forgetrace.config import Config, parse_config
from forgetrace.counterfactual.measure import brief_measures, measure_key
from forgetrace.counterfactual.retrain import measured_before, retrained_unet
from forgetrace.curvature.fit import fit
from forgetrace.diffusion.device import pick_device
from forgetrace.diffusion.model import load_unet
from forgetrace.diffusion.training import Training, discard_checkpoints, precision_of, train, training_key
from forgetrace.encoding.given import fitted_file, given_fits
from forgetrace.encoding.store import load_encoded
from forgetrace.evaluation.lds import correlations, read_halves
from forgetrace.layout import Layout
from forgetrace.unlearning.variants import unlearn_query

POOL = "tuning"


def tune(
    layout: Layout,
    method: str,
    option: str,
    values: list[str],
    device: str = "auto",
    partial: bool = False,
    leave_out: int | None = None,
) -> pd.DataFrame:
    """Score the tuning queries with every value of an option.

    Args:
        layout: an experiment with queries of the tuning pool and, without ``leave_out``, halves measured on them.
        method: one of ``score.methods``.
        option: a key of its entry, or, with unlearning, of its variant.
        values: of the option, as YAML.
        device: where to compute.
        partial: make do with the halves that have been measured.
        leave_out: K top images of each tuning query to leave out together, instead of halves.

    Returns:
        value, query, then lds and halves, or delta_loss (above θ0's) and removed; a row per value and tuning query.

    Raises:
        UserError: no tuning query or no half, or a value that the option cannot have.
    """
    queries = tuning_queries(layout)
    trials = {value: trial(layout, method, option, value) for value in values}
    if leave_out:
        return _left_out(layout, queries, _all_scores(trials, method, option, queries, device), leave_out, device)
    if not layout.config.retrain.subsets:
        raise UserError(
            "Tuning needs models of random halves (retrain.subsets) or --leave-out K: add the key to the config and "
            "run the experiment's retrainings, or give the option."
        )
    halves = read_halves(layout, partial)
    if not len(halves.kept):
        raise UserError("No model of a random half has been trained yet: run the experiment's retrainings first.")
    rows = []
    for value, scores in _all_scores(trials, method, option, queries, device):
        found = correlations(halves, {method: scores}, 0, layout.config.seed)[method]
        rows += [(value, query, found[query][0], len(halves.kept)) for query in queries]
    return pd.DataFrame(rows, columns=["value", "query", "lds", "halves"])


def compare(layout: Layout, methods: list[str], leave_out: int, device: str = "auto") -> pd.DataFrame:
    """Judge methods as they are by a training each, without the top images it names for the tuning queries.

    Args:
        layout: an experiment with queries of the tuning pool that the methods have scored.
        methods: of ``score.methods``.
        leave_out: K top images of each tuning query to leave out together.
        device: where to train.

    Returns:
        value (the method), query, delta_loss (above θ0's) and removed; a row per method and tuning query.

    Raises:
        UserError: no tuning query, no such method or no score of it.
    """
    queries = tuning_queries(layout)
    for method in methods:
        attributor(layout, method)  # there is one
    ids = list(load_encoded(layout).image_ids)
    # All are read first: a missing one is told before anything is trained.
    scored = {m: {q: read_ranking(layout, m, q, ids)["score"].to_numpy() for q in queries} for m in methods}
    return _left_out(layout, queries, scored.items(), leave_out, device)


def tuning_queries(layout: Layout) -> list[str]:
    """Names of the queries of the tuning pool.

    Raises:
        UserError: there is none.
    """
    queries = [query for query in layout.config.queries() if layout.config.origin(query) == POOL]
    if not queries:
        raise UserError("Tuning needs queries of the tuning pool: add them under synthesize.queries.")
    return queries


def _left_out(
    layout: Layout,
    queries: list[str],
    scored: Iterable[tuple[str, dict[str, np.ndarray]]],
    leave_out: int,
    device: str,
) -> pd.DataFrame:
    """What the loss of each query rises by, by what is tried; ``scored`` are pairs of that and the scores by query."""
    rows = []
    for tried, scores in scored:
        rises, removed = rise_without(layout, queries, scores, leave_out, device)
        rows += [(tried, query, rises[query], removed) for query in queries]
    return pd.DataFrame(rows, columns=["value", "query", "delta_loss", "removed"])


def best(table: pd.DataFrame) -> str:
    """The value with the highest mean; of equals the first."""
    means = table.groupby("value", sort=False)[judged_by(table)].mean()
    return str(means.idxmax())


def judged_by(table: pd.DataFrame) -> str:
    """The column of a table of trials that values are chosen by, the higher the better."""
    return next(name for name in ("lds", "delta_loss", "ap") if name in table)


def rise_without(
    layout: Layout, queries: list[str], scores: dict[str, np.ndarray], k: int, device: str
) -> tuple[dict[str, float], int]:
    """How much the loss of each query rises above θ0's without the k top images of all of them, and how many those are.

    What the model said is kept: the same images are not left out twice.

    Args:
        layout: the experiment.
        queries: those with scores.
        scores: by query, (N,).
        k: of each query.
        device: where to train.

    Raises:
        UserError: nothing would be left to train on, or as :func:`forgetrace.diffusion.training.train`.
    """
    encoded, target = load_encoded(layout), pick_device(device)
    tops = [rank(encoded.image_ids, scores[query]).nsmallest(k, "rank")["image_id"] for query in queries]
    removed = np.isin(encoded.image_ids, np.concatenate(tops))
    if removed.all():
        raise UserError(f"--leave-out: {k} images of each query are all there are; choose a smaller K.")
    name = f"tune-{fingerprint(np.flatnonzero(removed).tolist())[:12]}"  # the folder of its checkpoints
    training = Training(name, layout.config.seed, removed)
    key = training_key(layout, training, precision_of(layout, target))
    keys = {query: measure_key(layout, query, key) for query in queries}
    path = layout.tuned(key)
    if (said := measured_before(path, keys)).keys() != keys.keys():
        weights, _, _ = train(layout, encoded, training, device)
        unet = retrained_unet(layout, encoded, weights, target)
        said = {query: {"key": keys[query]} | of for query, of in brief_measures(layout, unet, queries).items()}
        write_json(path, {"removed": int(removed.sum()), "queries": said})
        discard_checkpoints(layout, training)
    before = brief_measures(layout, load_unet(layout, target), queries)
    return {query: said[query]["loss"] - before[query]["loss"] for query in queries}, int(removed.sum())


def _parsed(value: str) -> object:
    try:
        return float(value)  # 1e-3 is text in YAML
    except ValueError:
        pass
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--values: '{value}' is no value; separate them by commas.") from None


def trial(layout: Layout, method: str, option: str, value: str) -> Layout:
    """The experiment with another value, as YAML; an unlearning variant with it has a name of its own.

    Raises:
        UserError: there is no such method, or the option cannot have the value.
    """
    given = _parsed(value)
    plain = layout.config.model_dump(mode="json", exclude_unset=True)
    entry = plain["score"]["methods"].get(method)
    if entry is None:
        raise UserError(f"score.methods has no '{method}' (it has {', '.join(plain['score']['methods'])}).")
    kind = ATTRIBUTORS.get(entry.get("attributor") or method)
    if kind is None or not issubclass(kind, ByUnlearning) or option in kind.reads:
        entry[option] = given
    else:
        variant = plain["unlearn"][entry.get("variant") or method] | {option: given}
        entry["variant"] = f"tune-{fingerprint([variant, underlying(layout)])[:12]}"
        plain["unlearn"][entry["variant"]] = variant
    config: Config = parse_config(plain, f"{method}.{option} = {value}")
    check_methods(config)
    return replace(layout, config=config)


def underlying(layout: Layout) -> dict:
    """What unlearned weights and their scans hang on beside the variant."""
    given = given_fits(layout.config.fit.given)
    inputs = {"weights": layout.weights, "encoded": layout.encode_manifest} | given
    settings = layout.config.digest_of("seed", "synthesize", "fit", "scan")
    versions = stage_versions("synthesize", "fit", "unlearn", "scan")
    return {"settings": settings, "versions": versions, "inputs": provenance({}, inputs)["inputs"]}


def _all_scores(
    trials: dict[str, Layout], method: str, option: str, queries: list[str], device: str
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The scores of the queries by value of the option; values that only change a direction share their passes."""
    sources = [attributor(tried, method, device) for tried in trials.values()]
    if sources and isinstance(sources[0], InnerProducts) and option in sources[0].directed_by:
        yield from zip(trials, sources[0].scores_of_settings(sources, queries), strict=True)
        return
    for value, tried in trials.items():
        yield value, _scores(tried, method, queries, device)


def _scores(layout: Layout, method: str, queries: list[str], device: str) -> dict[str, np.ndarray]:
    source = attributor(layout, method, device)
    for features in source.features():
        try:
            features.kept()
        except UserError:
            features.fit()
    variant = source.options.variant
    if variant and variant.startswith("tune-"):
        fit_missing(layout, layout.config.unlearn[variant].curvature, device)
        for query in queries:
            if not Path(layout.unlearned(variant, query)["losses"]).exists():
                unlearn_query(layout, variant, query, device)
            if (path := layout.scan(variant, query)) in source.inputs(query) and not Path(path).exists():
                scan(layout, variant, query, device)
    return source.scores_of(queries)


def fit_missing(layout: Layout, curvature: str, device: str) -> None:
    """Fit a curvature that no earlier run has left for this model and these settings; ``none`` is none."""
    if curvature != "none" and not _is_fitted(layout, curvature):
        fit(layout, curvature, device)


def _is_fitted(layout: Layout, curvature: str) -> bool:
    """Whether an earlier run left this curvature of this model: estimated on as many draws, or the same given one."""
    settings = layout.config.fit
    try:
        made_by = read_tensors_provenance(layout.fitted(curvature)[0])
        same_draws = made_by["config"]["fit"]["draws"] == settings.draws
    except (UserError, KeyError):
        return False
    inputs = {"weights": sha256_of(layout.weights)}
    if settings.given:
        inputs["given"] = sha256_of(fitted_file(settings.given, curvature))
    return same_draws and made_by["inputs"] == inputs
