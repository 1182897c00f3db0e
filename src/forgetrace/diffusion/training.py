"""Training from scratch: θ0 and every leave-K-out model run this one loop.

The loop is deterministic on one machine given (recipe, seed, removed images, threads). A checkpoint
every few hundred steps holds everything the loop depends on, so a killed training ends with the same
weights as an uninterrupted one. ``accelerate`` places it on the device and, when started with
``accelerate launch`` or ``torchrun``, on several: the batch of a step is drawn as one and split between
processes. On CPUs it must be ``torchrun``: ``accelerate launch --cpu`` starts one process, whatever it is told.
"""

import contextlib
import logging
import math
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from forgetrace.artifacts import UserError, atomic, fingerprint, read_json, stage_versions, write_tensors
from forgetrace.config import Train
from forgetrace.diffusion.device import make_deterministic, pick_device, resolve_precision
from forgetrace.diffusion.draws import draw_step
from forgetrace.diffusion.given import check_fits, given_source
from forgetrace.diffusion.loss import example_losses
from forgetrace.diffusion.model import build_scheduler, initial_unet
from forgetrace.encoding.store import Encoded
from forgetrace.layout import Layout
from forgetrace.progress import progress

log = logging.getLogger(__name__)
Weights = dict[str, torch.Tensor]
HELD_CAPTIONS = 2**30  # bytes of token states


@dataclass(frozen=True)
class Training:
    """What makes one training differ from another of the same recipe.

    Attributes:
        name: for messages and the checkpoint folder.
        seed: of the weights and of every draw.
        removed: images left out, (N,), bool.
    """

    name: str
    seed: int
    removed: np.ndarray = field(repr=False)


def learning_rate(recipe: Train, step: int) -> float:
    """Linear warm-up, then cosine decay that reaches zero after the last step."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    share = (step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def training_key(layout: Layout, training: Training, precision: str) -> str:
    """Fingerprint of everything a training's result depends on, but for the machine."""
    recipe = layout.config.train
    parent = {"parent": given_source(recipe.parent, "train.parent")} if recipe.parent else {}
    return fingerprint(
        {
            "recipe": recipe.model_dump(exclude={"checkpoint_every", "snapshots", "pretrained", "parent"}),
            "precision": precision,
            "seed": training.seed,
            "removed": np.flatnonzero(training.removed).tolist(),
            "data": read_json(layout.encode_manifest)["source"],
            # Without the build: +cpu and +cu130 are one version, and the machine is not part of the key.
            "torch": torch.__version__.partition("+")[0],
            "versions": stage_versions("encode", "train", "retrain"),
        }
        | parent
    )


def train(
    layout: Layout,
    encoded: Encoded,
    training: Training,
    device: str = "auto",
    snapshots: Collection[int] = (),
) -> tuple[Weights, pd.DataFrame, dict]:
    """Train a model from scratch, or resume where a killed run left off.

    Args:
        layout: the experiment; its recipe is ``config.train``.
        encoded: the training set, D.
        training: seed and removed images.
        device: as :func:`forgetrace.diffusion.device.pick_device`.
        snapshots: numbers of finished steps whose raw weights go to :func:`snapshot_path`.

    Returns:
        The averaged (EMA) weights, the curve (step, loss, learning_rate) and a record of the run.

    Raises:
        UserError: the batch cannot be split between the processes, or the loss is not finite.
    """
    recipe = layout.config.train
    if recipe.lacks:
        raise UserError(f"No model can be trained here: {recipe.lacks}.")
    torch.set_num_threads(recipe.threads)
    target = pick_device(device)
    precision = resolve_precision(recipe.precision, target)
    accelerator = Accelerator(cpu=target.type == "cpu", mixed_precision="bf16" if precision == "bf16" else "no")
    if recipe.batch_size % accelerator.num_processes:
        raise UserError(
            f"train.batch_size = {recipe.batch_size} cannot be split evenly between "
            f"{accelerator.num_processes} processes."
        )
    make_deterministic()
    loop = _Loop(layout, encoded, training, accelerator, precision)
    loop.resume(snapshots)
    with progress(total=recipe.steps, unit="step", what=f"train {training.name}", done=loop.step) as bar:
        while loop.step < recipe.steps:
            loop.run_step()
            bar.update()
            if not accelerator.is_main_process:
                continue
            # Before the checkpoint: a run that resumes after this step does not come by here again.
            if loop.step in snapshots:
                write_tensors(snapshot_path(layout, training.name, loop.step), loop.raw_weights(), {})
            if loop.step % recipe.checkpoint_every == 0 and loop.step < recipe.steps:
                loop.save_checkpoint()
    record = {"key": loop.key, "seed": training.seed, "precision": precision, "threads": recipe.threads}
    record |= {"processes": accelerator.num_processes, "removed": int(training.removed.sum())}
    return loop.averaged_weights(), loop.curve(), record


