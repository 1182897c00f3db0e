"""The references: diffusers and PyTorch as they come, in fp32, one loop each; what a straightforward program does.

Every function prepares one kind of work and returns the function that does it for some seconds (see
:mod:`benchmarks.workers`). Nothing here calls ``pick_device``, which tunes the process.
"""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel

from benchmarks.workers import timed
from forgetrace.attribution.scan import scan_noise
from forgetrace.diffusion.loss import batched_losses, noised
from forgetrace.diffusion.model import build_scheduler, build_unet, load_scheduler, load_unet
from forgetrace.encoding.store import load_encoded
from forgetrace.layout import load_layout

torch.backends.cudnn.allow_tf32 = False  # fp32 on a GPU too, as matrix products are by default


def scan(config: str, device: str):
    """Evaluations of θ0 on images × timesteps, fresh noise for every batch; the work takes the batch size."""
    layout = load_layout(config)
    encoded, scheduler, unet = load_encoded(layout), load_scheduler(layout), load_unet(layout, torch.device(device))
    timesteps = torch.from_numpy(scan_noise(layout, encoded, scheduler).timesteps).to(device)
    place = 0

    @torch.no_grad()
    def piece(batch: int) -> int:
        nonlocal place
        rows = np.arange(place, place + max(1, batch // len(timesteps))) % len(encoded)
        place += len(rows)
        latents = encoded.batch(rows).to(device).repeat_interleave(len(timesteps), dim=0)
        captions = encoded.captions[encoded.caption_rows[rows]].to(device).repeat_interleave(len(timesteps), dim=0)
        steps, noise = timesteps.repeat(len(rows)), torch.randn_like(latents)
        inputs, target = noised(scheduler, latents, noise, steps)
        prediction = unet(inputs, steps, encoder_hidden_states=captions).sample
        return len(F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3)).cpu())

    return lambda seconds, batch: timed(lambda: piece(batch), seconds)


def losses(config: str, device: str):
    """Losses (images, timesteps) of the plain UNet on the scan's own (t, ε); the work takes weights and rows."""
    layout = load_layout(config)
    encoded, scheduler = load_encoded(layout), load_scheduler(layout)
    bank = scan_noise(layout, encoded, scheduler)

    def work(weights: str, rows: np.ndarray) -> np.ndarray:
        count, unet = len(bank.timesteps), load_unet(layout, torch.device(device), changed=weights)
        examples = np.repeat(rows, count)
        latents, captions = encoded.batch(examples), encoded.captions[encoded.caption_rows[rows]]
        captions = captions.repeat_interleave(count, dim=0)
        noise = bank.of([encoded.image_ids[row] for row in rows], np.tile(np.arange(count), (len(rows), 1)))
        values = batched_losses(unet, scheduler, latents, captions, np.tile(bank.timesteps, len(rows)), noise)
        return values.reshape(len(rows), count)

    return work


def fisher(config: str, device: str):
    """Squared gradients of single draws, one forward and backward pass each, summed in fp32."""
    layout = load_layout(config)
    encoded, scheduler = load_encoded(layout), load_scheduler(layout)
    unet = load_unet(layout, torch.device(device)).requires_grad_(True)
    total = [torch.zeros_like(weight) for weight in unet.parameters()]

    def piece() -> int:
        unet.zero_grad()
        _loss(unet, scheduler, encoded, 1, device).backward()
        for sum_, weight in zip(total, unet.parameters(), strict=True):
            sum_ += weight.grad.square()
        return 1

    return lambda seconds: timed(piece, seconds)


def training(config: str, device: str):
    """Optimiser steps of the experiment's recipe: AdamW and EMAModel with their defaults, gradients clipped."""
    layout = load_layout(config)
    recipe, encoded = layout.config.train, load_encoded(layout)
    scheduler, shape = build_scheduler(recipe), tuple(encoded.latents.shape[1:])
    unet = build_unet(recipe, shape, encoded.captions.shape[2], layout.config.seed).to(device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    ema = EMAModel(unet.parameters(), decay=recipe.ema_decay)

    def piece() -> int:
        loss = _loss(unet, scheduler, encoded, recipe.batch_size, device, recipe.caption_dropout)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), recipe.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        loss.item()  # for the training curve
        return 1

    return lambda seconds: timed(piece, seconds)


def _loss(unet, scheduler, encoded, batch: int, device: str, dropout: float = 0.0) -> torch.Tensor:
    """The training loss of a batch of random images, timesteps and noise."""
    rows = torch.randint(len(encoded), (batch,))
    captions = encoded.caption_rows[rows]
    captions[torch.rand(batch) < dropout] = encoded.empty_row
    latents = encoded.batch(rows.numpy()).to(device)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (batch,), device=device)
    inputs, target = noised(scheduler, latents, torch.randn_like(latents), timesteps)
    return F.mse_loss(
        unet(inputs, timesteps, encoder_hidden_states=encoded.captions[captions].to(device)).sample, target
    )
