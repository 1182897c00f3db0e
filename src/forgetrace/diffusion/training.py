"""Training from scratch: θ0 and every leave-K-out model run this one loop, alone or several models as one.

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
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from forgetrace.artifacts import UserError, atomic, fingerprint, read_json, stage_versions, write_json, write_tensors
from forgetrace.config import Train
from forgetrace.diffusion.captured import Captured
from forgetrace.diffusion.device import (
    Repeatable,
    make_deterministic,
    native_bf16,
    pick_device,
    processor_name,
    resolve_precision,
)
from forgetrace.diffusion.draws import draw_step
from forgetrace.diffusion.given import check_fits, given_source
from forgetrace.diffusion.loss import example_losses
from forgetrace.diffusion.model import build_scheduler, initial_unet
from forgetrace.diffusion.stacked import clip_each, stacked
from forgetrace.encoding.store import Encoded
from forgetrace.layout import BASE, STACKED, Layout
from forgetrace.progress import progress

log = logging.getLogger(__name__)
Weights = dict[str, torch.Tensor]
HELD_CAPTIONS = 2**30  # bytes of token states
NAMES = "names.json"  # of models trained as one, beside their checkpoint


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


def precision_of(layout: Layout, device: torch.device) -> str:
    """The precision of all trainings of an experiment: what the config leaves open, a θ0 that is there has decided.

    Else a model of a node without bf16 would be compared with a θ0 of one that has it.
    """
    own, training = layout.config.train.precision, Training(BASE, layout.config.seed, np.zeros(0, dtype=bool))
    if own == "auto":
        with contextlib.suppress(UserError):
            record = read_json(layout.recipe)
            decided = record.get("precision", own)
            own = decided if record.get("key") == training_key(layout, training, decided) else own
    return resolve_precision(own, device)


def training_key(layout: Layout, training: Training, precision: str) -> str:
    """Fingerprint of everything a training's result depends on, but for what rounds: the machine and torch."""
    recipe = layout.config.train
    parent = {"parent": given_source(recipe.parent, "train.parent")} if recipe.parent else {}
    return fingerprint(
        {
            "recipe": recipe.model_dump(exclude={"checkpoint_every", "snapshots", "pretrained", "parent"}),
            "precision": precision,
            "seed": training.seed,
            "removed": np.flatnonzero(training.removed).tolist(),
            "data": read_json(layout.encode_manifest)["source"],
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
    return train_as_one(layout, encoded, [training], device, snapshots)[0]


def train_as_one(
    layout: Layout,
    encoded: Encoded,
    trainings: Sequence[Training],
    device: str = "auto",
    snapshots: Collection[int] = (),
) -> list[tuple[Weights, pd.DataFrame, dict]]:
    """As :func:`train` for several models of one recipe: each comes out as it would alone, but for rounding.

    Args:
        layout: the experiment; its recipe is ``config.train``.
        encoded: the training set, D.
        trainings: seeds and removed images, M ≥ 1.
        device: as :func:`forgetrace.diffusion.device.pick_device`.
        snapshots: as for :func:`train`, of a single training.

    Returns:
        For each training what :func:`train` returns.

    Raises:
        UserError: as for :func:`train`, or the architecture has layers that cannot be stacked.
    """
    recipe, loop = layout.config.train, begin(layout, encoded, trainings, device)
    accelerator = loop.accelerator
    loop.resume(snapshots)
    with progress(total=recipe.steps, unit="step", what=f"train {loop.called}", done=loop.step) as bar:
        while loop.step < recipe.steps:
            loop.run_step()
            bar.update()
            if not accelerator.is_main_process:
                continue
            # Before the checkpoint: a run that resumes after this step does not come by here again.
            if loop.step in snapshots:
                write_tensors(snapshot_path(layout, trainings[0].name, loop.step), loop.raw_weights()[0], {})
            # That of the last step serves models trained as one, which take long to be asked; a single one is at once.
            if loop.step % recipe.checkpoint_every == 0 if loop.step < recipe.steps else not loop.alone:
                loop.save_checkpoint()
    same = {"precision": loop.precision, "threads": recipe.threads, "processes": accelerator.num_processes}
    same |= {"torch": torch.__version__, "processor": processor_name(accelerator.device)}
    records = [
        {"key": key, "seed": training.seed, "removed": int(training.removed.sum())} | same
        for key, training in zip(loop.keys, trainings, strict=True)
    ]
    trained = list(zip(loop.averaged_weights(), loop.curves(), records, strict=True))
    loop.close()
    return trained


def begin(layout: Layout, encoded: Encoded, trainings: Sequence[Training], device: str = "auto") -> "_Loop":
    """The trainings before their first step, and the process set up for them; arguments and errors of train_as_one."""
    recipe = layout.config.train
    if recipe.lacks:
        raise UserError(f"No model can be trained here: {recipe.lacks}.")
    torch.set_num_threads(recipe.threads)
    target = pick_device(device)
    precision = precision_of(layout, target)
    if precision == "bf16" != recipe.precision and not native_bf16(target):
        log.warning(
            "θ0 was trained in bf16, which is slow on this processor: set train.precision and train another θ0."
        )
    accelerator = Accelerator(cpu=target.type == "cpu", mixed_precision="bf16" if precision == "bf16" else "no")
    if recipe.batch_size % accelerator.num_processes:
        raise UserError(
            f"train.batch_size = {recipe.batch_size} cannot be split evenly between "
            f"{accelerator.num_processes} processes."
        )
    make_deterministic()
    return _Loop(layout, encoded, trainings, accelerator, precision)


class _Loop:
    """The state of the trainings and their one step."""

    def __init__(
        self,
        layout: Layout,
        encoded: Encoded,
        trainings: Sequence[Training],
        accelerator: Accelerator,
        precision: str,
    ):
        recipe = layout.config.train
        self.recipe, self.encoded, self.trainings, self.accelerator = recipe, encoded, trainings, accelerator
        self.precision = precision
        self.shape = tuple(encoded.latents.shape[1:])
        unets = [initial_unet(recipe, self.shape, encoded.captions.shape[2], training.seed) for training in trainings]
        self.scheduler = build_scheduler(recipe)
        if recipe.parent:
            check_fits(unets[0], self.scheduler, recipe, encoded)
        unet = (unets[0] if self.alone else stacked(unets)).to(accelerator.device)
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
        self.repeatable = Repeatable(accelerator.device, accelerator.num_processes)
        self.gradients = self._recomputed
        if accelerator.device.type == "cuda" and accelerator.num_processes == 1:
            self.gradients = Captured(self._gradients, self.optimizer.zero_grad)
        self.step, self.losses = 0, []
        # Of now: files may change while the training runs.
        self.keys = [training_key(layout, training, precision) for training in trainings]
        self.key = self.keys[0] if self.alone else fingerprint(self.keys)
        self.called = trainings[0].name if self.alone else f"{len(trainings)} models"
        self.checkpoints = checkpoints_of(layout, trainings)
        self.layout = layout
        # On a GPU the next batch is drawn beside a step.
        self.draws_ahead, self.drawn, self.ahead = accelerator.device.type != "cpu", None, ThreadPoolExecutor(1)

    @property
    def alone(self) -> bool:
        """Whether there is one model only, which then is not stacked."""
        return len(self.trainings) == 1

    def run_step(self) -> None:
        """One optimiser step."""
        drawn = self._draw(self.step) if self.drawn is None else self.drawn.result()
        self.drawn = None
        if self.draws_ahead and self.step + 1 < self.recipe.steps:
            self.drawn = self.ahead.submit(self._draw, self.step + 1)
        rate = learning_rate(self.recipe, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = self.gradients(*self._batch(*drawn))
        if self.alone:
            self.accelerator.clip_grad_norm_(self.unet.parameters(), self.recipe.gradient_clip)
        else:
            clip_each(list(self.unet.parameters()), self.recipe.gradient_clip)
        self.optimizer.step()
        self.ema.step(self._bare().parameters())
        self.losses.append(self.accelerator.reduce(losses, "mean").tolist())
        self.step += 1
        for training, loss in zip(self.trainings, self.losses[-1], strict=True):
            if not math.isfinite(loss):
                raise UserError(
                    f"The training {training.name} diverged at step {self.step} (loss {loss}): "
                    "lower train.learning_rate or raise train.warmup_steps."
                )

    def _gradients(self, *batch: torch.Tensor) -> torch.Tensor:
        """Leave the gradients of a batch; the mean loss of each model, (M,)."""
        return self.repeatable(partial(self._computed, *batch), self.optimizer.zero_grad)

    def _computed(
        self, latents: torch.Tensor, captions: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        with self.attention():
            losses = example_losses(self.unet, self.scheduler, latents, captions, timesteps, noise)
            losses = losses.view(len(self.trainings), -1).mean(dim=1)
            self.accelerator.backward(losses.sum())
        return losses.detach()

    def _recomputed(self, *batch: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        return self._gradients(*batch)

    def _draw(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """This process's share of a step: latents, rows of captions, timesteps and noise, model by model."""
        recipe = self.recipe
        draws = [
            draw_step(
                training.seed,
                step,
                training.removed,
                recipe.batch_size,
                recipe.timesteps,
                self.shape,
                recipe.caption_dropout,
            )
            for training in self.trainings
        ]
        part = slice(self.accelerator.process_index, None, self.accelerator.num_processes)

        def joined(name: str) -> np.ndarray:
            return np.concatenate([getattr(draw, name)[part] for draw in draws])

        picks = joined("picks") if self.encoded.has_views else None
        rows, captions = self.encoded.views(joined("rows"), picks)
        captions[torch.from_numpy(joined("dropped"))] = self.encoded.empty_row
        return (
            self.encoded.batch(rows),
            captions,
            torch.from_numpy(joined("timesteps")),
            torch.from_numpy(joined("noise")),
        )

    def _batch(
        self, latents: torch.Tensor, captions: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What was drawn, where the work is: latents, token states, timesteps, noise."""
        device = self.accelerator.device
        states = self.encoded.states(captions) if self.captions is None else self.captions[captions.to(device)]
        return latents.to(device), states.to(device), timesteps.to(device), noise.to(device)

    def close(self) -> None:
        """Let go of the device's memory: the step that is kept for replay refers to the loop, and the loop to it."""
        self.gradients = None
        self.ahead.shutdown()

    def _bare(self) -> torch.nn.Module:
        return self.accelerator.unwrap_model(self.unet)

    def _apart(self, weights: Weights) -> list[Weights]:
        """Each model's own weights."""
        weights = {name: tensor.detach().cpu() for name, tensor in weights.items()}
        if self.alone:
            return [{name: tensor.clone() for name, tensor in weights.items()}]
        return [
            {name: tensor[model].clone() for name, tensor in weights.items()} for model in range(len(self.trainings))
        ]

    def raw_weights(self) -> list[Weights]:
        """The weights the optimiser works on, of each model."""
        return self._apart(self._bare().state_dict())

    def averaged_weights(self) -> list[Weights]:
        """The exponential moving average of the weights, of each model."""
        names = [name for name, _ in self._bare().named_parameters()]
        return self._apart(self._bare().state_dict() | dict(zip(names, self.ema.shadow_params, strict=True)))

    def curves(self) -> list[pd.DataFrame]:
        """Each model's loss and learning rate of every step, from 1."""
        rates = [learning_rate(self.recipe, step) for step in range(self.step)]
        return [
            pd.DataFrame({"step": range(1, self.step + 1), "loss": losses, "learning_rate": rates})
            for losses in np.array(self.losses).reshape(-1, len(self.trainings)).T
        ]

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
        if not self.alone:  # who resumes has to find them by some of their names
            write_json(Path(self.checkpoints, NAMES), [training.name for training in self.trainings])
        # Given an open file, torch reports a full disk as the OSError it is.
        with atomic(self._checkpoint()) as temporary, open(temporary, "wb") as out:
            torch.save(state, out)

    def _checkpoint(self) -> Path:
        return Path(self.checkpoints) / "last.pt"

    def resume(self, snapshots: Collection[int]) -> None:
        """Continue from the checkpoint, where there is one of this very training with its snapshots."""
        path, name = self._checkpoint(), self.called
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
        kept = (snapshot_path(self.layout, self.trainings[0].name, past) for past in snapshots if past <= step)
        if not all(path.exists() for path in kept):
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


def checkpoints_of(layout: Layout, trainings: Sequence[Training]) -> str:
    """Folder of the checkpoints of these trainings, alone or as one."""
    names = [training.name for training in trainings]
    return layout.checkpoints(names[0] if len(names) == 1 else f"{STACKED}/{fingerprint(names)[:16]}")


def unfinished(layout: Layout, trainings: Sequence[Training], missing: Sequence[Training]) -> list[Training]:
    """Those of the trainings that a killed run trained as one, all missing ones among them; these where there was none.

    Some may have said already what was asked of them.
    """
    by_name, needed = {training.name: training for training in trainings}, {training.name for training in missing}
    for path in sorted(Path(layout.checkpoints(STACKED)).glob(f"*/{NAMES}")):
        try:
            names = read_json(path)
        except UserError:  # damaged, or of a job that has just ended
            continue
        if needed <= set(names) <= by_name.keys() and (path.parent / "last.pt").exists():
            return [by_name[name] for name in names]
    return list(missing)


def discard_checkpoints(layout: Layout, *trainings: Training) -> None:
    """Remove the checkpoints of finished trainings, of all as one and of some; called when their outputs are there."""
    shutil.rmtree(checkpoints_of(layout, trainings), ignore_errors=True)
    finished = {training.name for training in trainings}
    for path in Path(layout.checkpoints(STACKED)).glob(f"*/{NAMES}"):
        with contextlib.suppress(UserError):  # of a job that has just ended
            if set(read_json(path)) <= finished:
                shutil.rmtree(path.parent, ignore_errors=True)
