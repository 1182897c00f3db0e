import json
from pathlib import Path

import pytest
import torch

from forgetrace.artifacts import UserError, read_tensors
from forgetrace.config import read_concepts
from forgetrace.diffusion.customization import check_weights
from forgetrace.release.abc_models import import_models, read_customised, read_tasks, read_token

from . import abc_files as made

SHAPES = {name: weight.shape for name, weight in made.keys_and_values().items()}


@pytest.fixture
def tasks(tmp_path) -> Path:
    return made.write_tasks(made.write_benchmark(tmp_path / "abc"))


def test_tasks_name_files_as_they_lie_here(tasks):
    root = tasks.parent
    first, second = read_tasks(tasks, root)
    assert second.image == root / "synth/art/gpt/m1/samples/00000.png"
    assert second.exemplars == [root / f"exemplar/art/1-{i}.jpg" for i in range(3)]
    assert (second.prompt, second.training_prompt, second.category) == (
        "A school of <new1> fish",
        "<new1> fish",
        "fish",
    )
    assert first.model == root / "models/art/m0"


def test_the_weights_and_the_token_are_the_published_ones(tasks):
    folder = read_tasks(tasks, tasks.parent)[1].model
    weights, expected = read_customised(folder), made.keys_and_values()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert torch.equal(read_token(folder), torch.arange(made.EMBEDDING) + 1.0)


def test_names_of_diffusers_processors_are_the_same_weights(tasks):
    folder = tasks.parent / "models/art/m0"
    processors = {
        name.replace(".to_", ".processor.to_").replace(".weight", "_custom_diffusion.weight"): value
        for name, value in made.keys_and_values().items()
    }
    assert all(name.endswith(".attn2.processor.to_k_custom_diffusion.weight") for name in processors if "to_k" in name)
    torch.save(processors, folder / "pytorch_custom_diffusion_weights.pt")
    weights = read_customised(folder)
    assert all(torch.equal(weights[name], value) for name, value in made.keys_and_values().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(next(iter(w))), "1 are missing and 0 do not fit"),
        (lambda w: w.update({"conv_in.weight": torch.zeros(1)}), "0 are missing and 1 do not fit, such as conv_in"),
        (lambda w: w.update({next(iter(w)): torch.zeros(2, 2)}), "0 are missing and 1 do not fit"),
    ],
)
def test_no_weight_is_passed_over(tasks, change, message):
    weights, folder = made.keys_and_values(), tasks.parent / "models/art/m0"
    change(weights)
    torch.save(weights, folder / "pytorch_custom_diffusion_weights.pt")
    with pytest.raises(UserError, match=message):
        check_weights("file", read_customised(folder), SHAPES)


@pytest.mark.parametrize(
    "content",
    [{"<new2>": torch.zeros(5)}, {"<new1>": torch.zeros(5), "a": torch.zeros(5)}, {"<new1>": torch.zeros(1, 5)}],
)
def test_another_token_is_refused(tasks, content):
    folder = tasks.parent / "models/art/m0"
    torch.save(content, folder / "<new1>.bin")
    with pytest.raises(UserError, match="expected <new1> alone"):
        read_token(folder)


def test_imported_models_are_a_list_of_concepts(tasks, tmp_path, monkeypatch):
    folder = tmp_path / "imported"
    assert import_models(tasks, tasks.parent, folder) == 2
    concepts = read_concepts((folder / "concepts.json").as_posix())
    assert [(c.model, len(c.exemplars)) for c in concepts.values()] == [("object-art-m0", 1), ("style-art-m1", 3)]
    style = concepts["style-art-m1"]
    assert [(q.manner, q.prompt) for q in style.queries] == [("free", "A school of V* fish")]
    assert style.exemplars[0].prompt == "V* fish"
    assert all((folder / file).is_file() for concept in concepts.values() for file in concept.files)
    assert read_tensors(folder / style.weights).keys() == made.keys_and_values().keys()
    assert torch.equal(read_tensors(folder / style.token)["token"], torch.arange(made.EMBEDDING) + 1.0)
    # What is there is not converted again, unless what was published has changed.
    with monkeypatch.context() as patch:
        patch.setattr("forgetrace.release.abc_models.write_tensors", None)
        assert import_models(tasks, tasks.parent, folder) == 2
    torch.save({"<new1>": torch.zeros(made.EMBEDDING)}, tasks.parent / "models/art/m1/<new1>.bin")
    import_models(tasks, tasks.parent, folder)
    assert torch.equal(read_tensors(folder / style.token)["token"], torch.zeros(made.EMBEDDING))


def test_images_are_found_from_a_folder_behind_a_link(tasks, tmp_path):
    (tmp_path / "big/disk").mkdir(parents=True)
    (tmp_path / "shared").symlink_to(tmp_path / "big/disk")
    folder = tmp_path / "shared/models"
    import_models(tasks, tasks.parent, folder)
    concepts = read_concepts((folder / "concepts.json").as_posix())
    assert all((folder / file).is_file() for concept in concepts.values() for file in concept.files)


def test_tasks_of_one_model_must_agree_about_its_exemplars(tasks, tmp_path):
    entries = json.loads(tasks.read_text())
    tasks.write_text(json.dumps([*entries, entries[0] | {"train_prompt": "another <new1>"}]))
    with pytest.raises(UserError, match="tasks of the model art-m0 with other folders, exemplars or training prompts"):
        import_models(tasks, tasks.parent, tmp_path / "imported")


def test_missing_files_are_counted_at_once(tasks):
    root = tasks.parent
    for file in ("exemplar/art/1-2.jpg", "models/art/m0/<new1>.bin", "synth/art/gpt/m1/samples/00000.png"):
        (root / file).unlink()
    with pytest.raises(UserError, match=r"lacks 3 of the 10 files .* such as .*1-2\.jpg"):
        read_tasks(tasks, root)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_path", "/elsewhere/m0", "a model_path outside the data"),
        ("test_case_ind", 2, "case 2 of the 2 in test_art"),
        ("test_case_ind", True, "entry 0: test_case_ind"),
        ("prompt", "a school of fish", "a prompt without <new1>"),
        ("train_prompt", "fish", "a train_prompt without <new1>"),
        ("test_case", "test_more", r"test_more\.json is missing"),
    ],
)
def test_tasks_that_cannot_be_are_refused(tasks, key, value, message):
    entries = json.loads(tasks.read_text())
    entries[0][key] = value
    tasks.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=message):
        read_tasks(tasks, tasks.parent)
