"""The customised models that AbU attributes on AbC: its list of tasks and the weights of Custom Diffusion.

*Multi-Concept Customization of Text-to-Image Diffusion* (Kumari et al., CVPR 2023, arXiv 2212.04488) changes the keys
and values of cross-attention and adds a token. Published code loads whatever names fit and passes over the rest; here
every weight must be there and must fit.
"""

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from forgetrace.artifacts import UserError, provenance, read_tensors_provenance, write_json, write_tensors
from forgetrace.config import NAME, NEW_TOKEN, read_concepts
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
    for key in ("synth_image_path", "model_path"):
        if Path(entry[key]).is_absolute() or ".." in Path(entry[key]).parts:
            raise UserError(f"{path} has a {key} outside the data (entry {number}, {entry[key]!r}): {AGAIN}.")
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


def read_customised(folder: Path) -> dict[str, torch.Tensor]:
    """The keys and values of cross-attention of a customised model, by the names they have in diffusers' UNet.

    Whether they are all of a base model's is checked when they are put into it
    (:func:`forgetrace.diffusion.customization.take`).

    Args:
        folder: of the model.
    """
    # diffusers' attention processors of Custom Diffusion have names of their own for the same matrices.
    return {
        name.replace(".processor.to_", ".to_").replace("_custom_diffusion.", "."): value.float()
        for name, value in load_saved(folder / WEIGHTS).items()
    }


def read_token(folder: Path) -> torch.Tensor:
    """The embedding (width,) of a customised model's new token, float32.

    Args:
        folder: of the model.

    Raises:
        UserError: there are other tokens, or it is no vector.
    """
    path = folder / f"{TOKEN}.bin"
    content = load_saved(path)
    if content.keys() != {TOKEN} or content[TOKEN].ndim != 1:
        found = {name: tuple(value.shape) for name, value in content.items()}
        raise UserError(f"{path} holds {found}, expected {TOKEN} alone: {AGAIN}.")
    return content[TOKEN].float()


def import_models(path: Path, root: Path, folder: Path) -> int:
    """Write the customised models and their images as a list for ``customize.given``; run again, it goes on.

    Args:
        path: AbU's ``all_tasks.json``.
        root: as :func:`read_tasks`.
        folder: where to: ``concepts.json`` and, by model, its weights and its token. Images stay where they are.

    Returns:
        Number of models.

    Raises:
        UserError: as :func:`read_tasks`, or a model cannot be read.
    """
    of = defaultdict(list)
    for task in read_tasks(path, root):
        of[_name(task, root)].append(task)
    for name, tasks in of.items():
        if any(_truth(task) != _truth(tasks[0]) for task in tasks):
            raise UserError(
                f"{path} has tasks of the model {name} with other folders, exemplars or training prompts: {AGAIN}."
            )
    listed = []
    for name, tasks in of.items():
        model = tasks[0].model
        files = {"weights": f"{name}/weights.safetensors", "token": f"{name}/token.safetensors"}
        made_by = provenance({}, {"weights": model / WEIGHTS, "token": model / f"{TOKEN}.bin"})
        if not _is_converted(folder / files["token"], made_by):
            write_tensors(folder / files["weights"], read_customised(model), made_by)
            write_tensors(folder / files["token"], {"token": read_token(model)}, made_by)
        listed.append(_listed(name, tasks, root, folder) | files)
    write_json(folder / "concepts.json", listed)
    return len(read_concepts((folder / "concepts.json").as_posix()))


def _name(task: Task, root: Path) -> str:
    """A model's name in paths, from its folder below ``models/``."""
    name = task.model.relative_to(root).as_posix().removeprefix("models/").lower().replace("/", "-")
    if not re.fullmatch(NAME, name):
        raise UserError(f"{task.model}: its name cannot be one of a customised model; rename the folder to letters.")
    return name


def _truth(task: Task) -> tuple[Path, list[Path], str]:
    """What all tasks of a model have in common."""
    return task.model, task.exemplars, task.training_prompt


def _is_converted(token: Path, made_by: dict) -> bool:
    """Whether the token, which is written last, is there and of the same published files."""
    try:
        return read_tensors_provenance(token)["inputs"] == made_by["inputs"]
    except (UserError, KeyError):
        return False


def _listed(name: str, tasks: list[Task], root: Path, folder: Path) -> dict:
    """An entry of the list: one exemplar makes an object, several a style; GPT's prompts are free sentences."""
    first = tasks[0]
    return {
        "name": name,
        "kind": "object" if len(first.exemplars) == 1 else "style",
        "exemplars": [
            {"image": _relative(image, folder), "prompt": first.training_prompt.replace(TOKEN, NEW_TOKEN)}
            for image in first.exemplars
        ],
        "queries": [
            {
                "manner": "free" if "gpt" in task.image.relative_to(root).parts else "template",
                "prompt": task.prompt.replace(TOKEN, NEW_TOKEN),
                "image": _relative(task.image, folder),
            }
            for task in tasks
        ],
    }


def _relative(path: Path, folder: Path) -> str:
    # Of what links point to: the system follows them before it goes up.
    return Path(os.path.relpath(os.path.realpath(path), os.path.realpath(folder))).as_posix()
