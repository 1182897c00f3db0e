"""How near scan and training come to what the processor can multiply, and where their time goes."""

import statistics
from functools import partial

import torch

from benchmarks import ours
from benchmarks.report import Reading, ratio
from benchmarks.settings import Settings
from benchmarks.workers import devices, interleave, rate, synchronise, team, timed
from forgetrace.artifacts import atomic


def limit(settings: Settings) -> dict[str, Reading]:
    """Floating-point operations per second of both in fp32, over those of the best matrix product."""
    config, readings, profiles = settings.trained(), {}, []
    for device in devices():
        for name, more in {"scan": (), "training": ("fp32",)}.items():
            with team(1, products, device) as peak, team(1, getattr(ours, name), config, device, *more) as work:
                needed = peak[0].call(None, config)[name]
                sides = partial(rate, peak, settings.seconds), partial(rate, work, settings.seconds)
                best, done = interleave(sides, settings.repeats)
            how = {"peak_gflops": statistics.median(best) / 1e9, "gflop_per_unit": needed / 1e9}
            how["note"] = "as diffusers computes it; a scan projects a caption to keys and values only once"
            readings[f"limit-{name}-{device}"] = ratio(best, [units * needed for units in done], **how)
            with team(1, ours.profile, name, config, device, *more) as (worker,):
                profiles.append(f"{name} on {device}, one thread\n{worker.call(settings.seconds)}\n")
    with atomic(settings.folder / "profile.txt") as temporary:
        temporary.write_text("\n".join(profiles), encoding="utf-8")
    return readings


def products(device: str):
    """Large fp32 matrix products in several ways; the work returns (operations, seconds) of the fastest."""
    from forgetrace.diffusion.device import pick_device
    from forgetrace.diffusion.inference import onednn_linear

    place, size = pick_device(device), 1024 if device == "cpu" else 8192
    left, right = torch.rand(size, size, device=place), torch.rand(size, size, device=place)
    image, kernel = left.view(1, size, -1, 32), right.view(size, size, 1, 1)
    ways = [lambda: left @ right, lambda: torch.conv2d(image, kernel)]
    if device == "cpu" and torch.backends.mkldnn.is_available():
        ways.append(lambda: onednn_linear(left, right, None))

    def once(way) -> int:
        way()
        synchronise()
        return 2 * size**3

    @torch.no_grad()
    def work(seconds: float | None, config: str | None = None):
        if config:
            return operations(config)
        done = [timed(partial(once, way), seconds / len(ways)) for way in ways]
        return max(done, key=lambda result: result[0] / result[1])

    return work


def operations(config: str) -> dict[str, int]:
    """Floating-point operations of one evaluation (``scan``) and of one optimiser step's passes (``training``)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from forgetrace.diffusion.model import build_unet
    from forgetrace.encoding.store import load_encoded
    from forgetrace.layout import load_layout

    layout = load_layout(config)
    encoded, recipe = load_encoded(layout), layout.config.train
    unet = build_unet(recipe, encoded.latents.shape[1:], encoded.captions.shape[2], 0)
    # The counter knows plain products, not the fused attention kernel of a CPU.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        inputs = encoded.batch([0]), torch.tensor([0]), encoded.captions[:1]
        with FlopCounterMode(display=False) as forward:
            loss = unet(*inputs).sample.square().mean()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    once, back = forward.get_total_flops(), backward.get_total_flops()
    return {"scan": once, "training": (once + back) * recipe.batch_size}
