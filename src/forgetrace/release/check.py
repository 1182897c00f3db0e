"""Whether the files of a release fit together; all that do not are told at once, before hours of conversion."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from forgetrace.artifacts import UserError, read_image
from forgetrace.datasets import coco
from forgetrace.datasets.contract import captions_of
from forgetrace.release.fisher import read_fisher
from forgetrace.release.model import empty_unet, load_saved
from forgetrace.release.source import CAPTIONS, QueryFiles, Release

FLOATS = ("float16", "float32")
AGAIN = "download it again, or take all files from one release"


@dataclass(frozen=True)
class Contents:
    """What a release holds, found to fit together.

    Attributes:
        ids: N ids of the images, in the order of the annotations.
        texts: the five captions of each.
        latents: memory-mapped array (2N, C, H, W).
        captions: memory-mapped array (N, 5, tokens, width).
        prompts: by name of a set of queries, its Q prompts; None where they are not published.
        size: side of the queries' images in pixels.
    """

    ids: list[str]
    texts: list[list[str]]
    latents: np.ndarray
    captions: np.ndarray
    prompts: dict[str, list[str | None]]
    size: int


class _Problems:
    """Collects sentences of what is wrong, so that all are told at once."""

    def __init__(self):
        self.found: list[str] = []

    def expect(self, holds: bool, sentence: str) -> bool:
        """Note the sentence where something does not hold."""
        if not holds:
            self.found.append(sentence)
        return holds

    def try_to(self, read: Callable):
        """What ``read`` returns; None where it raises an error for the user, whose sentence is noted."""
        try:
            return read()
        except UserError as error:
            self.found.append(str(error))
        return None

    def array(self, path: Path, shape: tuple[int | None, ...], what: str) -> np.ndarray | None:
        """The array in a file, memory-mapped, where it is whole and of this shape; None stands for any size."""
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(array, np.ndarray):  # an .npz under this name
                raise ValueError("no single array")
        except Exception as error:  # a damaged file makes numpy raise nearly anything
            reason = str(error).split("\n")[0] or type(error).__name__
            self.found.append(f"{path} is no whole .npy file ({reason}): download it again.")
            return None
        fits = array.ndim == len(shape) and all(
            size in (None, found) for size, found in zip(shape, array.shape, strict=True)
        )
        wanted = f"({', '.join('any' if size is None else str(size) for size in shape)})"
        fits = self.expect(fits, f"{path} has shape {array.shape}, expected {wanted}, {what}: {AGAIN}.")
        name = array.dtype.name
        known = self.expect(name in FLOATS, f"{path} holds {name}, expected {' or '.join(FLOATS)}: {AGAIN}.")
        return array if fits and known else None


def check(release: Release) -> Contents:
    """Look at every file of a release but the numbers of its large arrays.

    Raises:
        UserError: files are damaged or do not fit together; names each of them.
    """
    problems = _Problems()
    listed = problems.try_to(lambda: _listed(release))
    ids, texts = listed or ([], [])
    rows = (2 * len(ids) if listed else None), (len(ids) if listed else None)
    latents = problems.array(
        release.latents, (rows[0], None, None, None), "two for each of the annotated images, unflipped before flipped"
    )
    captions = problems.array(
        release.captions, (rows[1], CAPTIONS, None, None), f"the states of {CAPTIONS} captions of each annotated image"
    )
    shapes = problems.try_to(lambda: _weights(release, latents, captions))
    if shapes:
        problems.try_to(lambda: read_fisher(release, shapes, 0))
    prompts, sizes = {}, {}
    for queries in release.queries:
        prompts[queries.name] = _queries(problems, queries, latents, captions, sizes)
    first_of = {}
    for path, size in sizes.items():
        first_of.setdefault(size, path)
    if len(first_of) > 1:
        first, other, *_ = first_of.values()
        problems.expect(False, f"{other} has other sides than {first}, expected squares of one size: {AGAIN}.")
    if len(problems.found) == 1:
        raise UserError(problems.found[0])
    if problems.found:
        lines = "".join(f"\n  {problem}" for problem in problems.found)
        raise UserError(f"These files do not fit together ({len(problems.found)} problems); mend them all:{lines}")
    return Contents(ids, texts, latents, captions, prompts, next(iter(sizes.values()))[0])


def _listed(release: Release) -> tuple[list[str], list[list[str]]]:
    """Ids and captions of the annotated images."""
    file, references, unusable = coco.listing(str(release.data))
    if unusable:
        raise UserError(
            f"{file} lists {len(unusable)} images that cannot be used, such as {unusable[0].text}: put all images of "
            f"COCO into {coco.images_in(str(release.data))}."
        )
    few = [reference for reference in references if len(captions_of(reference.caption)) != CAPTIONS]
    if few or not references:
        found = f"{few[0].file_name} with {len(captions_of(few[0].caption))} captions" if few else "no image"
        raise UserError(f"{file} lists {found}, expected {CAPTIONS} or more of every image: download it again.")
    return [reference.id for reference in references], [captions_of(reference.caption) for reference in references]


def _weights(release: Release, latents: np.ndarray | None, captions: np.ndarray | None) -> dict[str, torch.Size]:
    """Shapes of the model's weights by name."""
    weights = load_saved(release.model)
    try:
        unet = empty_unet(weights, 1 if latents is None else latents.shape[-1])
    except UserError as error:
        raise UserError(f"{release.model} {error}: {AGAIN}.") from None
    if odd := [name for name, weight in weights.items() if not bool(weight.isfinite().all())]:
        raise UserError(f"{release.model} holds NaN or infinity in {odd[0]}: {AGAIN}.")
    for array, path, axis, own, what in (
        (latents, release.latents, 1, unet.config.in_channels, "latents of {} channels"),
        (captions, release.captions, 3, unet.config.cross_attention_dim, "token states of width {}"),
    ):
        if array is not None and array.shape[axis] != own:
            raise UserError(
                f"{release.model} takes {what.format(own)}, {path} has {what.format(array.shape[axis])}: {AGAIN}."
            )
    return {name: weight.shape for name, weight in weights.items()}


