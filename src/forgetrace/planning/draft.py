"""``forgetrace init``: a first config for images of one's own, sized to them and to this machine.

Small on purpose: latents are folded pixels and nothing is pretrained but the text encoder, so the UNet has to learn all
there is to see, within minutes on a CPU. How long a training step takes is timed; how many fit the minutes follows.
"""

import re
from collections.abc import Sequence
from contextlib import chdir, redirect_stderr
from io import StringIO
from itertools import chain
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

import yaml

from forgetrace.artifacts import UserError, atomic
from forgetrace.config import NAME, Encode, Prepare, parse_config, quoted
from forgetrace.datasets.contract import Reference, captions_of
from forgetrace.datasets.prepare import count_trained, examples_of, split_captions
from forgetrace.layout import Layout
from forgetrace.planning.calibrate import CAPTIONS, stand_in, training_step

FEWEST = 10  # images that can be told from chance at all
DISTINCT = 40  # captions; with fewer, holding some out would take too much of the data
MINUTES = 5  # of one training
FEW_STEPS, MANY_STEPS = 1000, {"cpu": 5000, "cuda": 20_000}
MOST_IMAGES = {"cpu": 5000, "cuda": 50_000}
TIMED = 3  # seconds of training steps: the number of steps hangs on it
LOOKED_AT = 200  # images whose size is looked at
ALPHA = 1.8e-8  # step size of unlearning per training image: what `forgetrace sweep` found for the digits


class Scale(NamedTuple):
    """Sizes that go together: pixels, pixel-unshuffle factor, channels, images per step, learning rate."""

    size: int
    factor: int
    channels: tuple[int, int]
    batch: int
    rate: float


# Descending. Of those that are not larger than the images, the first that is quick enough is taken, else the last.
# A network must be as wide as its latents have channels (3 · factor²): the noise it predicts does not fit through a
# narrower one, and what it generates stays noisy.
SCALES = {
    "cpu": [Scale(32, 4, (64, 128), 32, 1e-3), Scale(16, 2, (32, 64), 32, 2e-3)],
    "cuda": [Scale(64, 4, (128, 256), 64, 5e-4), Scale(32, 2, (128, 256), 64, 5e-4), Scale(16, 2, (64, 128), 64, 1e-3)],
}

TEMPLATE = """\
# {images} images of {path}, sized by `forgetrace init` for {machine}.
# Every key is explained in config/README.md. What it will cost: forgetrace plan --config {file}
# Then: make reproduce EXPERIMENT={name}
seed: 0
prepare:
  dataset: folder
  path: {path}  # images stay there
  size: {size}  # pixels; more shows more and takes a larger model and longer training to learn
  # Distinct captions held out of {captions}: images that carry one are never trained on.
  tuning_captions: {tuning}  # to choose settings on
  report_captions: {report}  # the prompts of the queries below
encode:
  factor: {factor}  # latents are {side}x{side}
{most}train:
  channels: {channels}
  steps: {steps}  # about {minutes:.0f} minutes here
  batch_size: {batch}
  learning_rate: {rate}
synthesize:
{queries}
  guidance: 3.0
fit:
  draws: 4000
unlearn:
  # A guess until the model is trained; then: forgetrace sweep --config {file} --variant unlearn{sweep}
  unlearn: {{step_size: {alpha}}}
score:
  methods:
    unlearn: {{attributor: unlearning}}
    efficientnet: {{}}
    pixel-l2: {{}}
    text: {{}}
    random: {{}}
retrain:
  methods: [unlearn, efficientnet]  # judged by training again without the images they rank first
  k: [{k}]  # 4% of the images
  random_draws: 2
  seeds: 1
"""
POOL = "  queries:\n    - {{pool: report, count: {count}}}  # images generated from held-out captions"
OWN = """\
  # Captions are too few to hold some out: put an image that you generated here, and its prompt. Until then, a training
  # image, which should find itself. Own images take no part in the comparison of regenerated pictures (ΔG).
  queries:
    - {{name: mine, image: {image}, prompt: {prompt}}}"""


