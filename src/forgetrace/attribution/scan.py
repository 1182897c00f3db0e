"""The ``scan`` stage: the loss of every training image at every scan timestep.

Two scans are compared image by image, so both use the same (t, ε). Results go to a memory-mapped
file beside the outputs as they come; a killed scan continues with the images that are missing.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from forgetrace.artifacts import (
    UserError,
    fingerprint,
    provenance,
    read_array,
    sha256_of,
    stage_versions,
    write_array,
    write_arrays,
)
from forgetrace.diffusion.device import pick_device
from forgetrace.diffusion.inference import for_inference
from forgetrace.diffusion.loss import example_losses
from forgetrace.diffusion.model import load_scheduler, load_unet
from forgetrace.diffusion.noise import NoiseBank, spaced_timesteps
from forgetrace.encoding.store import Encoded, load_encoded
from forgetrace.layout import Layout
from forgetrace.progress import progress


def scan(layout: Layout, variant: str | None = None, query: str | None = None, device: str = "auto") -> None:
    """Scan under θ0, or under the unlearned weights of (variant, query).

    Raises:
        UserError: weights or data are missing, damaged or do not fit.
    """
    encoded, scheduler = load_encoded(layout), load_scheduler(layout)
    weights = layout.unlearned(variant, query)["weights"] if variant and query else layout.weights
    output = layout.scan(variant, query) if variant and query else layout.base_scan
    unet = for_inference(load_unet(layout, pick_device(device), changed=weights))
    bank = scan_noise(layout, encoded, scheduler)
    made_by = provenance(layout.config.digest_of("seed", "scan"), {"base": layout.weights, "weights": weights})
    key = fingerprint([made_by, sha256_of(layout.latents), stage_versions("scan")])
    partial = Path(layout.checkpoints("scan")) / f"{key}.npy"
    losses = _resumable(partial, (len(encoded), len(bank.timesteps)))
    scan_losses(unet, scheduler, encoded, bank, losses, layout.config.scan.batch_size)
    write_arrays(output, {"losses": np.array(losses), "timesteps": bank.timesteps}, made_by)
    partial.unlink()


def scan_noise(layout: Layout, encoded: Encoded, scheduler: DDPMScheduler) -> NoiseBank:
    """The noise all scans of an experiment share."""
    settings = layout.config.scan
    timesteps = spaced_timesteps(settings.timesteps, scheduler.config.num_train_timesteps)
    shape = tuple(encoded.latents.shape[1:])
    return NoiseBank(layout.config.seed, "scan", timesteps, shape, shared=settings.noise == "shared")


@torch.no_grad()
def scan_losses(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    encoded: Encoded,
    bank: NoiseBank,
    losses: np.ndarray,
    batch_size: int,
    rows: np.ndarray | None = None,
) -> None:
    """Fill in the losses of images that are not there yet.

    Args:
        unet: the model, as :func:`for_inference` returns it.
        scheduler: its schedule.
        encoded: D.
        bank: T timesteps with their noise.
        losses: (N, T), float32, NaN where missing; filled in place.
        batch_size: UNet evaluations at once; does not change the result beyond rounding.
        rows: the images to scan, a shard of D; by default all.
    """
    rows = np.arange(len(encoded)) if rows is None else rows
    missing = rows[np.isnan(losses[rows]).any(axis=1)]
    # Images outermost: a batch then holds few captions, each projected to keys and values once.
    draws = min(len(bank.timesteps), batch_size)
    block = batch_size // draws
    with progress(total=len(rows), unit="image", what="scan", done=len(rows) - len(missing)) as bar:
        for start in range(0, len(missing), block):
            part = missing[start : start + block]
            values = [
                _losses(unet, scheduler, encoded, bank, part, range(first, min(first + draws, len(bank.timesteps))))
                for first in range(0, len(bank.timesteps), draws)
            ]
            losses[part] = np.concatenate(values, axis=1)
            bar.update(len(part))


def _losses(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    encoded: Encoded,
    bank: NoiseBank,
    rows: np.ndarray,
    draws: range,
) -> np.ndarray:
    """Losses (images, draws) of one batch."""
    device = next(unet.parameters()).device
    noise = bank.of([encoded.image_ids[row] for row in rows], draws)
    captions = encoded.captions[encoded.caption_rows[torch.from_numpy(rows)]]
    values = example_losses(
        unet,
        scheduler,
        encoded.batch(rows).to(device).repeat_interleave(len(draws), dim=0),
        captions.to(device),
        torch.from_numpy(np.tile(bank.timesteps[draws], len(rows))).to(device),
        torch.from_numpy(noise).to(device),
    )
    return values.reshape(len(rows), len(draws)).cpu().numpy()


def _resumable(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """A memory-mapped array of NaN, or what an interrupted scan left of it."""
    try:
        intact = read_array(path, mmap=True).shape == shape
    except UserError:
        intact = False
    if not intact:
        # Written in full, so that a full disk is noticed now and not when a page is first touched.
        write_array(path, np.full(shape, np.nan, dtype=np.float32))
    return np.load(path, mmap_mode="r+")
