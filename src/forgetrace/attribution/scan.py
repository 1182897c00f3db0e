"""The ``scan`` stage: the loss of every training image at every scan timestep.

A loss is the mean over the captions of an image; mirror images, where there are any, have rows of their own behind all
others. Two scans are compared row by row, so both use the same (t, ε). The scan of a query may be narrowed to
the images that matter (:mod:`forgetrace.attribution.narrowing`), that of θ0 never is. Results go to a memory-mapped
file beside the outputs as they come; a killed scan continues with the images that are missing. Several jobs may share
a scan: each writes the losses of its images, and the scan that is then asked for puts them together.
"""

import functools
from collections.abc import Callable, Set
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from forgetrace.artifacts import (
    UserError,
    fingerprint,
    provenance,
    read_arrays,
    sha256_of,
    stage_versions,
    write_arrays,
)
from forgetrace.attribution.narrowing import narrow
from forgetrace.attribution.resumable import resumable
from forgetrace.config import Scan
from forgetrace.diffusion.device import pick_device
from forgetrace.diffusion.inference import for_inference
from forgetrace.diffusion.loss import example_losses
from forgetrace.diffusion.model import load_scheduler, load_unet
from forgetrace.diffusion.noise import NoiseBank, even_timesteps, spaced_timesteps
from forgetrace.diffusion.release_noise import ReleaseNoise
from forgetrace.encoding.store import Encoded, load_encoded
from forgetrace.layout import Layout
from forgetrace.progress import progress


def scan(
    layout: Layout,
    variant: str | None = None,
    query: str | None = None,
    device: str = "auto",
    shard: int | None = None,
) -> None:
    """Scan under θ0, or under the unlearned weights of (variant, query).

    Args:
        layout: the experiment.
        variant: how the query was unlearned.
        query: what was unlearned.
        device: as :func:`pick_device` names it.
        shard: which of the ``scan.shards`` parts of the images to scan, from 0; None makes the whole scan of what
            the shards have left, and itself scans what they have not.

    Raises:
        UserError: weights or data are missing, damaged or do not fit.
    """
    settings = layout.config.scan
    encoded, scheduler = load_encoded(layout), load_scheduler(layout)
    of_query = variant is not None and query is not None
    weights = layout.unlearned(variant, query)["weights"] if of_query else layout.weights
    output = layout.scan(variant, query) if of_query else layout.base_scan
    narrowed = of_query and settings.narrowing is not None
    device = pick_device(device)
    bank = scan_noise(layout, encoded, scheduler, device)
    read = {"base": layout.weights, "weights": weights} | ({"before": layout.base_scan} if narrowed else {})
    shaping = settings.model_dump(mode="json") if narrowed else settings.of_base()
    made_by = provenance({"seed": layout.config.seed, "scan": shaping}, read)
    # A trained θ0 hangs on the captions; a given one does not.
    captions = [sha256_of(layout.encode_manifest)] if layout.config.train.pretrained else []
    key = fingerprint([made_by, sha256_of(layout.latents), stage_versions("scan"), *captions])
    rows = np.arange(len(encoded.latents))
    if shard is not None:
        rows = shard_rows(len(encoded.latents), len(bank.timesteps), settings, shard)
    taken = taken_shards(layout, output, key) if shard is None else []
    kinds = {kind for part in taken for kind in part["drawn_on"]} or set(bank.drawn_on)
    check_one_generator(kinds, output)
    name = "-".join([key, *kinds, *([] if shard is None else [str(shard)])])
    partial = Path(layout.checkpoints("scan")) / f"{name}.npy"
    losses = resumable(partial, (len(encoded.latents), len(bank.timesteps)))
    for part in taken:
        losses[part["rows"]] = part["losses"]
    missing = np.isnan(losses[rows])
    total = settings.narrowing.mean * len(losses) if narrowed else missing.size
    if missing.any():
        check_one_generator(kinds.union(bank.drawn_on), output)
        unet = for_inference(load_unet(layout, device, changed=weights))
        evaluate = functools.partial(scan_losses, unet, scheduler, encoded, bank, losses, settings.batch_size)
        with progress(total=round(total), unit="loss", what="scan", done=(~missing).sum()) as bar:
            if narrowed:
                before = base_losses(layout, bank)
                narrow(settings.narrowing, before, losses, functools.partial(evaluate, done=bar.update))
            else:
                evaluate(rows=rows, done=bar.update)
    if shard is None:
        arrays = {"losses": np.array(losses), "timesteps": bank.timesteps}
        write_arrays(output, arrays | ({"drawn_on": np.array([*kinds])} if kinds else {}), made_by)
    else:
        part = {"key": np.array(key), "rows": rows, "losses": losses[rows], "drawn_on": np.array([*kinds], dtype=str)}
        write_arrays(layout.scan_shard(output, shard), part, made_by)
    partial.unlink()


