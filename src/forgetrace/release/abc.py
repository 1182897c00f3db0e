"""The files that AbC publishes: test cases, features, learned heads and the calibrator, checked when they are read.

*Evaluating Data Attribution for Text-to-Image Models* (Wang et al., ICCV 2023, arXiv 2306.09345): a case is a model
customised on its exemplars, the images sampled from it are queries, and the candidates are its exemplars among a large
background set.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from forgetrace.artifacts import UserError
from forgetrace.attribution.calibration import Calibration
from forgetrace.attribution.heads import Heads
from forgetrace.release.model import AGAIN, load_restricted

BIAS_GAIN = 1e-3  # the published calibrator keeps -λ as a multiple of this
HEADS = ("real_mapper", "synth_mapper")


@dataclass(frozen=True)
class Case:
    """A customised model.

    Attributes:
        exemplars: files of the images it was customised on.
        queries: files of the images sampled from it, by kind of prompt.
        class_id: of the published folder names.
        category: what the exemplars show.
    """

    exemplars: list[str]
    queries: dict[str, list[str]]
    class_id: str
    category: str


@dataclass(frozen=True)
class Features:
    """Features of a set of images.

    Attributes:
        values: (N, width), float32.
        files: N names.
    """

    values: torch.Tensor
    files: list[str]


@dataclass(frozen=True)
class CaseFeatures:
    """Features of all cases of a file of test cases.

    Attributes:
        exemplars: of all models one after the other, E of them.
        spans: by model, the first of its exemplars and the one behind its last.
        queries: by kind of prompt, S of them.
        models: by kind of prompt, which model a query was sampled from, S numbers.
    """

    exemplars: Features
    spans: list[tuple[int, int]]
    queries: dict[str, Features]
    models: dict[str, list[int]]


def moved(files: Iterable[str], old: str, new: str) -> list[str]:
    """Published paths as they are here: the folder they begin with is exchanged, and nothing else of them.

    Args:
        files: as they were published.
        old: what they begin with, a whole folder or several.
        new: what stands for it here.

    Raises:
        UserError: a path begins otherwise.
    """
    start = old.rstrip("/") + "/"
    files = list(files)
    if other := [file for file in files if not file.startswith(start)]:
        raise UserError(f"{len(other)} of {len(files)} paths do not begin with {start}, such as {other[0]}.")
    return [f"{new.rstrip('/')}/{file.removeprefix(start)}" for file in files]


def read_listing(path: Path, keys: Mapping[str, type]) -> list[dict]:
    """A JSON file with a list of entries that have these keys of these kinds, and maybe others.

    Raises:
        UserError: the file is missing or damaged, or entries are incomplete; names the first ones.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {AGAIN}, or name the folder it is in.") from None
    except ValueError as error:
        raise UserError(f"{path} is no whole JSON file ({error}): {AGAIN}.") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} holds no list of entries: {AGAIN}.")
    wrong = [
        f"entry {number}: {key}"
        for number, entry in enumerate(entries)
        for key, kind in keys.items()
        # bool is an int of Python's, but no number of an entry.
        if not isinstance(entry, dict) or type(entry.get(key)) is not kind
    ]
    if wrong:
        shown = ", ".join(wrong[:5])
        raise UserError(f"{path} lacks what a published file has, or has it of another kind ({shown}): {AGAIN}.")
    return entries


def read_cases(path: Path) -> list[Case]:
    """A file of test cases, such as ``test_artchive.json``.

    Raises:
        UserError: as :func:`read_listing`, or a case has no exemplar, no query or other kinds of prompts.
    """
    entries = read_listing(path, {"exemplar": list, "synth": dict, "class_id": str, "category": str})
    kinds = entries[0]["synth"].keys()
    for number, entry in enumerate(entries):
        lists = [entry["exemplar"], *entry["synth"].values()]
        texts = all(isinstance(files, list) and files and all(isinstance(f, str) for f in files) for files in lists)
        if not texts or entry["synth"].keys() != kinds or not kinds:
            raise UserError(
                f"{path} has no files of exemplars and of queries for {', '.join(kinds) or 'any kind of prompt'} "
                f"in entry {number}: {AGAIN}."
            )
    return [Case(e["exemplar"], e["synth"], e["class_id"], e["category"]) for e in entries]


def read_features(path: Path) -> Features:
    """Features of the background images, ``laion_subset.pth``.

    Raises:
        UserError: the file is damaged, or is of another layout.
    """
    content = _mapping(path, ("feats", "paths"))
    return _features(path, "feats", content["feats"], content["paths"])


