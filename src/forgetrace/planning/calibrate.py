"""What units of work cost here, timed with the stages' own functions on random weights, in a temporary folder."""

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import chdir, redirect_stderr
from io import StringIO
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from forgetrace.artifacts import read_json, write_json
from forgetrace.config import Encode
from forgetrace.datasets.contract import captions_of
from forgetrace.datasets.images import TrainingImages
from forgetrace.datasets.prepare import TRAIN, prepare, read_metadata
from forgetrace.figures.catalogue import draw
from forgetrace.imports import AS_A_JOB
from forgetrace.layout import Layout
from forgetrace.planning import work

if TYPE_CHECKING:
    import torch

    from forgetrace.encoding.store import Encoded

IMAGES, CAPTIONS = 256, 64  # of the training data, for units with torch
FEW = 4  # models of a stack, on a CPU
LONG = 10  # seconds of a first call beside which what is done once does not count
# Keys that may name files, by section.
PATHS = {"prepare": ["path"], "encode": ["pipeline"], "train": ["pretrained", "parent", "lora"]}


class Unit(NamedTuple):
    """Seconds of a unit of work and seconds a job's first takes longer; the peak of memory until then in bytes."""

    each: float
    first: float
    memory: int


def rate(run: Callable[[int], object], size: int = 1, seconds: float = 0.3, whose: int = RUSAGE_SELF) -> Unit:
    """Time ``run(n)``, n repetitions of ``size`` units, for growing n until it takes ``seconds`` longer than one.

    What a call does once counts as the first unit's. With 0 seconds a single, first repetition is timed, and so it is
    where that alone takes long: a large network on a CPU is planned in minutes.
    """

    def timed(repetitions: int) -> float:
        start = time.perf_counter()
        run(repetitions)
        return time.perf_counter() - start

    first = each = timed(1)
    if seconds and first < LONG:
        repetitions, once = 1, timed(1)
        more = once
        while more - once < seconds:
            repetitions *= 2
            more = timed(repetitions)
        each = (more - once) / (repetitions - 1)
    peak = getrusage(whose).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Unit(each / size, max(first - each, 0), peak)


def calibrate(layout: Layout, device: str) -> tuple[dict[str, Unit], dict]:
    """All units of work, starts of processes included; and facts: counts of the data, bytes of files, the device.

    Raises:
        UserError: what the config or the device asks for cannot work here.
    """
    layout, units = anywhere(layout), {}
    first = "pass" if layout.config.train.lora else AS_A_JOB
    # Of jobs with torch the light ones: of one that trains for minutes, two seconds more of imports do not count.
    for start, module in ((work.START, "figures.training"), (work.TORCH, "counterfactual.measure")):
        job = [sys.executable, "-c", f"{first}; import forgetrace.cli, forgetrace.{module}"]
        units[start] = rate(lambda _, job=job: subprocess.run(job, check=True), seconds=0, whose=RUSAGE_CHILDREN)
    with TemporaryDirectory(prefix="forgetrace-plan-") as folder, chdir(folder), redirect_stderr(StringIO()):
        units |= light(layout)
        found, facts = heavy(layout, device)
    return units | found, facts


def anywhere(layout: Layout) -> Layout:
    """The layout that finds one's own images and models from another folder."""
    sections = {}
    for name, keys in PATHS.items():
        section = getattr(layout.config, name)
        # What is no path here is a model of the hub.
        here = {key: path for key in keys if (path := getattr(section, key)) and Path(path).exists()}
        sections[name] = section.model_copy(update={key: str(Path(path).absolute()) for key, path in here.items()})
    return Layout(layout.name, layout.config.model_copy(update=sections))


def stand_in(
    shape: list[int], settings: Encode, captions: list[str], device: "torch.device | str" = "cpu"
) -> "Encoded":
    """Encoded images of noise of the given pixel shape, with real captions."""
    import torch

    from forgetrace.encoding.captions import caption_states
    from forgetrace.encoding.codec import codec_of
    from forgetrace.encoding.store import Encoded

    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, *shape), dtype=np.uint8)
    states = torch.from_numpy(caption_states(settings, captions, device=device))
    ids = list(map(str, range(IMAGES)))
    latents = codec_of(settings, device).encode(pixels)
    return Encoded(ids, latents, states, torch.arange(IMAGES) % len(captions))


def training_step(layout: Layout, encoded: "Encoded", device: str, seconds: float = 0.3, models: int = 1) -> Unit:
    """A step of a model, as :func:`rate` times it, of so many trained as one.

    Leaves the process with a training's threads and settings.
    """
    from forgetrace.diffusion.captured import EAGER
    from forgetrace.diffusion.training import Training, begin

    write_json(layout.encode_manifest, {"source": "calibration"})  # a training's key holds it
    # No divergence at so small a rate, and so many steps that none is the last.
    recipe = layout.config.train.model_copy(update={"steps": 10**6, "warmup_steps": 0, "learning_rate": 1e-9})
    layout = Layout(layout.name, layout.config.model_copy(update={"train": recipe}))
    trainings = [Training(str(seed), seed, np.zeros(IMAGES, dtype=bool)) for seed in range(models)]
    start = time.perf_counter()
    loop = begin(layout, encoded, trainings, device)

    def steps(n: int) -> None:
        for _ in range(n):
            loop.run_step()

    if loop.accelerator.device.type == "cuda":
        steps(EAGER + 1)  # until the step is recorded
    begun = time.perf_counter() - start
    unit = rate(steps, models, seconds)
    loop.close()
    return unit._replace(first=unit.first + begun)


