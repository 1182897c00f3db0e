"""The customised models that AbU attributes on AbC: its list of tasks and the weights of Custom Diffusion.

*Multi-Concept Customization of Text-to-Image Diffusion* (Kumari et al., CVPR 2023, arXiv 2212.04488) changes the keys
and values of cross-attention and adds a token. Published code loads whatever names fit and passes over the rest; here
every weight must be there and must fit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from forgetrace.artifacts import UserError
from forgetrace.diffusion.subsets import select
from forgetrace.release.abc import Case, moved, read_cases, read_listing
from forgetrace.release.model import AGAIN, load_saved

WEIGHTS, TOKEN = "pytorch_custom_diffusion_weights.pt", "<new1>"
PUBLISHED = "dataset"  # the folder that AbC's paths begin with
TASK = {
    "synth_image_path": str,
    "prompt": str,
    "test_case": str,
    "test_case_ind": int,
    "model_path": str,
    "train_prompt": str,
    "category": str,
}


@dataclass(frozen=True)
class Task:
    """A query of a customised model.

    Attributes:
        image: the sampled image.
        prompt: what it was sampled from, with the token.
        model: folder of the customised model.
        training_prompt: of the exemplars, with the token.
        exemplars: images the model was customised on.
        category: what they show.
    """

    image: Path
    prompt: str
    model: Path
    training_prompt: str
    exemplars: list[Path]
    category: str


def read_tasks(path: Path, root: Path) -> list[Task]:
    """AbU's ``all_tasks.json``, with the files it names as they lie here.

    Args:
        path: the list.
        root: the folder of AbC's data: ``json/``, ``exemplar/``, ``synth/``, ``models/``.

    Raises:
        UserError: the list or a file of cases is damaged, or files are missing; all of those are counted.
    """
    entries = read_listing(path, TASK)
    known = {name: read_cases(root / "json" / f"{name}.json") for name in sorted({e["test_case"] for e in entries})}
    tasks = [_task(path, number, entry, known[entry["test_case"]], root) for number, entry in enumerate(entries)]
    models = {task.model for task in tasks}
    needed = {task.image for task in tasks} | {image for task in tasks for image in task.exemplars}
    needed |= {folder / file for folder in models for file in (WEIGHTS, f"{TOKEN}.bin")}
    if missing := sorted(file for file in needed if not file.is_file()):
        raise UserError(
            f"{root} lacks {len(missing)} of the {len(needed)} files that {path} asks for, such as {missing[0]}: "
            "download and unpack them there."
        )
    return tasks


def _task(path: Path, number: int, entry: dict, cases: list[Case], root: Path) -> Task:
    place = entry["test_case_ind"]
    if not 0 <= place < len(cases):
        raise UserError(
            f"{path} asks for case {place} of the {len(cases)} in {entry['test_case']} (entry {number}): {AGAIN}."
        )
    for key in ("prompt", "train_prompt"):
        if TOKEN not in entry[key]:
            raise UserError(f"{path} has a {key} without {TOKEN} (entry {number}, {entry[key]!r}): {AGAIN}.")
    return Task(
        image=root / entry["synth_image_path"],
        prompt=entry["prompt"],
        model=root / entry["model_path"],
        training_prompt=entry["train_prompt"],
        exemplars=[Path(file) for file in moved(cases[place].exemplars, PUBLISHED, root.as_posix())],
        category=entry["category"],
    )


def read_customised(folder: Path, weights: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """The keys and values of cross-attention of a customised model.

    Args:
        folder: of the model.
        weights: shapes of the base model's weights by name.

    Returns:
        Tensors by the names of the base model's weights.

    Raises:
        UserError: weights are missing, superfluous or of another shape; all are counted.
    """
    path = folder / WEIGHTS
    # diffusers' attention processors of Custom Diffusion have names of their own for the same matrices.
    found = {
        name.replace(".processor.to_", ".to_").replace("_custom_diffusion.", "."): value
        for name, value in load_saved(path).items()
    }
    expected = {name: tuple(weights[name]) for name in select(weights, "cross-attn-kv")}
    wrong = {name: value.shape for name, value in found.items() if expected.get(name) != tuple(value.shape)}
    missing = sorted(expected.keys() - found.keys())
    if wrong or missing:
        raise UserError(
            f"{path} is of another base model: of {len(expected)} keys and values {len(missing)} are missing and "
            f"{len(wrong)} do not fit, such as {[*wrong, *missing][0]}. Name the model it was customised from."
        )
    return found


def read_token(folder: Path, width: int) -> torch.Tensor:
    """The embedding (width,) of a customised model's new token, float32.

    Args:
        folder: of the model.
        width: of the text encoder's embeddings.

    Raises:
        UserError: there are other tokens, or it is of another text encoder.
    """
    path = folder / f"{TOKEN}.bin"
    content = load_saved(path)
    found = {name: tuple(value.shape) for name, value in content.items()}
    if found != {TOKEN: (width,)}:
        raise UserError(f"{path} holds {found}, expected {TOKEN} of width {width}: it is of another text encoder.")
    return content[TOKEN].float()
