"""The ``retrain`` stage: leave-K-out models and what they say of the queries.

A query's own leave-K-out model is trained, measured on that query and thrown away (unless
``keep_weights``); what it said stays, with the fingerprint of what it depends on. A rerun that finds the
same fingerprint keeps the measurement: hours of training are not redone because a file is newer.
Models shared by all queries (random sets, other seeds) keep their weights, and ``measure`` asks them. Those of
random halves and of pools are asked about every query as soon as they are trained, and only that is kept.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import PartialState
from diffusers import UNet2DConditionModel

from forgetrace.artifacts import (
    UserError,
    provenance,
    read_json,
    read_tensors_provenance,
    sha256_of,
    write_json,
    write_tensors,
)
from forgetrace.config import RANDOM, SEED_SET
from forgetrace.counterfactual.measure import brief_measures, measure, measure_key
from forgetrace.counterfactual.sets import training_of
from forgetrace.diffusion.device import pick_device, processor_name
from forgetrace.diffusion.model import build_unet, frozen, load_unet
from forgetrace.diffusion.training import (
    Training,
    discard_checkpoints,
    precision_of,
    train_as_one,
    training_key,
    unfinished,
)
from forgetrace.encoding.store import Encoded, load_encoded
from forgetrace.layout import Layout

log = logging.getLogger(__name__)
Model = tuple[str, int, str]  # method, k, member


def retrain(layout: Layout, models: Sequence[Model], device: str = "auto") -> None:
    """Train those of the models whose measurements or weights are missing, ``retrain.stack`` at a time.

    Args:
        layout: the experiment.
        models: (method, k, member) each.
        device: where to train, as :func:`forgetrace.diffusion.device.pick_device`.

    Raises:
        UserError: as :func:`training_of` and :func:`forgetrace.diffusion.training.train_as_one`.
    """
    encoded, target = load_encoded(layout), pick_device(device)
    precision, groups = precision_of(layout, target), []
    work = [_work(layout, encoded, model, target, precision) for model in models]
    for start in range(0, len(work), layout.config.retrain.stack):
        part = work[start : start + layout.config.retrain.stack]
        missing = [one for one in part if one.missing]
        if not missing:  # what a killed run may have left of them goes with the others
            groups.append([one.training for one in part])
            continue
        # A run that was killed when some of them had been asked already left all it had trained.
        groups.append(unfinished(layout, *([one.training for one in of] for of in (part, missing))))
        group = [one for training in groups[-1] for one in part if one.training is training]
        trained = train_as_one(layout, encoded, groups[-1], device)
        if not PartialState().is_main_process:
            continue
        for one, (weights, _, record) in zip(group, trained, strict=True):
            if one.missing and one.keeps_weights:
                _keep(layout, layout.retrained(*one.model), weights, record)
            if one.missing and one.ask:
                one.ask(retrained_unet(layout, encoded, weights, target))
    # Not before the last is asked: where a job fails, Snakemake takes back what it wrote.
    if PartialState().is_main_process:
        for trainings in groups:
            discard_checkpoints(layout, *trainings)


@dataclass(frozen=True)
class _Work:
    """What there is to do for one model.

    Attributes:
        model: (method, k, member).
        training: how it is made.
        keeps_weights: whether its weights stay.
        ask: measures the model and writes what it says; None where ``measure`` does that.
        missing: whether it has to be trained.
    """

    model: Model
    training: Training
    keeps_weights: bool
    ask: Callable[[UNet2DConditionModel], None] | None
    missing: bool


def _work(layout: Layout, encoded: Encoded, model: Model, device: torch.device, precision: str) -> _Work:
    """Find out what is missing of a model; ask one whose weights were kept what it has not been asked yet."""
    training = training_of(layout, encoded, *model)
    trained = training_key(layout, training, precision)
    at_once = model in layout.asked_at_once()
    shared, path = model[0] in (RANDOM, SEED_SET) and not at_once, layout.retrained(*model)
    keeps_weights = shared or layout.config.retrain.keep_weights
    is_trained = keeps_weights and _is_trained(path, trained)
    if shared:
        ask, answered = None, True
    elif at_once:
        keys = {query: measure_key(layout, query, trained) for query in layout.config.queries()}
        ask = partial(_measure_all, layout, model, int(training.removed.sum()), keys)
        answered = measured_before(layout.losses(*model), keys).keys() == keys.keys()
    else:
        query = model[2]
        key = measure_key(layout, query, trained)
        ask = partial(measure, layout, model=model, query=query, key=key)
        answered = _is_measured(layout.measure(*model, query), key)
    if is_trained and not answered:
        ask(load_unet(layout, device, path))
        answered = True
    missing = not answered or (keeps_weights and not is_trained)
    if not missing:
        log.warning("%s is already there: kept.", training.name)
    return _Work(model, training, keeps_weights, ask, missing)


def _measure_all(layout: Layout, model: Model, removed: int, keys: dict[str, str], unet: UNet2DConditionModel) -> None:
    """Write what a model of a random half or of a pool says of every query.

    A query's loss is kept where its key still holds, so that a further query costs no training if the weights were
    kept.
    """
    path = layout.losses(*model)
    known = measured_before(path, keys)
    # Rounding differs between processors, and other queries may have been measured elsewhere.
    own = {"processor": processor_name(unet.device)}
    said = brief_measures(layout, unet, [query for query in keys if query not in known])
    found = {query: {"key": keys[query]} | own | of_query for query, of_query in said.items()}
    record = {"method": model[0], "k": model[1], "member": model[2], "removed": removed}
    write_json(path, record | {"queries": known | found})


def _keep(layout: Layout, path: str, weights: dict[str, torch.Tensor], record: dict) -> None:
    """Write a model's weights with what :func:`_is_trained` knows them by."""
    made_by = provenance(layout.config.digest_of("seed", "train"), {"encoded": layout.encode_manifest})
    write_tensors(path, weights, made_by | record)


