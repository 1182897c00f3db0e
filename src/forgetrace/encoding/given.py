"""What ``forgetrace import-release`` leaves in a folder, for the stages that take it instead of computing.

::

    unet/, scheduler/             θ0 in diffusers' layout, for train.pretrained
    encoded/                      latents.npy, captions.npy and manifest.json, for encode.given
    queries/<name>/               latents.npy, prompts.npy, images/000.png, …, queries.json, for synthesize.queries
    fit/                          fisher.safetensors or ekfac.safetensors, for fit.given

Nothing here imports torch: Snakemake asks while it reads the rules.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from forgetrace.artifacts import (
    UserError,
    atomic,
    fingerprint,
    read_array,
    read_json,
    sha256_of,
    write_array_in_parts,
)
from forgetrace.config import Config
from forgetrace.layout import Layout

if TYPE_CHECKING:
    import torch

AT_ONCE = 2**10  # captions in memory
IMPORT = "forgetrace import-release"
EMPTY = ""
FITTED = {"diagonal": "fisher", "ekfac": "ekfac"}  # names of files, by curvature


def encoded_files(folder: str) -> dict[str, str]:
    """Files of the encoded images: the arrays ``latents`` and ``captions``, and a ``manifest``.

    Latents are (2N, C, H, W), float32, unflipped before flipped; token states (distinct captions + 1, tokens, width),
    float16, in the order of :func:`distinct`, and then a row of NaN for the empty caption.
    """
    return {
        "latents": f"{folder}/encoded/latents.npy",
        "captions": f"{folder}/encoded/captions.npy",
        "manifest": f"{folder}/encoded/manifest.json",
    }


def query_files(folder: str, name: str) -> dict[str, str]:
    """Files of Q queries: ``latents`` (Q, C, H, W) and ``prompts`` (Q, tokens, width), float32; ``record``."""
    place = f"{folder}/queries/{name}"
    return {"latents": f"{place}/latents.npy", "prompts": f"{place}/prompts.npy", "record": f"{place}/queries.json"}


def query_image(folder: str, name: str, number: int) -> str:
    """The image of a query, a PNG."""
    return f"{folder}/queries/{name}/images/{number:03d}.png"


def fitted_file(folder: str, curvature: str) -> str:
    """The file of a curvature, ``diagonal`` or ``ekfac``, in the format of the ``fit`` stage."""
    return f"{folder}/fit/{FITTED[curvature]}.safetensors"


def distinct(texts: list[list[str]]) -> list[str]:
    """The captions of all images, each where it first occurs."""
    return list(dict.fromkeys(chain(*texts)))


def order_of(ids: list[str], texts: list[list[str]]) -> str:
    """Hash of which images there are, in which order, with which captions."""
    return fingerprint([ids, texts])


def check_given(config: Config, images: int | None = None) -> None:
    """Check that the folders a config names hold what it takes from them.

    Args:
        config: the experiment.
        images: how many the dataset has, where it is known.

    Raises:
        UserError: they do not; the message names the key.
    """
    if config.encode.given:
        found = read_manifest(config.encode.given)
        if images is not None and images != found["images"]:
            raise UserError(
                f"encode.given: {config.encode.given} holds {found['images']} images, the dataset has {images}: give "
                "prepare.path the images that the release was made of."
            )
    for entry in config.synthesize.queries:
        if folder := getattr(entry, "given", None):
            count = read_queries(folder, entry.name)["count"]
            if entry.count > count:
                raise UserError(f"synthesize.queries: {folder} has {count} queries '{entry.name}', not {entry.count}.")
    for curvature in config.curvatures():
        if config.fit.given and not Path(path := fitted_file(config.fit.given, curvature)).is_file():
            raise UserError(
                f"fit.given: {path} is missing, the release has no curvature '{curvature}': choose the one it has for "
                f"every variant and method, or run `{IMPORT}` again."
            )


def given_fits(folder: str | None) -> dict[str, str]:
    """Files of the curvatures that a folder has, by name; none without a folder."""
    paths = {curvature: fitted_file(folder, curvature) for curvature in FITTED} if folder else {}
    return {curvature: path for curvature, path in paths.items() if Path(path).is_file()}


def read_manifest(folder: str) -> dict:
    """The manifest of the encoded images: ``images``, ``captions``, ``order``, ``sha256`` of the arrays by role.

    Raises:
        UserError: the folder does not hold them.
    """
    return _read(encoded_files(folder), "manifest", "encode.given", ("images", "captions", "order", "sha256"))


def read_queries(folder: str, name: str) -> dict:
    """The record of a set of queries: ``count`` and ``prompts``.

    Raises:
        UserError: the folder does not hold them.
    """
    return _read(query_files(folder, name), "record", f"synthesize.queries ({name})", ("count", "prompts"))


def _read(files: dict[str, str], record: str, key: str, keys: tuple[str, ...]) -> dict:
    missing = [path for path in files.values() if not Path(path).is_file()]
    if missing:
        raise UserError(f"{key}: {missing[0]} is missing; name a folder that `{IMPORT}` wrote, or run that again.")
    content = read_json(files[record])
    if not isinstance(content, dict) or not set(keys) <= content.keys():
        raise UserError(f"{key}: {files[record]} is damaged; delete it and run `{IMPORT}` again.")
    return content


def take_encoded(layout: Layout, ids: list[str], texts: list[list[str]], device: "torch.device | str" = "cpu") -> None:
    """Make ``layout.latents`` and ``layout.captions`` of the given ones, by links where nothing is to be added.

    Args:
        layout: the experiment.
        ids: of the training images as they were prepared.
        texts: the captions of each.
        device: where a pipeline's text encoder runs.

    Raises:
        UserError: the given data are of other images or captions, or of another order, or damaged.
    """
    settings = layout.config.encode
    files, found = encoded_files(settings.given), read_manifest(settings.given)
    captions = len(distinct(texts))
    told = f"encode.given: {settings.given} holds"
    instead = "; prepare the annotations that the release was made of (prepare.path), or import the release again."
    if (found["images"], found["captions"]) != (len(ids), captions):
        raise UserError(
            f"{told} {found['images']} images with {found['captions']} distinct captions, prepared were {len(ids)} "
            f"with {captions}{instead}"
        )
    if found["order"] != order_of(ids, texts):
        raise UserError(f"{told} as many images and captions, but in another order or with other words{instead}")
    latents, states = (read_array(files[role], mmap=True) for role in ("latents", "captions"))
    for role, array, rows in (("latents", latents, 2 * len(ids)), ("captions", states, captions + 1)):
        if len(array) != rows:
            raise UserError(f"{files[role]} has {len(array)} rows, not {rows}: delete it and run `{IMPORT}` again.")
        if found["sha256"].get(role) != sha256_of(files[role]):
            raise UserError(f"{files[role]} has changed since it was made: delete it and run `{IMPORT}` again.")
    _link(files["latents"], layout.latents)
    if settings.pipeline:
        parts = _with_empty(states, _empty_state(layout, states.shape, device))
        write_array_in_parts(layout.captions, states.shape, parts, states.dtype.name)
    else:
        _link(files["captions"], layout.captions)


def _empty_state(layout: Layout, shape: tuple[int, ...], device: "torch.device | str") -> np.ndarray:
    """The empty caption's state by the config's pipeline, (tokens, width), float32."""
    from forgetrace.encoding.captions import caption_states

    state = caption_states(layout.config.encode, [EMPTY], shape[1], device)[0]
    if state.shape != shape[1:]:
        raise UserError(
            f"encode.pipeline: its text encoder gives states of {state.shape}, those of encode.given are {shape[1:]}: "
            "name the pipeline that the release was made with."
        )
    return state


def _with_empty(states: np.ndarray, empty: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(states) - 1, AT_ONCE):
        yield states[start : min(start + AT_ONCE, len(states) - 1)]
    yield empty[None]


def _link(path: str, target: str) -> None:
    """A symbolic link: token states of COCO have 90 GB.

    Snakemake dates a link by itself and by its target, whichever is younger: of other contents the manifest tells it.
    """
    with atomic(target) as temporary:
        temporary.symlink_to(Path(path).resolve())
