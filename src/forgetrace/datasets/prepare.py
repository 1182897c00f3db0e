"""The ``prepare`` stage: images, captions and caption pools as a Hugging Face ImageFolder.

Captions are split once into pools. Distinct captions are shuffled with the seed; the first
``tuning_captions`` become the tuning pool, the next ``report_captions`` the report pool, and images
that carry one of those captions are never trained on. Everything downstream follows the order of
``metadata.jsonl``.
"""

import json
from pathlib import Path

from forgetrace.artifacts import UserError, atomic, fingerprint, read_json, sha256_of, write_image, write_json
from forgetrace.config import Prepare
from forgetrace.datasets.contract import Example
from forgetrace.datasets.registry import SOURCES
from forgetrace.randomness import generator

TRAIN = "train"


def prepare(settings: Prepare, folder: str | Path) -> None:
    """Write ``images/``, ``metadata.jsonl`` and, last, ``manifest.json``.

    Raises:
        UserError: the source's package is missing or damaged, or the pools take every caption.
    """
    folder = Path(folder)
    examples = list(SOURCES[settings.dataset](settings.seed))
    pools = split_captions(examples, settings)
    split_of = {caption: pool for pool, captions in pools.items() for caption in captions}
    rows = []
    for example in examples:
        file_name = f"images/{example.id}.png"
        write_image(folder / file_name, example.image)
        rows.append(
            {
                "id": example.id,
                "file_name": file_name,
                "text": example.caption,
                "split": split_of.get(example.caption, TRAIN),
            }
        )
    with atomic(folder / "metadata.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    write_json(folder / "manifest.json", _manifest(settings, examples, rows, pools, folder))


def split_captions(examples: list[Example], settings: Prepare) -> dict[str, list[str]]:
    """Draw the held-out pools: distinct captions in a seeded order that queries follow.

    Raises:
        UserError: no caption would be left to train on.
    """
    captions = sorted({example.caption for example in examples})
    tuning, report = settings.tuning_captions, settings.report_captions
    if tuning + report >= len(captions):
        raise UserError(
            f"prepare.tuning_captions + prepare.report_captions = {tuning + report} leaves nothing to train on: "
            f"{settings.dataset} has {len(captions)} distinct captions."
        )
    order = generator(settings.seed, "caption pools").permutation(len(captions))
    shuffled = [captions[i] for i in order]
    return {"tuning": shuffled[:tuning], "report": shuffled[tuning : tuning + report]}


def _manifest(settings: Prepare, examples: list[Example], rows: list[dict], pools: dict, folder: Path) -> dict:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["split"]] = counts.get(row["split"], 0) + 1
    return {
        "dataset": settings.dataset,
        "settings": settings.model_dump(),
        "image_shape": list(examples[0].image.shape),
        "counts": counts,
        "pools": pools,
        "sha256": {
            "metadata.jsonl": sha256_of(folder / "metadata.jsonl"),
            "images": fingerprint([sha256_of(folder / row["file_name"]) for row in rows]),
        },
    }


def read_pool(manifest_path: str | Path, pool: str) -> list[str]:
    """The captions of a held-out pool, in query order."""
    return read_json(manifest_path)["pools"][pool]


def read_metadata(path: str | Path) -> list[dict]:
    """Rows of ``metadata.jsonl`` in file order.

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
            rows.append({key: row[key] for key in ("id", "file_name", "text", "split")})
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}, line {number}: not a record with id, file_name, text and split; "
                "delete the file and run `snakemake prepare` to rebuild it."
            ) from None
    return rows
