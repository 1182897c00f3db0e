"""Speed of the stages against plain references, and whether a scan still says the same."""

import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from benchmarks import ours, plain
from benchmarks.narrowing import overlap
from benchmarks.report import Reading, quartiles, ratio
from benchmarks.settings import Settings
from benchmarks.workers import Worker, cores, devices, fastest, interleave, rate, team

BATCHES = (20, 60, 120, 240)
IMAGES = 1250  # for the agreement: the top 4% are 50, so that one exchange of neighbours is still 0.98


def scan(settings: Settings) -> dict[str, Reading]:
    """Evaluations/s, same work: per thread, for the whole machine, and on a GPU."""
    config, readings = settings.trained(), {}
    for name, device, processes in (("thread", "cpu", 1), ("machine", "cpu", cores()), *settings.accelerators):
        threads = None if name == "machine" else 1
        reference, candidate = (plain.scan, config, device), (ours.scan, config, device)
        how = {"unit": "evaluations"}
        readings[f"scan-{name}"] = versus(settings, reference, candidate, ">= 1.7", threads, processes, BATCHES, **how)
    return readings | _agreement(settings, config)


def fisher(settings: Settings) -> dict[str, Reading]:
    """Draws/s of the Fisher fit against single draws."""
    config, readings = settings.trained(), {}
    for name, device, _ in (("thread", "cpu", 1), *settings.accelerators):
        sides = (plain.fisher, config, device), (ours.fisher, config, device)
        readings[f"fisher-{name}"] = versus(settings, *sides, ">= 5", unit="draws")
    return readings


def training(settings: Settings) -> dict[str, Reading]:
    """Optimiser steps/s: one training, and on two cores two of them against one with two threads."""
    from forgetrace.diffusion.device import native_bf16, resolve_precision

    config, readings = settings.encoded(), {}
    own = resolve_precision(settings.layout.config.train.precision, torch.device("cpu"))
    cases = [("fp32", "cpu", "fp32", 1)]
    cases += [("pair", "cpu", own, 2)] if cores() > 1 else []
    cases += [(name, device, "fp32", 1) for name, device, _ in settings.accelerators]
    cases += [
        ("bf16" if device == "cpu" else f"{device}-bf16", device, "bf16", 1)
        for device in devices()
        if native_bf16(torch.device(device))
    ]
    for name, device, precision, count in cases:
        sides = (plain.training, config, device), (ours.training, config, device, precision)
        how = {"unit": "steps", "precision": precision}
        readings[f"training-{name}"] = versus(settings, *sides, ">= 1.8", count, count, **how)
    return readings


def versus(
    settings: Settings,
    reference: tuple,
    candidate: tuple,
    target: str | None,
    threads: int | None = 1,
    processes: int = 1,
    options: Sequence[int] = (),
    **details: object,
) -> Reading:
    """The ratio of two rates, both sides in workers of their own.

    Args:
        settings: repeats and seconds.
        reference: function that prepares the work, and its arguments.
        candidate: the same, single-threaded.
        target: of the ratio.
        threads: of the reference; None is PyTorch's default.
        processes: of the candidate.
        options: of the reference's work; its fastest is compared.
        details: recorded with the ratio.
    """
    seconds = settings.seconds
    details |= {"reference_threads": threads or "default", "processes": processes}
    with team(1, *reference, threads=threads) as old, team(processes, *candidate) as new:
        chosen = []
        if options:
            best, rates = fastest(old, options, seconds)
            chosen, details = [best], details | {"reference_batch": best, "reference_by_batch": rates}
        sides = partial(rate, old, seconds, *chosen), partial(rate, new, seconds)
        return ratio(*interleave(sides, settings.repeats), target, **details)


def _agreement(settings: Settings, config: str) -> dict[str, Reading]:
    """Scores by the plain UNet and by ours on the same (t, ε): the lower rank correlation and overlap of the top 4%."""
    from scipy.stats import spearmanr

    rows = np.unique(np.linspace(0, settings.images() - 1, IMAGES).astype(int))
    top, weights = max(1, round(0.04 * len(rows))), settings.weights(2)
    device, found = devices()[-1], [[], []]
    with team(1, plain.losses, config, device) as (old,), team(1, ours.losses, config, device) as (new,):
        for path in weights:
            old.tell(path, rows)
            new.tell(path, rows)
            for worker, losses in zip((old, new), found, strict=True):
                losses.append(worker.answer().astype(float).mean(axis=1))
    scores = [[after - losses[0] for after in losses[1:]] for losses in found]
    ranks, overlaps = [], []
    for old, new in zip(*scores, strict=True):
        ranks.append(float(spearmanr(old, new).statistic))
        overlaps.append(overlap(old, new, top))
    how = {"images": len(rows), "top": top}
    return {
        "scan-spearman": Reading(min(ranks), "", ">= 0.999", None, how | {"by_query": ranks}),
        "scan-overlap": Reading(min(overlaps), "", ">= 0.98", None, how | {"by_query": overlaps}),
    }


def queries(settings: Settings) -> dict[str, Reading]:
    """One further query against the first, which pays for the scan of θ0 and the start of a process."""
    config, (base, first, further), count = settings.trained(), settings.weights(2), settings.images()
    rows = np.unique(np.linspace(0, count - 1, 240).astype(int))
    shares, seconds = [], {}
    for _ in range(min(3, settings.repeats)):
        start = time.perf_counter()
        with team(1, ours.losses, config, devices()[-1]) as (worker,):
            seconds["start"] = time.perf_counter() - start
            worker.call(base, rows[:20])
            for name, path in {"theta0": base, "first": first, "further": further}.items():
                load, some = (_seconds(worker, path, part) for part in (rows[:0], rows))
                seconds[name] = load + (some - load) / len(rows) * count
        once = seconds["start"] + seconds["theta0"] + seconds["first"]
        shares.append(seconds["further"] / once)
    how = {"seconds": dict(seconds), "note": f"{len(rows)} images measured, scaled to {count}"}
    return {"queries": Reading(float(np.median(shares)), "x", None, quartiles(shares), how)}


def _seconds(worker: Worker, *request: object) -> float:
    start = time.perf_counter()
    worker.call(*request)
    return time.perf_counter() - start