def measured_before(path: str, keys: dict[str, str]) -> dict[str, dict]:
    """What an earlier run wrote of the queries whose fingerprint still holds."""
    try:
        written = read_json(path)["queries"]
        return {query: written[query] for query, key in keys.items() if written.get(query, {}).get("key") == key}
    except (UserError, KeyError, TypeError, AttributeError):
        return {}  # not there, or not whole


def retrained_unet(
    layout: Layout, encoded: Encoded, weights: dict[str, torch.Tensor], device: torch.device
) -> UNet2DConditionModel:
    """A model with the weights that a training returned, ready to be asked."""
    shape, width = tuple(encoded.latents.shape[1:]), encoded.captions.shape[2]
    unet = build_unet(layout.config.train, shape, width, seed=0)
    unet.load_state_dict(weights)
    return frozen(unet, device)


def measure_shared(layout: Layout, query: str, device: str = "auto") -> None:
    """Measure θ0 and all shared retrainings on one query; what is measured already is kept."""
    for model in layout.shared_models():
        weights = layout.retrained(*model)
        key = measure_key(layout, query, sha256_of(weights))
        if not _is_measured(layout.measure(*model, query), key):
            measure(layout, load_unet(layout, pick_device(device), weights), model, query, key)


def _is_trained(path: str, key: str) -> bool:
    """Whether an earlier run left weights with this fingerprint."""
    try:
        return read_tensors_provenance(path).get("key") == key
    except UserError:
        return False


def _is_measured(files: dict[str, str], key: str) -> bool:
    """Whether an earlier run left the measurement with this fingerprint, and the image that belongs to it."""
    try:
        record = read_json(files["losses"])
        image = sha256_of(files["image"]) if record.get("regenerated") else None
    except UserError:
        return False
    # Records of before images were hashed say nothing of theirs.
    return record.get("key") == key and record.get("image_sha256", image) == image
