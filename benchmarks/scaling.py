"""Cost and memory against the number of training images, up to COCO at the size of the paper."""

import os
import resource
import tempfile
import time
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import Reading, quartiles
from benchmarks.settings import Settings
from benchmarks.workers import cores, devices, interleave, rate, team, timed
from forgetrace.artifacts import sha256_of, write_array, write_json, write_table
from forgetrace.attribution.scan import scan_losses, scan_noise
from forgetrace.config import Train
from forgetrace.diffusion.device import pick_device
from forgetrace.diffusion.inference import for_inference
from forgetrace.diffusion.model import build_scheduler, build_unet, frozen
from forgetrace.encoding.store import load_encoded
from forgetrace.layout import Layout

LATENT, IMAGES = (4, 16, 16), 60  # shape of a latent; images whose losses are computed
SIZES = (1_000, 10_000, 100_000)
# The latent diffusion model on COCO, 128×128 pixels, of Georgiev et al. (arXiv 2312.06205), which AbU attributes.
COCO = 118_287
RECIPE = Train(
    channels=[128, 256, 256, 256],
    cross_attention=[True, True, True, False],
    layers_per_block=2,
    attention_heads=8,
    norm_groups=32,
)
PROMPTS, TOKENS, WIDTH = 256, 77, 1024  # distinct captions of the store; shape of a caption's token states
PUBLISHED_HOURS, CAPTIONS = 2.28, 5


def scaling(settings: Settings) -> dict[str, Reading]:
    """Seconds per image and peak memory of a scan against N; memory and hours of COCO."""
    with tempfile.TemporaryDirectory() as folder:
        recipe, readings = settings.layout.config.train, {}
        teams = [_opened(settings, folder, size, recipe) for size in SIZES]
        with teams[0] as small, teams[1] as middle, teams[2] as large:
            every = small, middle, large
            sides = [partial(rate, workers, IMAGES) for workers in every]
            rates = interleave(sides, settings.repeats)
            peaks = [workers[0].call(None) for workers in every]
        costs = [small / large for small, large in zip(rates[0], rates[2], strict=True)]
        how = {"seconds_per_image": {n: 1 / float(np.median(r)) for n, r in zip(SIZES, rates, strict=True)}}
        how["peak_gb"] = dict(zip(SIZES, peaks, strict=True))
        value, spread = float(np.median(costs)), quartiles(costs)
        # 100k against 1k images; "within 10%" both ways, as the distance from 1.
        readings["scaling"] = Reading(
            abs(value - 1), "", "<= 0.1", None, {"cost_ratio": value, "quartiles": spread} | how
        )
        return readings | _coco(settings, folder)


def _coco(settings: Settings, folder: str) -> dict[str, Reading]:
    start = time.perf_counter()
    with _opened(settings, folder, COCO, RECIPE, every=4000) as (worker,):
        worker.call(COCO)
        peak = worker.call(None)
    all_captions = COCO * TOKENS * WIDTH * 4 / 2**30
    how = {"streaming_seconds": time.perf_counter() - start}
    how["note"] = f"{PROMPTS} distinct captions; one for each image would take {all_captions:.0f} GB on disk"
    readings = {"coco-memory": Reading(peak, "GB", "<= 4", None, how)}
    for device, processes in [("cpu", cores()), *((device, 1) for _, device, _ in settings.accelerators)]:
        layout = _layout(settings, COCO)
        with team(processes, random_unet, folder, layout, RECIPE, device, 1) as workers:
            images = 3 if device == "cpu" else 120
            (rates,) = interleave([partial(rate, workers, images)], min(3, settings.repeats))
        speed = float(np.median(rates)) * layout.config.scan.timesteps
        hours = COCO * layout.config.scan.timesteps / speed / 3600
        how = {"evaluations_per_s": speed, "processes": processes, "hours_5_captions": hours * CAPTIONS}
        how |= {"published_hours": PUBLISHED_HOURS, "note": _ASSUMED}
        readings[f"coco-hours-{device}"] = Reading(
            hours, "h", None, quartiles([hours * np.median(rates) / r for r in rates]), how
        )
    return readings


_ASSUMED = (
    "one scan of one query, one caption per image, the config's timesteps (20 in the paper), random weights, fp32,"
    " all processes at once; without the scan of θ0, which all queries share; the published figure is for a GPU of"
    " the paper's"
)


def _layout(settings: Settings, images: int) -> Layout:
    return Layout(f"images-{images}", settings.layout.config)


def _opened(settings: Settings, folder: str, images: int, recipe: Train, every: int = 1):
    """A worker with a store of so many images, which is written first."""
    layout = _layout(settings, images)
    write_store(Path(folder), layout, images)
    return team(1, random_unet, folder, layout, recipe, devices()[-1], every)


def write_store(folder: Path, layout: Layout, images: int) -> None:
    """Random latents, captions and their index, as the encode stage leaves them."""
    import pandas as pd

    random = np.random.default_rng(0)
    files = {"latents": layout.latents, "captions": layout.captions, "index": layout.index}
    paths = {role: folder / path for role, path in files.items()}
    paths["latents"].parent.mkdir(parents=True)
    latents = np.lib.format.open_memmap(paths["latents"], "w+", np.float32, (images, *LATENT))
    for start in range(0, images, 1000):
        part = latents[start : start + 1000]
        part[:] = random.standard_normal(part.shape, dtype=np.float32)
    latents.flush()
    write_array(paths["captions"], random.standard_normal((PROMPTS + 1, TOKENS, WIDTH), dtype=np.float32))
    rows = np.arange(images) % PROMPTS
    index = {"image_id": [f"image-{i:06d}" for i in range(images)], "caption_row": rows}
    write_table(paths["index"], pd.DataFrame(index))
    hashes = {role: sha256_of(path) for role, path in paths.items()}
    write_json(folder / layout.encode_manifest, {"sha256": hashes})


class Sampled(torch.nn.Module):
    """A UNet asked for one batch in ``every``; the others pass through unchanged, to test the path of the data."""

    def __init__(self, unet: torch.nn.Module, every: int):
        super().__init__()
        self.unet, self.every, self.calls = unet, every, count()

    def forward(self, inputs: torch.Tensor, *args: object, **options: object) -> tuple[torch.Tensor]:
        """As the UNet with ``return_dict=False``."""
        return (inputs,) if next(self.calls) % self.every else self.unet(inputs, *args, **options)


def random_unet(folder: str, layout: Layout, recipe: Train, device: str, every: int):
    """A scan of images spread over the store; the work returns (images, seconds), asked for None the peak in GB."""
    os.chdir(folder)
    encoded, scheduler = load_encoded(layout), build_scheduler(recipe)
    unet = for_inference(frozen(build_unet(recipe, LATENT, WIDTH, 0), pick_device(device)))
    asked, bank = Sampled(unet, every), scan_noise(layout, encoded, scheduler)
    partial_file = Path(f"losses-{os.getpid()}.npy")
    write_array(partial_file, np.full((len(encoded), len(bank.timesteps)), np.nan, dtype=np.float32))
    losses = np.load(partial_file, mmap_mode="r+")

    def work(images: int | None):
        if images is None:
            return _peak()
        rows = np.linspace(0, len(encoded) - 1, images).astype(int)
        losses[rows] = np.nan
        piece = partial(scan_losses, asked, scheduler, encoded, bank, losses, layout.config.scan.batch_size, rows)
        return timed(lambda: piece() or images, 0)

    return work


def _peak() -> float:
    """Largest resident memory of this process so far, GB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts the process this one was forked from
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