def read_case_features(path: Path, width: int) -> CaseFeatures:
    """Features of the exemplars and queries of a file of test cases, such as ``test_artchive.pth``.

    Args:
        path: the file.
        width: of the background's features.

    Raises:
        UserError: the file is damaged, of another layout or encoder, or its parts do not fit together.
    """
    singles = ("exemplar_tensors", "exemplar_paths", "exemplar_chunks")
    kinds = ("synth_tensors", "synth_paths", "synth_ids")
    content = _mapping(path, singles + kinds)
    exemplars = _features(path, "exemplar_tensors", content["exemplar_tensors"], content["exemplar_paths"], width)
    spans = _spans(path, content["exemplar_chunks"], len(exemplars.files))
    by_kind = [content[key] for key in kinds]
    if not all(isinstance(part, Mapping) and part and part.keys() == by_kind[0].keys() for part in by_kind):
        raise UserError(f"{path} has {', '.join(kinds)} of different kinds of prompts: {AGAIN}.")
    queries, models = {}, {}
    for kind, values in content["synth_tensors"].items():
        queries[kind] = _features(path, f"synth_tensors of {kind}", values, content["synth_paths"][kind], width)
        models[kind] = content["synth_ids"][kind]
        known = isinstance(models[kind], list) and all(type(m) is int and 0 <= m < len(spans) for m in models[kind])
        if not known or len(models[kind]) != len(queries[kind].files):
            raise UserError(
                f"{path} does not say of every query of {kind} which of {len(spans)} models made it: {AGAIN}."
            )
    return CaseFeatures(exemplars, spans, queries, models)


def check_cases(path: Path, features: CaseFeatures, cases: list[Case]) -> None:
    """Whether features are of these cases: the same files in the same order.

    Raises:
        UserError: they are not; says where they part.
    """
    expected = {"exemplars": [file for case in cases for file in case.exemplars]}
    found = {"exemplars": features.exemplars.files}
    for kind in cases[0].queries:
        expected[kind] = [file for case in cases for file in case.queries[kind]]
        found[kind] = features.queries[kind].files if kind in features.queries else []
    for what, files in expected.items():
        if found[what] != files:
            place = next(
                (i for i, pair in enumerate(zip(found[what], files, strict=False)) if pair[0] != pair[1]), None
            )
            where = f"number {place} differs" if place is not None else f"{len(found[what])} instead of {len(files)}"
            raise UserError(f"{path} holds features of other images than the test cases name ({what}: {where}).")


def read_heads(path: Path, width: int) -> Heads:
    """The learned heads h, of training images, and h̃, of synthesized ones, such as ``mapper/clip_tuned.pth``.

    Args:
        path: the file.
        width: of the features they are for.

    Raises:
        UserError: the file is damaged, or of other features; every key must match.
    """
    content, heads = _mapping(path, HEADS), Heads(width)
    for name, head in zip(HEADS, (heads.training_image, heads.generated), strict=True):
        shapes = {"weight": (width, width), "bias": (width,)}
        weights = content[name]
        found = {key: tuple(w.shape) for key, w in weights.items()} if isinstance(weights, Mapping) else None
        if found != shapes:
            raise UserError(f"{path} holds {found} as {name}, expected {shapes}: it is of other features, or damaged.")
        head.load_state_dict(weights)
    return heads.requires_grad_(False)


def read_calibrator(path: Path) -> Calibration:
    """The published calibrator, such as ``calibrator/clip_tuned.pth``.

    Raises:
        UserError: the file is damaged, or holds anything but its two numbers.
    """
    content = _mapping(path, ("inv_tau", "bias"))
    numbers = [
        value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else None for value in content.values()
    ]
    if len(content) != 2 or None in numbers:
        raise UserError(f"{path} holds more than a temperature and a threshold: {AGAIN}.")
    calibration = Calibration(content["inv_tau"].item(), -BIAS_GAIN * content["bias"].item())
    # λ ≥ 1 would cut off the most similar image too, and leave nothing to divide by.
    if not calibration.sharpness > 0 or not calibration.cutoff < 1:
        raise UserError(f"{path} holds 1/τ = {calibration.sharpness}, λ = {calibration.cutoff}: {AGAIN}.")
    return calibration


def _mapping(path: Path, keys: tuple[str, ...]) -> Mapping:
    content = load_restricted(path)
    missing = [key for key in keys if key not in content] if isinstance(content, Mapping) else list(keys)
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: it is another file, or damaged; {AGAIN}.")
    return content


def _features(path: Path, what: str, values: object, files: object, width: int | None = None) -> Features:
    table = isinstance(values, torch.Tensor) and values.ndim == 2 and values.is_floating_point()
    if not table or not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise UserError(f"{path} holds no table of features with the names of their images as {what}: {AGAIN}.")
    if len(values) != len(files) or not len(files):
        raise UserError(f"{path} holds {len(values)} rows and {len(files)} names as {what}: {AGAIN}.")
    if width not in (None, values.shape[1]):
        raise UserError(
            f"{path} holds {what} of width {values.shape[1]}, the background has {width}: take one encoder's."
        )
    if not bool(torch.isfinite(values).all()):
        raise UserError(f"{path} holds NaN or infinity in {what}: {AGAIN}.")
    return Features(values.float(), files)


def _spans(path: Path, chunks: object, count: int) -> list[tuple[int, int]]:
    """Where each model's exemplars are; together they are all of them, in order."""
    pairs = isinstance(chunks, list) and all(isinstance(c, (tuple, list)) and len(c) == 2 for c in chunks)
    spans = [tuple(chunk) for chunk in chunks] if pairs else []
    starts = [0, *(end for _, end in spans)]
    whole = starts[-1] == count and all(a == b < c for b, (a, c) in zip(starts, spans, strict=False))
    if not spans or not whole:
        raise UserError(f"{path} does not deal its {count} exemplars to models one after the other: {AGAIN}.")
    return spans