def init(name: str, data: str, device: str) -> tuple[Path, str]:
    """Write ``config/<name>.yaml`` for the captioned images in a folder.

    Args:
        name: of the experiment.
        data: an ImageFolder, as :mod:`forgetrace.datasets.folder` reads it; stands in the config as it is given.
        device: where trainings will run, as ``pick_device`` names it.

    Returns:
        The file and a sentence on what was chosen.

    Raises:
        UserError: the config is there already, the name cannot be one, or the images are too few or cannot be used.
    """
    if not re.fullmatch(NAME, name):
        raise UserError(f"{name} cannot name an experiment: take lower-case letters, digits, '-', '_' and '.'.")
    file = Path("config", f"{name}.yaml")
    if file.exists():
        raise UserError(f"{file} exists: choose another name, or remove it first.")
    examples = examples_of(Prepare(dataset="folder", path=data, size=1))
    distinct = {caption for example in examples for caption in captions_of(example.caption)}
    held = max(4, min(60, len(distinct) // 20)) if len(distinct) >= DISTINCT else 0
    pools = Prepare(dataset="folder", path=data, size=1, tuning_captions=held, report_captions=held)
    trained = count_trained(examples, list(chain(*split_captions(examples, pools).values())))
    if trained < FEWEST:
        raise UserError(f"{data} has only {trained} images to train on: attribution needs {FEWEST} or more.")
    text, summary = _text(name, file, data, device, examples, len(distinct), held, trained)
    parse_config(yaml.safe_load(text), file)
    with atomic(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return file, summary


def _text(
    name: str, file: Path, data: str, device: str, examples: Sequence[Reference], distinct: int, held: int, trained: int
) -> tuple[str, str]:
    from forgetrace.diffusion.device import pick_device

    kind = "cuda" if pick_device(device).type == "cuda" else "cpu"
    most = MOST_IMAGES[kind]
    longest = sorted({captions_of(example.caption)[0] for example in examples}, key=len)[-CAPTIONS:]
    scale, seconds = _scale(kind, _side(data, examples), longest, device)
    steps = _steps(kind, seconds)
    count = min(4, held)
    example = examples[0]
    own = OWN.format(image=quoted(f"{data}/{example.file_name}"), prompt=quoted(captions_of(example.caption)[0]))
    images = min(trained, most)
    minutes = steps * seconds / 60
    text = TEMPLATE.format(
        images=len(examples), machine="a GPU" if kind == "cuda" else "a CPU", file=file, name=name,
        path=quoted(data), size=scale.size, captions=distinct, tuning=held, report=held, factor=scale.factor,
        side=scale.size // scale.factor, channels=list(scale.channels), steps=steps, batch=scale.batch, minutes=minutes,
        most=f"  max_images: {most}  # so that every scan of them ends today\n" if trained > most else "",
        rate=f"{scale.rate:.1e}", queries=POOL.format(count=count) if held else own, alpha=f"{ALPHA * images:.1e}",
        sweep="" if held else " (needs tuning_captions)", k=max(1, images // 25),
    )  # fmt: skip
    summary = (
        f"{len(examples)} images at {scale.size} pixels, {distinct} distinct captions; "
        f"{steps} training steps of {scale.batch}, about {minutes:.0f} minutes each time on this machine."
    )
    return text, summary


def _side(data: str, examples: Sequence[Reference]) -> int:
    """Median of the shorter side of some of the images, in pixels."""
    from PIL import Image

    sides = []
    for example in examples[:: max(1, len(examples) // LOOKED_AT)]:
        try:
            with Image.open(f"{data}/{example.file_name}") as image:
                sides.append(min(image.size))
        except Exception:  # Pillow's readers raise nearly anything; prepare names every such image
            continue
    if not sides:
        raise UserError(f"{data} has no image that can be read.")
    return round(median(sides))


def _scale(kind: str, side: int, captions: list[str], device: str) -> tuple[Scale, float]:
    """The largest scale that suits the images and trains long enough in its minutes; and seconds of a step."""
    scales = SCALES[kind]
    enough = MANY_STEPS[kind] // 2
    for scale in [scale for scale in scales if scale.size <= side] or scales[-1:]:
        seconds = _step_seconds(scale, captions, device)
        if MINUTES * 60 / seconds >= enough:
            break
    return scale, seconds


def _step_seconds(scale: Scale, captions: list[str], device: str) -> float:
    """Seconds of a training step, timed."""
    train = {"channels": scale.channels, "batch_size": scale.batch}
    config = parse_config({"train": train, "score": {"methods": {"random": {}}}}, "init")
    with TemporaryDirectory(prefix="forgetrace-init-") as folder, chdir(folder), redirect_stderr(StringIO()):
        encoded = stand_in([scale.size, scale.size, 3], Encode(factor=scale.factor), captions)
        return training_step(Layout("init", config), encoded, device, TIMED).each


def _steps(kind: str, seconds: float) -> int:
    """Training steps in hundreds that take so many seconds each."""
    return max(FEW_STEPS, min(MANY_STEPS[kind], int(MINUTES * 60 / seconds) // 100 * 100))