def shard_rows(images: int, draws: int, settings: Scan, shard: int) -> np.ndarray:
    """The images of one of ``settings.shards`` parts: whole batches of the undivided scan, so that no loss differs.

    How a loss is rounded may depend on the size of its batch.
    """
    block = _block(draws, settings.batch_size)
    first = np.linspace(0, -(-images // block), settings.shards + 1).round().astype(int) * block
    return np.arange(first[shard], min(first[shard + 1], images))


def taken_shards(layout: Layout, output: str, key: str) -> list[dict[str, np.ndarray]]:
    """What the shards of a scan have left, as far as it hangs on the same ``key``.

    Returns:
        By shard, the losses (n, T) of its ``rows``, and the kind of device that its noise was drawn on, where the noise
        hangs on that.
    """
    paths = [layout.scan_shard(output, shard) for shard in range(layout.config.scan.shards)]
    parts = [{"drawn_on": np.array([])} | read_arrays(path) for path in paths if Path(path).exists()]
    return [part for part in parts if part["key"] == key]


def check_one_generator(kinds: Set[str], output: str) -> None:
    """Refuse to mix the noise of several kinds of devices in a scan.

    Raises:
        UserError: there are several.
    """
    if len(kinds) > 1:
        raise UserError(
            f"{output}: parts of it were scanned on {' and '.join(sorted(kinds))}, whose generators draw other noise "
            "with scan.noise: release; delete the checkpoints of the scan and run all of it on GPUs of one model."
        )


def base_losses(layout: Layout, bank: NoiseBank | ReleaseNoise) -> np.ndarray:
    """Losses (N, T) of θ0 under a bank.

    Raises:
        UserError: θ0 was not scanned, or with other draws.
    """
    base = read_arrays(layout.base_scan)
    if not np.array_equal(base["timesteps"], bank.timesteps):
        raise UserError(f"{layout.base_scan} was scanned at other timesteps: delete it and scan θ0 again.")
    return base["losses"]


def scan_noise(
    layout: Layout, encoded: Encoded, scheduler: DDPMScheduler, device: torch.device | str = "cpu"
) -> NoiseBank | ReleaseNoise:
    """The noise all scans of an experiment share; published noise is drawn on the device."""
    seed, settings, length = layout.config.seed, layout.config.scan, scheduler.config.num_train_timesteps
    if settings.narrowing:
        timesteps = even_timesteps(seed, "scan", settings.narrowing.most, length)
    else:
        timesteps = spaced_timesteps(settings.timesteps, length)
    if settings.noise == "release":
        return ReleaseNoise.of_images(encoded, timesteps, torch.device(device))
    return NoiseBank(seed, "scan", timesteps, tuple(encoded.latents.shape[1:]), shared=settings.noise == "shared")


@torch.no_grad()
def scan_losses(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    encoded: Encoded,
    bank: NoiseBank | ReleaseNoise,
    losses: np.ndarray,
    batch_size: int,
    rows: np.ndarray | None = None,
    draws: np.ndarray | None = None,
    done: Callable[[int], object] = lambda losses: None,
    measure: Callable[..., torch.Tensor] | None = None,
) -> None:
    """Fill in losses, or whatever else is measured, that are not there yet.

    Args:
        unet: the model, as :func:`for_inference` returns it.
        scheduler: its schedule.
        encoded: D.
        bank: T timesteps with their noise.
        losses: a row for each of the first latents, (N or 2N, T, …), float32, NaN where missing; filled in place.
        batch_size: UNet evaluations at once; does not change the result beyond rounding.
        rows: the rows to scan, (n,), such as a shard of D; by default all.
        draws: the draws of each, (n, w); by default all.
        done: told, as they come, how many losses there are more.
        measure: called as :func:`example_losses`, which it is by default; returns (B, …) as the losses are shaped.
    """
    rows = np.arange(len(losses)) if rows is None else rows
    draws = (
        np.broadcast_to(np.arange(len(bank.timesteps)), (len(rows), len(bank.timesteps))) if draws is None else draws
    )
    unknown = np.isnan(losses[rows[:, None], draws])
    missing = np.flatnonzero(unknown.any(axis=tuple(range(1, unknown.ndim))))
    ask = functools.partial(measure or example_losses, unet, scheduler)
    device = next(unet.parameters()).device
    # Images outermost: a batch then holds few captions, each projected to keys and values once.
    width, block = min(draws.shape[1], batch_size), _block(draws.shape[1], batch_size)
    for start in range(0, len(missing), block):
        part = missing[start : start + block]
        for first in range(0, draws.shape[1], width):
            some = draws[part, first : first + width]
            losses[rows[part, None], some] = _over_captions(ask, device, encoded, bank, rows[part], some)
            done(some.size)


def _over_captions(ask, device: torch.device, encoded: Encoded, bank, rows: np.ndarray, draws: np.ndarray):
    """What is measured of one batch, the mean over captions: latents (n,) with draws (n, w) each -> (n, w, …)."""
    counts = encoded.counts(rows % len(encoded))
    total = _with_caption(ask, device, encoded, bank, rows, draws, 0)  # every image has one
    for number in range(1, counts.max()):
        having = counts > number
        total[having] += _with_caption(ask, device, encoded, bank, rows[having], draws[having], number)
    return total / counts.reshape(-1, *[1] * (total.ndim - 1)).astype(np.float32)


def _block(draws: int, batch_size: int) -> int:
    """Images of a batch, each with as many draws as there are or fit."""
    return batch_size // min(draws, batch_size)


def _with_caption(
    ask: Callable[..., torch.Tensor],
    device: torch.device,
    encoded: Encoded,
    bank: NoiseBank | ReleaseNoise,
    rows: np.ndarray,
    draws: np.ndarray,
    number: int,
) -> np.ndarray:
    """What is measured with the numbered caption of each image: latents (n,) with draws (n, w) each -> (n, w, …)."""
    captions = encoded.states(encoded.caption(rows % len(encoded), number))
    values = ask(
        encoded.batch(rows).to(device).repeat_interleave(draws.shape[1], dim=0),
        captions.to(device),
        torch.from_numpy(bank.timesteps[draws].reshape(-1)).to(device),
        _noise(bank, encoded, rows, draws, number).to(device),
    )
    return values.reshape(*draws.shape, *values.shape[1:]).cpu().numpy()


def _noise(
    bank: NoiseBank | ReleaseNoise, encoded: Encoded, rows: np.ndarray, draws: np.ndarray, number: int
) -> torch.Tensor:
    """Noise of latents (n,) with draws (n, w) each and their numbered captions -> (n · w, C, H, W)."""
    if isinstance(bank, ReleaseNoise):
        return bank.of(rows, draws, number)
    return torch.from_numpy(bank.of([encoded.image_ids[image] for image in rows % len(encoded)], draws))