class _Loop:
    """The state of a training and its one step."""

    def __init__(self, layout: Layout, encoded: Encoded, training: Training, accelerator: Accelerator, precision: str):
        recipe = layout.config.train
        self.recipe, self.encoded, self.training, self.accelerator = recipe, encoded, training, accelerator
        self.shape = tuple(encoded.latents.shape[1:])
        unet = initial_unet(recipe, self.shape, encoded.captions.shape[2], training.seed)
        self.scheduler = build_scheduler(recipe)
        if recipe.parent:
            check_fits(unet, self.scheduler, recipe, encoded)
        unet = unet.to(accelerator.device)
        self.ema = EMAModel(unet.parameters(), decay=recipe.ema_decay, foreach=True)
        optimizer = torch.optim.AdamW(
            unet.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        self.unet, self.optimizer = accelerator.prepare(unet, optimizer)
        # Few captions are kept where the work is; many are read from disk as they come.
        few = encoded.captions.nbytes <= HELD_CAPTIONS
        self.captions = encoded.captions.float().to(accelerator.device) if few else None
        # In bf16 on a CPU the fused attention kernel's backward takes half of the step.
        math_attention = precision == "bf16" and accelerator.device.type == "cpu"
        self.attention = (lambda: sdpa_kernel(SDPBackend.MATH)) if math_attention else contextlib.nullcontext
        self.step, self.losses = 0, []
        self.key = training_key(layout, training, precision)
        self.layout = layout

    def run_step(self) -> None:
        """One optimiser step."""
        rows, captions, timesteps, noise = self._batch()
        rate = learning_rate(self.recipe, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self.attention():
            loss = example_losses(self.unet, self.scheduler, rows, captions, timesteps, noise).mean()
            self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.unet.parameters(), self.recipe.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self._bare().parameters())
        self.losses.append(self.accelerator.reduce(loss.detach(), "mean").item())
        self.step += 1
        if not math.isfinite(self.losses[-1]):
            raise UserError(
                f"The training {self.training.name} diverged at step {self.step} (loss {self.losses[-1]}): "
                "lower train.learning_rate or raise train.warmup_steps."
            )

    def _batch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """This process's share of the step's latents, token states, timesteps and noise."""
        recipe, device = self.recipe, self.accelerator.device
        draw = draw_step(
            self.training.seed,
            self.step,
            self.training.removed,
            recipe.batch_size,
            recipe.timesteps,
            self.shape,
            recipe.caption_dropout,
        )
        part = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        picks = draw.picks[part] if self.encoded.has_views else None
        rows, captions = self.encoded.views(draw.rows[part], picks)
        captions[torch.from_numpy(draw.dropped[part])] = self.encoded.empty_row
        return (
            self.encoded.batch(rows).to(device),
            self.encoded.states(captions).to(device) if self.captions is None else self.captions[captions.to(device)],
            torch.from_numpy(draw.timesteps[part]).to(device),
            torch.from_numpy(draw.noise[part]).to(device),
        )

    def _bare(self) -> torch.nn.Module:
        return self.accelerator.unwrap_model(self.unet)

    def raw_weights(self) -> Weights:
        """The weights the optimiser works on."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self._bare().state_dict().items()}

    def averaged_weights(self) -> Weights:
        """The exponential moving average of the weights."""
        names = [name for name, _ in self._bare().named_parameters()]
        average = {name: tensor.detach().cpu() for name, tensor in zip(names, self.ema.shadow_params, strict=True)}
        return self.raw_weights() | average

    def curve(self) -> pd.DataFrame:
        """Loss and learning rate of every step, from 1."""
        rates = [learning_rate(self.recipe, step) for step in range(self.step)]
        return pd.DataFrame({"step": range(1, self.step + 1), "loss": self.losses, "learning_rate": rates})

    def save_checkpoint(self) -> None:
        """Write everything the rest of the loop depends on."""
        state = {
            "key": self.key,
            "step": self.step,
            "losses": self.losses,
            "weights": self._bare().state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
        }
        # Given an open file, torch reports a full disk as the OSError it is.
        with atomic(self._checkpoint()) as temporary, open(temporary, "wb") as out:
            torch.save(state, out)

    def _checkpoint(self) -> Path:
        return Path(self.layout.checkpoints(self.training.name)) / "last.pt"

    def resume(self, snapshots: Collection[int]) -> None:
        """Continue from the checkpoint, where there is one of this very training with its snapshots."""
        path, name = self._checkpoint(), self.training.name
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            key, step = state["key"], state["step"]
        except Exception as error:
            log.warning("%s is damaged (%s); training %s from the start.", path, error, name)
            return
        if key != self.key:
            log.warning("%s is of another training; training %s from the start.", path, name)
            return
        if not all(snapshot_path(self.layout, name, past).exists() for past in snapshots if past <= step):
            log.warning("%s lacks earlier snapshots; training %s from the start.", path.parent, name)
            return
        self._bare().load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.ema.to(self.accelerator.device)
        self.step, self.losses = step, state["losses"]
        log.warning("Resuming the training %s after step %d.", name, step)


def snapshot_path(layout: Layout, training: str, step: int) -> Path:
    """Where an unfinished training keeps a snapshot.

    Beside its checkpoints, because Snakemake removes a killed job's outputs before it runs it again.
    """
    return Path(layout.checkpoints(training)) / f"step-{step:06d}.safetensors"


def discard_checkpoints(layout: Layout, training: str) -> None:
    """Remove a finished training's checkpoints; called once its outputs are in place."""
    shutil.rmtree(layout.checkpoints(training), ignore_errors=True)
