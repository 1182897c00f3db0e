"""The ``train`` stage: θ0 with its snapshots, curve and recipe.

A θ0 of the same recipe and data is kept, whatever machine it was trained on: rounding makes another model of it on
another processor, and all measurements hang on the one they were made with. Who wants to continue an experiment
elsewhere takes its folders ``train`` and ``synthesize`` along.
"""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
from accelerate import PartialState

from forgetrace.artifacts import (
    UserError,
    fingerprint,
    provenance,
    read_json,
    read_tensors,
    sha256_of,
    stage_versions,
    write_json,
    write_table,
    write_tensors,
)
from forgetrace.diffusion.device import pick_device
from forgetrace.diffusion.given import check_descends, check_fits, given_scheduler, given_source, given_unet
from forgetrace.diffusion.lora import lora_file, merge_lora
from forgetrace.diffusion.model import build_scheduler, build_unet, save_architecture
from forgetrace.diffusion.training import (
    Training,
    discard_checkpoints,
    precision_of,
    snapshot_path,
    train,
    training_key,
)
from forgetrace.encoding.store import Encoded, load_encoded
from forgetrace.layout import BASE, Layout

log = logging.getLogger(__name__)


def train_base(layout: Layout, device: str = "auto") -> None:
    """Train θ0 on all of D, or adopt the given one, and write it in diffusers' layout.

    Raises:
        UserError: as :func:`forgetrace.diffusion.training.train`.
    """
    config, encoded = layout.config, load_encoded(layout)
    if config.train.pretrained:
        adopt(layout, encoded)
        return
    training = Training(BASE, config.seed, np.zeros(len(encoded), dtype=bool))
    if is_there(layout, training_key(layout, training, precision_of(layout, pick_device(device)))):
        return
    made_by = provenance(config.digest_of("seed", "train"), {"encoded": layout.encode_manifest})
    snapshots = config.train.snapshot_steps()
    weights, curve, record = train(layout, encoded, training, device, snapshots)
    if not PartialState().is_main_process:
        return
    Path(layout.recipe).unlink(missing_ok=True)
    for step, path in zip(snapshots, layout.snapshots, strict=True):
        write_tensors(path, read_tensors(snapshot_path(layout, BASE, step)), made_by | {"step": step})
    shape, width = tuple(encoded.latents.shape[1:]), encoded.captions.shape[2]
    save_architecture(build_unet(config.train, shape, width, config.seed), build_scheduler(config.train), layout)
    write_tensors(layout.weights, weights, made_by)
    write_table(layout.curve, curve)
    write_json(layout.recipe, record | {"sha256": sha256_of(layout.weights), "made_by": made_by})
    discard_checkpoints(layout, training)


def is_there(layout: Layout, key: str) -> bool:
    """Whether every file of a θ0 with this fingerprint is there; the recipe is removed first and written last."""
    files = [*layout.model_files, *layout.snapshots, layout.curve]
    try:
        record = read_json(layout.recipe)
    except UserError:
        return False
    missing = [file for file in files if not Path(file).exists()]
    if layout.weights in missing or record.get("sha256") != sha256_of(layout.weights):
        return False
    if record.get("key") != key:
        log.warning("The θ0 that is there is of other data or another recipe, seed or precision: made again.")
        return False
    if missing:
        log.warning("θ0 is there without %s: made again, on another processor with other rounding.", missing[0])
        return False
    log.warning("θ0 is already there: kept.")
    return True


def adopt(layout: Layout, encoded: Encoded) -> None:
    """Write the given θ0 where a trained one would be.

    Raises:
        UserError: as :func:`given_unet`, :func:`check_fits` and :func:`merge_lora`.
    """
    recipe, key = layout.config.train, "train.pretrained"
    sources = {"given": given_source(recipe.pretrained, key), "data": read_json(layout.encode_manifest)["source"]}
    sources |= {"parent": given_source(recipe.parent, "train.parent")} if recipe.parent else {}
    sources |= {"lora": sha256_of(lora_file(recipe.lora))} if recipe.lora else {}
    own = fingerprint([sources, recipe.model_dump(mode="json"), stage_versions("train")])
    if is_there(layout, own):
        return
    unet, scheduler = given_unet(recipe.pretrained, key), given_scheduler(recipe.pretrained, key)
    check_fits(unet, scheduler, recipe, encoded)
    if recipe.parent:
        check_descends(unet, scheduler, recipe.parent)
    inputs = {"encoded": layout.encode_manifest}
    if recipe.lora:
        merge_lora(unet, recipe.lora)
        inputs["lora"] = lora_file(recipe.lora)
    made_by = provenance(layout.config.digest_of("train"), inputs)
    made_by |= {"given": sources["given"]}
    Path(layout.recipe).unlink(missing_ok=True)
    save_architecture(unet, scheduler, layout)
    write_tensors(layout.weights, unet.state_dict(), made_by)
    write_table(layout.curve, pd.DataFrame(columns=["step", "loss", "learning_rate"]))
    told = {"given": recipe.pretrained, "key": own, "sha256": sha256_of(layout.weights)}
    write_json(layout.recipe, told | {"made_by": made_by})
