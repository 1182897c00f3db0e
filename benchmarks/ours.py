"""The candidates: forgetrace's public functions, called as its stages call them.

Every function prepares one kind of work and returns the function that does it (see :mod:`benchmarks.workers`).
"""

import time
from functools import partial

import numpy as np
import torch

from benchmarks.workers import synchronise, timed
from forgetrace.attribution.scan import scan_losses, scan_noise
from forgetrace.curvature.diagonal import fit_fisher
from forgetrace.diffusion.device import pick_device
from forgetrace.diffusion.inference import for_inference
from forgetrace.diffusion.model import load_scheduler, load_unet
from forgetrace.diffusion.training import Training, train
from forgetrace.encoding.store import load_encoded
from forgetrace.layout import Layout, load_layout

IMAGES, DRAWS = 48, 128  # a piece of a scan, of a Fisher fit


def scan(config: str, device: str):
    """Evaluations of θ0 on the images from a random one on, so that processes side by side do not share theirs."""
    layout = load_layout(config)
    encoded, scheduler = load_encoded(layout), load_scheduler(layout)
    unet, bank = for_inference(load_unet(layout, pick_device(device))), scan_noise(layout, encoded, scheduler)
    values = np.empty((len(encoded), len(bank.timesteps)), dtype=np.float32)
    place = int(np.random.default_rng().integers(len(encoded)))

    def piece() -> int:
        nonlocal place
        rows = np.arange(place, place + IMAGES) % len(encoded)
        place += IMAGES
        values[rows] = np.nan
        scan_losses(unet, scheduler, encoded, bank, values, layout.config.scan.batch_size, rows)
        return values[rows].size

    return partial(timed, piece)


def losses(config: str, device: str):
    """Losses (images, timesteps) of a scan; the work takes the weights and the rows."""
    layout = load_layout(config)
    encoded, scheduler = load_encoded(layout), load_scheduler(layout)
    bank = scan_noise(layout, encoded, scheduler)

    def work(weights: str, rows: np.ndarray) -> np.ndarray:
        unet = for_inference(load_unet(layout, pick_device(device), changed=weights))
        values = np.full((len(encoded), len(bank.timesteps)), np.nan, dtype=np.float32)
        scan_losses(unet, scheduler, encoded, bank, values, layout.config.scan.batch_size, rows)
        return values[rows]

    return work


def fisher(config: str, device: str):
    """Draws of the Fisher fit."""
    layout = load_layout(config)
    encoded, scheduler, unet = load_encoded(layout), load_scheduler(layout), load_unet(layout, pick_device(device))

    def piece() -> int:
        fit_fisher(unet, scheduler, encoded, DRAWS, layout.config.fit.chunk, layout.config.seed)
        return DRAWS

    return partial(timed, piece)


def training(config: str, device: str, precision: str):
    """Optimiser steps: the difference between a longer and a shorter training, which cost the same to begin."""
    layout = load_layout(config)
    encoded, more = load_encoded(layout), 8
    everything = Training("benchmark", layout.config.seed, np.zeros(len(encoded), dtype=bool))

    def run(steps: int) -> float:
        start = time.perf_counter()
        train(_short(layout, steps, precision), encoded, everything, device)
        synchronise()
        return time.perf_counter() - start

    def work(seconds: float) -> tuple[float, float]:
        nonlocal more
        steps, taken = more, max(run(2 + more) - run(2), 1e-3)
        more = max(8, min(round(steps * seconds / taken), 4 * steps))
        return steps, taken

    return work


def _short(layout: Layout, steps: int, precision: str) -> Layout:
    """The experiment with a training of so few steps that it leaves no checkpoint."""
    changes = {"steps": steps, "warmup_steps": 1, "checkpoint_every": steps, "precision": precision, "threads": 1}
    config = layout.config.model_copy(update={"train": layout.config.train.model_copy(update=changes)})
    return Layout(layout.name, config)


def profile(name: str, *args: object):
    """The fifteen operators that take most time in the work that a function of this module prepares, as a table."""
    work = globals()[name](*args)
    work(0.5)

    def measured(seconds: float) -> str:
        with torch.profiler.profile() as recorded:
            work(seconds)
        by = "self_cuda_time_total" if torch.cuda.is_initialized() else "self_cpu_time_total"
        return recorded.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=45)

    return measured
