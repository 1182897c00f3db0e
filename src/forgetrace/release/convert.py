"""``forgetrace import-release``: published artifacts into this package's formats, once, and a config that uses them.

Large arrays are read and written some rows at a time. A file appears under its name when it is complete, and a record
says what it was made of: a second run makes what is missing, or was made of files that have changed since.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from forgetrace.artifacts import (
    UserError,
    atomic,
    read_array,
    read_image,
    sha256_of,
    write_array,
    write_array_in_parts,
    write_image,
    write_json,
    write_tensors,
)
from forgetrace.encoding.given import distinct, encoded_files, fitted_file, order_of, query_files, query_image
from forgetrace.progress import progress
from forgetrace.release.check import AGAIN, Contents, check
from forgetrace.release.draft import config_file, experiment_name, write_config
from forgetrace.release.fisher import read_fisher
from forgetrace.release.model import empty_unet, load_saved, published_scheduler
from forgetrace.release.source import QueryFiles, Release, recognise

LATENTS, IMAGES = 2**10, 32  # rows in memory: 4 MB of latents, 50 MB of token states
# Captions of the same words were encoded in different batches, and may have been rounded to half precision.
TOLERANCE = {"rtol": 1e-2, "atol": 1e-2}


def import_release(source: Path, folder: Path, name: str | None = None) -> tuple[Path, str]:
    """Convert a release and write ``config/<name>.yaml``, which runs its setting; a config that is there is kept.

    Args:
        source: the folder of AttributeByUnlearning's or FastGDA's artifacts.
        folder: where to write; its layout is that of :mod:`forgetrace.encoding.given`.
        name: of the experiment; by default after the folder.

    Returns:
        The config and a sentence on what was found.

    Raises:
        UserError: the source is no such release, or its files are damaged or do not fit together; the config is of
            other data; or another import writes to the folder.
    """
    config = config_file(experiment_name(name, folder), folder)
    release = recognise(source)
    contents = check(release)
    with alone_in(folder):
        kept = _convert(release, contents, source, folder, config)
    found = (
        f"{release.kind}: {len(contents.ids)} images, {len(distinct(contents.texts))} distinct captions, "
        + ", ".join(f"{len(prompts)} queries '{each}'" for each, prompts in contents.prompts.items())
        + (f"; {config} was there and is kept as it is" if kept else "")
    )
    return config, found + "."


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder, which the kernel drops with the process: an import clears what a killed one left.

    Raises:
        UserError: another import holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"Another import writes to {folder}: wait for it, then run again.") from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(held)


def _convert(release: Release, contents: Contents, source: Path, folder: Path, config: Path) -> bool:
    """Convert everything; returns whether there was a config."""
    once = _Once(folder, source, release.kind)
    files = encoded_files(folder.as_posix())
    _convert_model(once, release, contents)
    words = [release.annotations]
    once([files["latents"]], [release.latents], lambda: _convert_latents(release, contents, files["latents"]))
    once(
        [files["captions"]], [release.captions, *words], lambda: _convert_captions(release, contents, files["captions"])
    )
    made_of = [release.latents, release.captions, *words]
    once([files["manifest"]], made_of, lambda: write_json(files["manifest"], _manifest(release, contents, files)))
    for queries in release.queries:
        _convert_queries(once, queries, contents.prompts[queries.name])
    _convert_fisher(once, release, contents)
    return write_config(config, release, contents, folder)


class _Once:
    """Makes files that are not there yet, or not of these sources."""

    def __init__(self, folder: Path, source: Path, kind: str):
        """Args: folder, of the files; source, of what they are made of; kind, of the release.

        Raises:
            UserError: the folder holds another kind's.
        """
        self.folder, self.source, self.path = folder, source, folder / "import.json"
        self.made: dict = {"release": kind}
        try:
            self.made |= json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError):
            pass  # nothing made yet, or nobody knows of what
        if self.made["release"] != kind:
            raise UserError(
                f"{folder} holds {self.made['release']}'s release: choose another folder with --to for that of {kind}."
            )

    def __call__(self, outputs: list[str], sources: list[Path], make: Callable[[], None]) -> None:
        """Let ``make`` write the outputs, unless all are there and of the sources as they are now."""
        # Not by their path: a release may be moved.
        states = {path.relative_to(self.source).as_posix(): path.stat() for path in sources}
        stamp = {path: [state.st_size, state.st_mtime_ns] for path, state in states.items()}
        key = Path(outputs[-1]).relative_to(self.folder).as_posix()
        if self.made.get(key) == stamp and all(Path(output).is_file() for output in outputs):
            return
        for stale in (stale for path in map(Path, outputs) for stale in path.parent.glob(f".{path.name}.*.partial")):
            stale.unlink()  # of a killed import, as large as what it was to become
        make()
        self.made[key] = stamp
        write_json(self.path, self.made)


def _convert_model(once: _Once, release: Release, contents: Contents) -> None:
    weights, config = (f"{once.folder}/unet/{name}" for name in ("diffusion_pytorch_model.safetensors", "config.json"))
    schedule = f"{once.folder}/scheduler/scheduler_config.json"

    def make() -> None:
        tensors = load_saved(release.model)
        unet = empty_unet(tensors, contents.latents.shape[-1])
        write_tensors(weights, {name: value.float() for name, value in tensors.items()}, {"release": release.kind})
        for owner, path in ((unet, config), (published_scheduler(), schedule)):
            with atomic(path) as temporary:
                temporary.write_text(owner.to_json_string(), encoding="utf-8")

    once([weights, config, schedule], [release.model], make)


def _convert_latents(release: Release, contents: Contents, path: str) -> None:
    latents = contents.latents

    def parts() -> Iterator[np.ndarray]:
        with progress(total=len(latents), unit="latent", what="latents") as bar:
            for start in range(0, len(latents), LATENTS):
                part = np.asarray(latents[start : start + LATENTS], dtype=np.float32)
                _require_finite(part, release.latents, start)
                yield part
                bar.update(len(part))

    write_array_in_parts(path, latents.shape, parts())


def _convert_captions(release: Release, contents: Contents, path: str) -> None:
    shape = (len(distinct(contents.texts)) + 1, *contents.captions.shape[2:])
    write_array_in_parts(path, shape, _states(release.captions, contents.captions, contents.texts), "float16")


def _states(path: Path, states: np.ndarray, texts: list[list[str]]) -> Iterator[np.ndarray]:
    """Token states of each distinct caption, (n, tokens, width), float16, some at a time; then NaN for the empty one.

    Raises:
        UserError: a state is not finite, or those of two captions of the same words differ.
    """
    first: dict[str, tuple[int, int]] = {}
    with progress(total=len(texts), unit="image", what="captions") as bar:
        for start in range(0, len(texts), IMAGES):
            part = np.asarray(states[start : start + IMAGES])
            with np.errstate(over="ignore"):  # for the next line to tell
                part = part.astype(np.float16)
            _require_finite(part, path, start)
            new = []
            for image, own in enumerate(texts[start : start + IMAGES], start):
                for number, caption in enumerate(own):
                    state = part[image - start, number]
                    if first.setdefault(caption, (image, number)) == (image, number):
                        new.append(state)
                        continue
                    before = np.asarray(states[first[caption]], dtype=np.float16)
                    if not np.allclose(state.astype(np.float32), before.astype(np.float32), **TOLERANCE):
                        raise UserError(
                            f"{path} has different states for the caption '{caption}' of image {image + 1} and of "
                            f"image {first[caption][0] + 1}: it was made of other annotations, or in another order; "
                            f"{AGAIN}."
                        )
            if new:
                yield np.stack(new)
            bar.update(len(part))
    yield np.full((1, *states.shape[2:]), np.nan, dtype=np.float16)


def _require_finite(part: np.ndarray, path: Path, start: int) -> None:
    """Refuse NaN, infinity, and what is too large for the precision it is kept in."""
    if not (fine := np.isfinite(part).reshape(len(part), -1).all(axis=1)).all():
        row = start + int(np.flatnonzero(~fine)[0])
        raise UserError(f"{path} holds NaN, infinity or numbers beyond {part.dtype.name} in row {row}: {AGAIN}.")


def _manifest(release: Release, contents: Contents, files: dict[str, str]) -> dict:
    return {
        "release": release.kind,
        "images": len(contents.ids),
        "captions": len(distinct(contents.texts)),
        "order": order_of(contents.ids, contents.texts),
        "latent_shape": list(read_array(files["latents"], mmap=True).shape[1:]),
        "caption_shape": list(read_array(files["captions"], mmap=True).shape[1:]),
        "sha256": {role: sha256_of(files[role]) for role in ("latents", "captions")},
    }


def _convert_queries(once: _Once, queries: QueryFiles, prompts: list[str | None]) -> None:
    folder, images = once.folder.as_posix(), [queries.image(number) for number in range(len(prompts))]
    files = query_files(folder, queries.name)
    copies = [query_image(folder, queries.name, number) for number in range(len(prompts))]

    def make() -> None:
        latents, states = (np.load(path, mmap_mode="r") for path in (queries.latents, queries.prompts))
        for path, array, target in (
            (queries.latents, latents, files["latents"]),
            (queries.prompts, states[:, 0], files["prompts"]),
        ):
            array = np.array(array, dtype=np.float32)
            _require_finite(array, path, 0)
            write_array(target, array)
        for image, copy in zip(images, copies, strict=True):
            write_image(copy, read_image(image))
        texts = [prompt or f"(the prompt of query {i} is not published)" for i, prompt in enumerate(prompts)]
        write_json(files["record"], {"count": len(prompts), "prompts": texts})

    once([*files.values(), *copies, files["record"]], [*queries.files(), *images], make)


def _convert_fisher(once: _Once, release: Release, contents: Contents) -> None:
    path = fitted_file(once.folder.as_posix(), release.curvature)

    def make() -> None:
        shapes = {name: weight.shape for name, weight in load_saved(release.model).items()}
        fisher, draws = read_fisher(release, shapes, len(contents.latents))
        write_tensors(path, fisher, {"release": release.kind, "draws": draws})

    once([path], [*release.fisher, release.model], make)
