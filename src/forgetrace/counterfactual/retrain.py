"""The ``retrain`` stage: leave-K-out models and what they say of the queries.

A query's own leave-K-out model is trained, measured on that query and thrown away (unless
``keep_weights``); what it said stays, with the fingerprint of what it depends on. A rerun that finds the
same fingerprint keeps the measurement: hours of training are not redone because a file is newer.
Models shared by all queries (random sets, other seeds) keep their weights, and ``measure`` asks them. Those of
random halves and of pools are asked about every query as soon as they are trained, and only that is kept.
"""

import logging

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
from forgetrace.counterfactual.measure import brief_measure, measure, measure_key
from forgetrace.counterfactual.sets import training_of
from forgetrace.diffusion.device import pick_device, processor_name, resolve_precision
from forgetrace.diffusion.model import build_unet, frozen, load_unet
from forgetrace.diffusion.training import discard_checkpoints, train, training_key
from forgetrace.encoding.store import Encoded, load_encoded
from forgetrace.layout import Layout

log = logging.getLogger(__name__)


def retrain(layout: Layout, method: str, k: int, member: str, device: str = "auto") -> None:
    """Train the model (method, k, member); measure it, or keep its weights where it is shared.

    Raises:
        UserError: as :func:`training_of` and :func:`forgetrace.diffusion.training.train`.
    """
    encoded = load_encoded(layout)
    training = training_of(layout, encoded, method, k, member)
    shared, path = method in (RANDOM, SEED_SET), layout.retrained(method, k, member)
    keeps_weights = shared or layout.config.retrain.keep_weights
    precision = resolve_precision(layout.config.train.precision, pick_device(device))
    trained = training_key(layout, training, precision)
    measured = None if shared else measure_key(layout, member, trained)
    if (not keeps_weights or _is_trained(path, trained)) and (
        shared or _is_measured(layout.measure(method, k, member, member), measured)
    ):
        log.warning("%s is already there: kept.", training.name)
        return
    weights, _, record = train(layout, encoded, training, device)
    if not PartialState().is_main_process:
        return
    if keeps_weights:
        _keep(layout, path, weights, record)
    if not shared:
        unet = retrained_unet(layout, encoded, weights, pick_device(device))
        measure(layout, unet, (method, k, member), member, measured)
    discard_checkpoints(layout, training.name)


def retrain_measured(layout: Layout, method: str, k: int, member: str, device: str = "auto") -> None:
    """Train a model of a random half or of a pool and write what it says of every query.

    A query's loss is kept where its key still holds, so that a further query costs no training if the weights were
    kept.

    Raises:
        UserError: as :func:`training_of` and :func:`forgetrace.diffusion.training.train`.
    """
    encoded = load_encoded(layout)
    training = training_of(layout, encoded, method, k, member)
    target = pick_device(device)
    trained = training_key(layout, training, resolve_precision(layout.config.train.precision, target))
    keys = {query: measure_key(layout, query, trained) for query in layout.config.queries()}
    path, weights_path = layout.losses(method, k, member), layout.retrained(method, k, member)
    known = measured_before(path, keys)
    missing = [query for query in keys if query not in known]
    keeps_weights, is_trained = layout.config.retrain.keep_weights, _is_trained(weights_path, trained)
    if not missing and (is_trained or not keeps_weights):
        log.warning("%s is already there: kept.", training.name)
        return
    if is_trained:
        unet = load_unet(layout, target, weights_path)
    else:
        weights, _, record = train(layout, encoded, training, device)
        if not PartialState().is_main_process:
            return
        if keeps_weights:
            _keep(layout, weights_path, weights, record)
        unet = retrained_unet(layout, encoded, weights, target)
    # Rounding differs between processors, and other queries may have been measured elsewhere.
    own = {"processor": processor_name(target)}
    found = {query: {"key": keys[query]} | own | brief_measure(layout, unet, query) for query in missing}
    record = {"method": method, "k": k, "member": member, "removed": int(training.removed.sum())}
    write_json(path, record | {"queries": known | found})
    discard_checkpoints(layout, training.name)


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
    """Measure θ0 and all shared retrainings on one query."""
    for model in layout.shared_models():
        weights = layout.retrained(*model)
        unet = load_unet(layout, pick_device(device), weights)
        measure(layout, unet, model, query, measure_key(layout, query, sha256_of(weights)))


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