def _queries(
    problems: _Problems,
    queries: QueryFiles,
    latents: np.ndarray | None,
    captions: np.ndarray | None,
    sizes: dict[Path, tuple[int, int]],
) -> list[str | None]:
    """The prompts of a set of queries; notes the size of every image."""
    of_latent = (None,) * 3 if latents is None else latents.shape[1:]
    own = problems.array(queries.latents, (None, *of_latent), "as those of training images")
    of_caption = (None,) * 2 if captions is None else captions.shape[2:]
    count = None if own is None else len(own)
    problems.array(queries.prompts, (count, 1, *of_caption), "one prompt of each query, as training captions")
    problems.expect(count != 0, f"{queries.latents} has no query: {AGAIN}.")
    prompts = [None] * (count or 0)
    if queries.texts:
        prompts = queries.texts.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
        told = f"{queries.texts} has {len(prompts)} lines, expected a prompt for each of {count} queries: {AGAIN}."
        problems.expect(count in (None, len(prompts)), told)
    for number in range(count or 0):
        path = queries.image(number)
        if not problems.expect(path is not None, f"{queries.images}/{number}.png is missing: {AGAIN}."):
            continue
        if (size := problems.try_to(lambda path=path: _size(path))) is not None:
            sizes[path] = size
            problems.expect(size[0] == size[1], f"{path} has {size} pixels, expected a square: {AGAIN}.")
    return prompts


def _size(path: Path) -> tuple[int, int]:
    """Height and width of an image."""
    try:
        return read_image(path).shape[:2]
    except UserError:
        raise UserError(f"{path} is no image that can be read: {AGAIN}.") from None
