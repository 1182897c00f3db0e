"""The ``prepare`` stage: images, captions and caption pools as a Hugging Face ImageFolder.

Images of a bundled dataset are written; one's own stay where they are, and ``metadata.jsonl`` refers to them. Captions
are split once into pools. Distinct captions are shuffled with the seed; the first ``tuning_captions`` become the tuning
pool, the next ``report_captions`` the report pool, and images that carry one of those captions are never trained on.
Everything downstream follows the order of ``metadata.jsonl``.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from forgetrace.artifacts import UserError, atomic, fingerprint, read_json, sha256_of, write_image, write_json
from forgetrace.config import Prepare
from forgetrace.datasets.contract import Example, Problem, Reference, captions_of
from forgetrace.datasets.decoding import decoded
from forgetrace.datasets.registry import OWN, SOURCES
from forgetrace.progress import progress
from forgetrace.randomness import generator

TRAIN = "train"
KEYS = ("id", "file_name", "text", "split")


def prepare(settings: Prepare, folder: str | Path, look: bool = True) -> None:
    """Write ``images/`` (of a bundled dataset), ``metadata.jsonl`` and, last, ``manifest.json``.

    Args:
        settings: the dataset and its pools.
        folder: where to write.
        look: as :func:`examples_of` has it; without, nothing tells later whether one's own images have changed.

    Raises:
        UserError: as :func:`examples_of`, or the pools leave nothing to train on.
    """
    folder = Path(folder)
    examples = examples_of(settings, look)
    pools = split_captions(examples, settings)
    split_of = {caption: pool for pool, captions in pools.items() for caption in captions}
    rows = []
    for example in examples:
        split = next((split_of[caption] for caption in captions_of(example.caption) if caption in split_of), TRAIN)
        row = {"id": example.id, "file_name": _file_name(example, folder), "text": example.caption, "split": split}
        rows.append(row | ({"sha256": example.sha256} if isinstance(example, Reference) else {}))
    with atomic(folder / "metadata.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    write_json(folder / "manifest.json", _manifest(settings, examples, rows, pools, folder))


def examples_of(settings: Prepare, look: bool = False) -> Sequence[Example | Reference]:
    """The images of a dataset with their captions, in its order.

    Args:
        settings: the dataset.
        look: read every image of one's own, see whether it is whole, and note its SHA-256.

    Raises:
        UserError: a bundled dataset's package is missing or damaged, or one's own images or captions cannot be used;
            the message names every one of them.
    """
    if settings.dataset not in OWN:
        return list(SOURCES[settings.dataset](settings.seed))
    source = OWN[settings.dataset]
    file, references, problems = source.listing(settings.path)
    if look:
        images = Path(source.images_in(settings.path))
        bar = progress(references, total=len(references), unit="image", what="looking at images")
        looked = [_looked_at(reference, images) for reference in bar]
        references = [each for each in looked if isinstance(each, Reference)]
        problems = sorted([*problems, *(each for each in looked if isinstance(each, Problem))])
    if problems:
        lines = "".join(f"\n  {problem.text}" for problem in problems)
        raise UserError(f"{file}: mend or remove what cannot be used ({len(problems)}), then run again:{lines}")
    if not references:
        raise UserError(f"{file} lists no image.")
    return references


def _looked_at(reference: Reference, images: Path) -> Reference | Problem:
    try:
        content = (images / reference.file_name).read_bytes()
        decoded(content)
    except Exception as error:  # Pillow's readers raise nearly anything
        reason = str(error).split("\n")[0] or type(error).__name__
        if "cannot identify image file" in reason:
            reason = "no format that Pillow knows"  # its own words name an object in memory
        text = f"{reference.place}: {reference.file_name} cannot be read as an image ({reason})"
        return Problem(reference.order, text)
    return replace(reference, sha256=hashlib.sha256(content).hexdigest())


def _file_name(example: Example | Reference, folder: Path) -> str:
    """Where the image is, below the images' folder; an image that has just been made is written there."""
    if isinstance(example, Reference):
        return example.file_name
    write_image(folder / f"images/{example.id}.png", example.image)
    return f"images/{example.id}.png"


def image_shape(settings: Prepare, examples: Sequence[Example | Reference]) -> list[int]:
    """Height, width and 3, the same for all images as they are read."""
    return list(examples[0].image.shape) if settings.size is None else [settings.size, settings.size, 3]


def split_captions(examples: Sequence[Example | Reference], settings: Prepare) -> dict[str, list[str]]:
    """Draw the held-out pools: distinct captions in a seeded order that queries follow.

    Raises:
        UserError: no image would be left to train on.
    """
    captions = sorted({caption for example in examples for caption in captions_of(example.caption)})
    tuning, report = settings.tuning_captions, settings.report_captions
    order = generator(settings.seed, "caption pools").permutation(len(captions))
    shuffled = [captions[i] for i in order]
    if not count_trained(examples, shuffled[: tuning + report]):
        raise UserError(
            f"prepare.tuning_captions + prepare.report_captions = {tuning + report} leaves nothing to train on: "
            f"{settings.dataset} has {len(captions)} distinct captions."
        )
    return {"tuning": shuffled[:tuning], "report": shuffled[tuning : tuning + report]}


def count_trained(examples: Sequence[Example | Reference], held_out: Sequence[str]) -> int:
    """How many images carry none of the captions that are held out."""
    taken = set(held_out)
    return sum(taken.isdisjoint(captions_of(example.caption)) for example in examples)


def _manifest(settings: Prepare, examples: Sequence, rows: list[dict], pools: dict, folder: Path) -> dict:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["split"]] = counts.get(row["split"], 0) + 1
    own = settings.dataset in OWN
    return {
        "dataset": settings.dataset,
        # Not where images are: moved with all their folder, they are the same data, and trainings on them hold.
        "settings": settings.model_dump(exclude={"path"}),
        "image_shape": image_shape(settings, examples),
        "counts": counts,
        "pools": pools,
        "sha256": {
            "metadata.jsonl": sha256_of(folder / "metadata.jsonl"),
            "images": fingerprint([row["sha256"] if own else sha256_of(folder / row["file_name"]) for row in rows]),
        },
    }


def read_pool(manifest_path: str | Path, pool: str) -> list[str]:
    """The captions of a held-out pool, in query order."""
    return read_json(manifest_path)["pools"][pool]


def read_metadata(path: str | Path) -> list[dict]:
    """Rows of ``metadata.jsonl`` in file order; those of one's own images have a ``sha256``.

    Raises:
        UserError: the file is missing, or a line of it is not a record with the four keys.
    """
    rows = []
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}): run `snakemake prepare`.") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({key: row[key] for key in KEYS + ("sha256",) * ("sha256" in row)})
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}, line {number}: not a record with id, file_name, text and split; "
                "delete the file and run `snakemake prepare` to rebuild it."
            ) from None
    return rows