def light(layout: Layout) -> dict[str, Unit]:
    """Units without torch; leaves the dataset in the current folder."""
    units = {work.PREPARED: rate(lambda _: prepare(layout.config.prepare, layout.data, look=False), seconds=0)}
    read, names = TrainingImages(layout), [row["file_name"] for row in read_metadata(layout.metadata)]
    units[work.IMAGE] = rate(lambda n: [read(names[i % len(names)]) for i in range(n)])
    Path(layout.model).mkdir(parents=True)
    Path(layout.curve).write_text("step,loss,learning_rate\n1,1,1\n2,1,1\n")
    return units | {work.FIGURE: rate(lambda _: draw(layout, "training"), seconds=0)}


def heavy(layout: Layout, device: str) -> tuple[dict[str, Unit], dict]:
    """Units with torch, those of little memory first because a peak is that of all before; and the facts."""
    import torch

    from forgetrace.attribution.scan import scan_losses, scan_noise
    from forgetrace.curvature.fit import CURVATURES
    from forgetrace.diffusion.device import pick_device
    from forgetrace.diffusion.given import check_fits
    from forgetrace.diffusion.inference import for_inference
    from forgetrace.diffusion.model import build_scheduler, build_unet, frozen
    from forgetrace.diffusion.sampling import sample
    from forgetrace.diffusion.subsets import select
    from forgetrace.encoding.captions import caption_states
    from forgetrace.unlearning.step import BATCH, Query, query_gradient, query_loss

    torch.set_num_threads(1)
    config, target, rows = layout.config, pick_device(device), read_metadata(layout.metadata)
    trained = [captions_of(row["text"]) for row in rows if row["split"] == TRAIN]
    texts = [caption for captions in trained for caption in captions]
    captions = sorted(set(texts), key=len)[-CAPTIONS:]

    def states_of(n: int) -> np.ndarray:
        return caption_states(config.encode, captions * n, device=target)

    units = {work.CAPTION: rate(states_of, len(captions))}
    encoded = stand_in(read_json(layout.data_manifest)["image_shape"], config.encode, captions, target)
    latents, states = encoded.latents, encoded.captions
    scheduler = build_scheduler(config.train)
    unet, scanned = (frozen(build_unet(config.train, latents.shape[1:], states.shape[2], 0), target) for _ in range(2))
    if config.train.given:
        check_fits(unet, scheduler, config.train, encoded)
    query, bank = Query("any", torch.from_numpy(latents[0]), states[0]), scan_noise(layout, encoded, scheduler)
    inputs = query.latent[None].to(target), states[:1].to(target), states[0].to(target)
    sizes = {name: 4 * weight.numel() for name, weight in unet.named_parameters()}
    draws, batch, chunk = len(bank.timesteps), config.scan.batch_size, min(config.fit.chunk, config.fit.draws)
    block, sampler, scanner = max(1, batch // draws), config.synthesize, for_inference(scanned)

    def samples(n: int) -> None:
        for _ in range(n):
            sample(unet, scheduler, *inputs, sampler.sampler_steps, sampler.guidance).cpu()  # waits for a GPU

    def scans(n: int) -> None:
        losses = np.full((IMAGES, draws), np.nan, dtype=np.float32)
        scan_losses(scanner, scheduler, encoded, bank, losses, batch, np.arange(n * block) % IMAGES)

    def gradients(n: int) -> None:
        query_gradient(unet, scheduler, query, list(sizes), range(n * BATCH), 0)["conv_in.weight"].cpu()

    units[work.SAMPLER] = rate(samples, sampler.sampler_steps * (1 if sampler.guidance == 1 else 2))
    units[work.LOSS] = rate(lambda n: query_loss(unet, scheduler, query, 0, n * BATCH), BATCH)
    units[work.SCAN] = rate(scans, block * draws)
    if config.train.trains:
        units[work.STEP] = training_step(layout, encoded, device)
        if (stack := config.retrain.stack) > 1:
            # A GPU gains with every model until it is full, a CPU hardly.
            largest = max(map(len, layout.retraining_sets().values()), default=1)
            models = min(stack, largest, FEW if target.type == "cpu" else stack)
            units[work.STACKED] = training_step(layout, encoded, device, models=models)
        torch.use_deterministic_algorithms(False)  # which trainings want, like their threads
        torch.set_num_threads(1)
    units[work.GRADIENT] = rate(gradients, BATCH)
    fits = {}
    for curvature, (unit, passes) in work.fitted(config).items():

        def fit(n: int, curvature: str = curvature) -> None:
            fits[curvature] = CURVATURES[curvature][0](unet, scheduler, encoded, n * chunk, chunk, 0)

        units[unit] = rate(fit, passes * chunk)
    changed = sum(sizes[name] for variant in config.unlearn.values() for name in select(sizes, variant.weights))
    images = min(len(trained), config.encode.max_images or len(trained))
    distinct = min(len(texts) * images // len(trained), len(set(texts)))
    facts = {"pictures": len(rows), "images": images, "captions": 1 + distinct}
    facts |= {"views": len(texts) / len(trained) * (1 + config.encode.flips)}
    facts |= {
        "weights": sum(sizes.values()),
        "latent": latents[0].nbytes,
        "states": states[0].numel() * np.dtype(config.encode.caption_dtype).itemsize,
    }
    tensors = [tensor for factors in fits.values() for tensor in factors.values()]
    return units, facts | {"changed": changed, "fitted": sum(t.nbytes for t in tensors), "device": target.type}
