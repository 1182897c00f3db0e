"""Parts of a text-to-image pipeline in diffusers' layout: an autoencoder in ``vae/``, a text encoder beside it.

A pipeline is a folder, or a model of the Hugging Face hub such as ``stabilityai/stable-diffusion-2-1-base``; only the
parts that are asked for are downloaded.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from forgetrace.artifacts import UserError, sha256_of
from forgetrace.encoding.hub import local_copy

WEIGHTS = ("*.safetensors", "*.bin")  # in order of preference, that of diffusers and transformers
TOKENIZER = "tokenizer"
WITHOUT_WEIGHTS = {TOKENIZER: "tokenizer_config.json", "scheduler": "scheduler_config.json"}  # and what they must have


def parts(name: str, wanted: list[str], key: str = "encode.pipeline") -> Path:
    """The folder that holds the wanted parts of a pipeline.

    Args:
        name: a folder, or a model of the hub as ``owner/model`` or ``owner/model@revision``.
        wanted: names of the parts, such as ``vae``.
        key: the config's key that names the pipeline, for messages.

    Raises:
        UserError: there is no such pipeline, it lacks a part, or there is no network to fetch it over.
    """

    def lacking(folder: Path) -> str | None:
        for part in wanted:
            needed = WITHOUT_WEIGHTS.get(part, "config.json")
            if not (folder / part / needed).is_file():
                return f"{part}/{needed}"
            if part not in WITHOUT_WEIGHTS and not _weights(folder / part):
                return f"weights in {part}/"
        return None

    texts = [f"{part}/*.{kind}" for part in wanted for kind in ("json", "txt")]
    models = [part for part in wanted if part not in WITHOUT_WEIGHTS]
    choices = [[*texts, *(f"{part}/{pattern}" for part in models)] for pattern in WEIGHTS]
    folders = ", ".join(f"{part}/" for part in wanted)
    return local_copy(name, choices, lacking, "pipeline", f"name a folder with {folders} in {key}")


def hashes(folder: Path, wanted: list[str]) -> dict[str, str]:
    """SHA-256 of the files that shape what the parts compute, by path inside the pipeline."""
    found = []
    for part in wanted:
        weights = [] if part in WITHOUT_WEIGHTS else _weights(folder / part)
        found += [*sorted((folder / part).glob("*.json")), *sorted((folder / part).glob("*.txt")), *weights]
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in found}


def load(read: Callable[[], tuple[Any, dict]], folder: Path) -> Any:
    """A model by ``from_pretrained`` with ``output_loading_info``, after checking that no weight of it is made up.

    Raises:
        UserError: a file is damaged, or weights are missing.
    """
    try:
        model, report = read()
    except Exception as error:  # a damaged file makes its reader raise nearly anything
        reason = str(error).split("\n")[0]
        raise UserError(f"{folder} cannot be read ({reason}): save or download the pipeline again.") from error
    if lacking := sorted(report["missing_keys"]):
        raise UserError(f"The weights in {folder} lack {lacking[0]}: save or download the pipeline again.")
    return model.float().eval().requires_grad_(False)


def _weights(folder: Path) -> list[Path]:
    """The weight files that will be read, one or several; those of a half-precision variant are not."""
    for pattern in WEIGHTS:
        plain = [path for path in sorted(folder.glob(pattern)) if ".fp16." not in path.name]
        if plain:
            return plain
    return []


def local_files(name: str | None, wanted: list[str]) -> list[str]:
    """Files of a pipeline's parts that a job reads, where the pipeline is a folder; nothing of what is on the hub."""
    if name and Path(name).is_file():
        return [name]
    if not name or not Path(name).is_dir():
        return []
    folders = [Path(name) / part for part in wanted]  # a part may be the folder itself
    return [path.as_posix() for folder in folders for path in sorted(folder.glob("*")) if path.is_file()]
