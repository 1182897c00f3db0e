"""The config of a release's setting."""

import re
from pathlib import Path

import yaml

from forgetrace.artifacts import UserError, atomic
from forgetrace.config import NAME, load_config, parse_config, quoted
from forgetrace.release.check import Contents
from forgetrace.release.source import Release

# What the projects did, of which their artifacts hold the results.
STEP = {
    "diagonal": "curvature: diagonal, weights: cross-attn-kv, step_size: 0.01, damping: 0, draws: 50000",
    "ekfac": "curvature: ekfac, weights: cross-attn-kv, step_size: 0.01, damping: 0.1, draws: 50000",
}
NOTE = {
    "diagonal": "# One step of AbU: 0.01 / N times the gradient over the Fisher information, 625 batches of 80 draws.",
    "ekfac": (
        "# AbU's step with the published EK-FAC. Step size and damping are not in the artifacts: these are AbU's step\n"
        "  # size and this package's damping; change them if `forgetrace compare-release` says so."
    ),
}
TEMPLATE = """\
# The published artifacts of {kind} in {source},
# converted to {folder} by `forgetrace import-release`. What can and what cannot agree with published scores:
# docs/published-artifacts.md. Every key is explained in config/README.md.
# Run: make reproduce EXPERIMENT={name}
# Then: forgetrace compare-release --config {file} --influence FILE_OR_FOLDER
seed: 0
prepare:
  dataset: coco
  path: {data}  # annotations and images stay there
  size: {size}
  # All images were trained on: no caption can be held out.
  tuning_captions: 0
  report_captions: 0
encode:
  given: {target}  # published latents, and the token states of {captions} distinct captions
  flips: true  # the latents of mirror images are published too
  # To have own images as queries too, name a folder or hub model with the encoders that were used, those of Stable
  # Diffusion 2; they give the empty caption's state as well:
  # pipeline: FOLDER
  # image_encoder: autoencoder-kl
  # text_encoder: clip
train:
  pretrained: {target}  # θ0 itself; without what it was trained from there are no leave-K-out models
synthesize:
  queries:
{queries}
fit:
  given: {target}  # the published Fisher information
unlearn:
  {note}
  unlearn: {{{step}}}
scan:
  timesteps: 20  # 0, 50, …, 950
  noise: release  # theirs, on the model of GPU that the published scores were computed on
  batch_size: 2000  # UNet evaluations at once; lower it on a small GPU, results stay
score:
  methods:
    unlearn: {{attributor: unlearning, flips: max}}  # the larger score of an image and its mirror image
"""


def experiment_name(name: str | None, folder: Path) -> str:
    """The experiment's name, by default made of the folder's.

    Raises:
        UserError: it cannot name one.
    """
    own = name or re.sub(r"[^a-z0-9_.-]+", "-", folder.resolve().name.lower()).strip("-_.")
    if not re.fullmatch(NAME, own):
        raise UserError(
            f"'{own}' cannot name an experiment: give --name of lower-case letters, digits, '-', '_' and '.'."
        )
    return own


def config_file(name: str, folder: Path) -> Path:
    """``config/<name>.yaml``.

    Raises:
        UserError: it is there and of other data than this folder's.
    """
    file = Path("config", f"{name}.yaml")
    if file.exists():
        given = load_config(file).encode.given
        if given is None or Path(given).resolve() != folder.resolve():
            raise UserError(f"{file} is there and does not use {folder}: give --name for another one.")
    return file


def write_config(file: Path, release: Release, contents: Contents, folder: Path) -> bool:
    """Write the config; returns whether one was there, which is kept."""
    if file.exists():
        return True
    target = quoted(folder.as_posix())
    text = TEMPLATE.format(
        kind=release.kind, source=release.model.parent.as_posix(), folder=folder.as_posix(), name=file.stem, file=file,
        data=quoted(release.data.as_posix()), size=contents.size, target=target,
        captions=len({caption for own in contents.texts for caption in own}),
        queries="\n".join(
            f"    - {{given: {target}, name: {each}, count: {len(prompts)}}}  # {each}-000, …"
            for each, prompts in contents.prompts.items()
        ),
        note=NOTE[release.curvature], step=STEP[release.curvature],
    )  # fmt: skip
    parse_config(yaml.safe_load(text), file)
    with atomic(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return False
