import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from forgetrace.artifacts import (
    UserError,
    read_arrays,
    read_image,
    read_json,
    read_tensors,
    sha256_of,
    write_image,
    write_tensors,
)
from forgetrace.attribution.candidates import candidates
from forgetrace.config import Customize
from forgetrace.datasets.concepts import names, query_names
from forgetrace.diffusion import customization
from forgetrace.diffusion.customization import customize, prior_rows
from forgetrace.diffusion.loss import draw_losses
from forgetrace.diffusion.synthesis import generate
from forgetrace.encoding.store import load_encoded

from ..conftest import in_child
from ..customized import CUSTOMIZE, WITH_CONTROLS, customised_layout


@pytest.fixture
def layout(tiny, monkeypatch):
    return customised_layout(monkeypatch)


def test_only_keys_values_and_the_row_of_the_token_change(layout):
    model = names(layout.config.customize, 5)["test"][0]
    customize(layout, model, "cpu")
    files = layout.customized(model)
    changed, before = read_tensors(files["weights"]), read_tensors(layout.weights)
    assert changed.keys() == {name for name in before if ".attn2.to_k." in name or ".attn2.to_v." in name}
    assert all(not torch.equal(changed[name], before[name]) for name in changed)
    assert {name: tuple(value.shape) for name, value in read_tensors(files["token"]).items()} == {"token": (16,)}


def test_a_step_goes_down_the_loss_of_exemplars_and_of_the_prior_set(layout, monkeypatch):
    """Gradients of the first step against those of the two losses, one by one."""
    seen, whole = [], customization._gradients

    def first(unet, scheduler, token, distinct, rows, latents, prior_states, timesteps, noise, prior_weight):
        mean = whole(unet, scheduler, token, distinct, rows, latents, prior_states, timesteps, noise, prior_weight)
        weights = [*(weight for weight in unet.parameters() if weight.requires_grad), token.row]
        if not seen:
            count, states = len(rows), torch.cat([token.states(distinct)[rows], prior_states])
            parts = [
                draw_losses(unet, scheduler, latents[of], states[of], timesteps[of], noise[of]).mean()
                for of in (slice(count), slice(count, None))
            ]
            expected = torch.autograd.grad(parts[0] + 3 * parts[1], weights)
            seen.extend(zip(weights, [weight.grad.clone() for weight in weights], expected, strict=True))
            assert mean == pytest.approx(parts[0].item(), rel=1e-5)
        return mean

    monkeypatch.setattr(customization, "_gradients", first)
    layout = customised_layout(monkeypatch, customize={"prior_weight": 3})
    customize(layout, names(layout.config.customize, 5)["test"][0], "cpu")
    assert seen
    for _, found, expected in seen:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)


def test_other_weights_are_trained_where_the_config_says_so(tiny, monkeypatch):
    layout = customised_layout(monkeypatch, customize={"weights": "attn"})
    model = names(layout.config.customize, 5)["test"][0]
    customize(layout, model, "cpu")
    changed = read_tensors(layout.customized(model)["weights"])
    assert any(".attn1." in name for name in changed)
    assert all(".attn1." in name or ".attn2." in name for name in changed)


def test_the_record_and_the_arrays_are_of_the_images_beside_them(layout):
    model = next(name for name in names(layout.config.customize, 5)["test"] if name.startswith("style"))
    customize(layout, model, "cpu")
    record, files = read_json(layout.customized(model)["record"]), layout.customized(model)
    assert (record["part"], record["kind"], record["exemplars"]) == ("test", "style", ["V* style"] * 3)
    assert [(q["manner"], q["prompt"]) for q in record["queries"]] == [("template", "one V*"), ("free", "V* two")]
    assert record["made_by"]["inputs"]["weights"] == sha256_of(layout.weights)
    exemplars, queries = read_arrays(files["exemplars"]), read_arrays(files["queries"])
    assert exemplars["latents"].shape == (3, 12, 8, 8)
    images = [read_image(layout.customized_image(model, name)) for name in query_names(layout.config.customize, model)]
    assert len(images) == len(queries["latents"]) == 2
    assert not np.array_equal(queries["initial_noise"][0], queries["initial_noise"][1])
    unet = customization.load_unet(layout, torch.device("cpu"), changed=files["weights"])
    again = generate(layout, unet, queries["initial_noise"], queries["prompts"])
    np.testing.assert_array_equal(again, queries["latents"])


def test_controls_change_no_other_image(layout, monkeypatch):
    model = names(layout.config.customize, 5)["test"][0]
    customize(layout, model, "cpu")
    before = read_arrays(layout.customized(model)["queries"])
    controlled = customised_layout(monkeypatch, customize={"prompts": WITH_CONTROLS})
    customize(controlled, model, "cpu")
    after, record = read_arrays(controlled.customized(model)["queries"]), read_json(layout.customized(model)["record"])
    for role, values in before.items():
        np.testing.assert_array_equal(after[role][:2], values)
    assert len(after["latents"]) == 3
    assert (record["queries"][2]["manner"], record["queries"][2]["prompt"]) == ("plain", "a zero")


def test_a_second_run_and_one_after_a_kill_write_the_same(layout):
    model, files = names(layout.config.customize, 5)["test"][0], None
    files = layout.customized(model)
    customize(layout, model, "cpu")
    before = {role: sha256_of(path) for role, path in files.items()}
    for path in files.values():
        Path(path).unlink()

    def killed():
        def die(*arguments):
            import os

            os.kill(os.getpid(), signal.SIGKILL)

        customization.write_arrays = die
        customize(layout, model, "cpu")

    assert in_child(killed) == signal.SIGKILL
    assert not Path(files["record"]).exists()
    customize(layout, model, "cpu")
    assert {role: sha256_of(path) for role, path in files.items()} == before


def test_the_prior_set_is_of_the_asked_size_and_the_seeds(layout):
    encoded, settings = load_encoded(layout), layout.config.customize
    rows = prior_rows(settings, encoded, 0)
    assert len(set(rows)) == len(rows) == 7
    np.testing.assert_array_equal(rows, prior_rows(settings, encoded, 0))
    assert not np.array_equal(rows, prior_rows(settings, encoded, 1))
    assert len(prior_rows(Customize(**(CUSTOMIZE | {"prior_images": 500})), encoded, 0)) == len(encoded)


def test_steps_draw_from_the_prior_set_alone_and_its_weight_counts(layout, monkeypatch):
    model, drawn, results = names(layout.config.customize, 5)["test"][0], [], []
    allowed = set(prior_rows(layout.config.customize, load_encoded(layout), 5))
    examples = customization.Encoded.examples

    def watched(self, rows, picks=None):
        drawn.extend(rows)
        return examples(self, rows, picks)

    monkeypatch.setattr(customization.Encoded, "examples", watched)
    for weight in (0.0, 1.0):
        own = customised_layout(monkeypatch, customize={"prior_weight": weight})
        customize(own, model, "cpu")
        results.append(read_tensors(own.customized(model)["weights"]))
    assert len(drawn) == 2 * 4 * 2
    assert set(drawn) <= allowed
    assert any(not torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_the_exemplars_loss_falls(tiny, monkeypatch):
    layout = customised_layout(monkeypatch, customize={"weights": "all", "steps": 120, "learning_rate": 5e-3})
    model = names(layout.config.customize, 5)["test"][0]
    customize(layout, model, "cpu")
    loss = read_json(layout.customized(model)["record"])["loss"]
    assert loss["last"] < 0.85 * loss["first"]


def test_a_prompt_that_is_too_long_stops_before_any_training(layout, monkeypatch):
    prompts = CUSTOMIZE["prompts"] | {"object": {"exemplar": "a V*", "free": ["V* " + "like " * 9]}}
    own = customised_layout(monkeypatch, customize={"prompts": prompts})
    monkeypatch.setattr(customization, "train", lambda *a: pytest.fail("trained"))
    with pytest.raises(UserError, match=r"customize: the prompt 'V\* like .*' has 12 tokens"):
        customize(own, names(own.config.customize, 5)["test"][0], "cpu")


def test_a_training_that_diverges_says_so(layout, monkeypatch):
    own = customised_layout(monkeypatch, customize={"learning_rate": 1e30})
    with pytest.raises(UserError, match=r"diverged at step .: lower customize.learning_rate"):
        customize(own, names(own.config.customize, 5)["test"][0], "cpu")


def listed(folder: Path, **keys) -> str:
    """A list with one concept, whose exemplar is a picture of 20x24 pixels."""
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(2).integers(0, 256, size=(20, 24, 3), dtype=np.uint8)
    write_image(folder / "mine.png", pixels)
    entry = {
        "name": "mine",
        "kind": "object",
        "exemplars": [{"image": "mine.png", "prompt": "my V*"}],
        "queries": [{"manner": "template", "prompt": "a red V*"}, {"prompt": "look, V*"}],
    }
    (folder / "concepts.json").write_text(json.dumps([entry | keys]))
    return (folder / "concepts.json").as_posix()


def given(monkeypatch, path: str):
    layout = customised_layout(monkeypatch)
    plain = {key: value for key, value in CUSTOMIZE.items() if key not in ("objects", "styles", "exemplars", "prompts")}
    config = layout.config.model_copy(update={"customize": Customize(**plain, given=path)})
    return replace(layout, config=config)


def test_a_concept_of_ones_own_is_learned_from_its_image(tiny, monkeypatch, tmp_path):
    layout = given(monkeypatch, listed(tmp_path / "own"))
    customize(layout, "object-mine", "cpu")
    record = read_json(layout.customized("object-mine")["record"])
    assert (record["part"], record["kind"], record["exemplars"]) == ("test", "object", ["my V*"])
    assert [q["manner"] for q in record["queries"]] == ["template", "free"]
    assert read_image(layout.customized_image("object-mine", "exemplar-00")).shape == (16, 16, 3)
    assert record["loss"]["last"] > 0
    assert set(record["made_by"]["inputs"]) == {"weights", "given-0"}


def test_a_finished_model_is_taken_with_its_images(tiny, monkeypatch, tmp_path):
    trained = given(monkeypatch, listed(tmp_path / "own"))
    customize(trained, "object-mine", "cpu")
    files, images = trained.customized("object-mine"), ["object-mine-00", "object-mine-01"]
    before = {role: Path(path).read_bytes() for role, path in files.items()}
    expected = [read_image(trained.customized_image("object-mine", name)) for name in images]
    own = tmp_path / "finished"
    queries = [{"prompt": "a red V*", "image": "0.png"}, {"prompt": "look, V*", "image": "1.png"}]
    path = listed(own, weights="w.safetensors", token="t.safetensors", queries=queries)
    for i, pixels in enumerate(expected):
        write_image(own / f"{i}.png", pixels)
    for role, name in (("weights", "w"), ("token", "t")):
        (own / f"{name}.safetensors").write_bytes(before[role])
    latents, prompts = (read_arrays(files["queries"])[key] for key in ("latents", "prompts"))
    monkeypatch.setattr(customization, "train", None)
    layout = given(monkeypatch, path)
    customize(layout, "object-mine", "cpu")
    for role in ("weights", "token"):
        now, then = read_tensors(files[role]), read_tensors(own / f"{role[0]}.safetensors")
        assert all(torch.equal(now[name], then[name]) for name in then)
        assert now.keys() == then.keys()
    taken = read_arrays(files["queries"])
    assert taken.keys() == {"latents", "prompts"}
    np.testing.assert_allclose(taken["prompts"], prompts, atol=1e-6)
    assert np.abs(taken["latents"] - latents).mean() < 0.01  # pixels are rounded
    assert "loss" not in read_json(files["record"])
    own_experiment = candidates(layout, "object-mine", ["pixel"])
    assert read_arrays(own_experiment.query("object-mine-01")["tensors"]).keys() == {"latent", "prompt"}


@pytest.mark.parametrize("lacks", ["weights", "token"])
def test_a_finished_model_of_another_base_is_refused(tiny, monkeypatch, tmp_path, lacks):
    own = tmp_path / "finished"
    path = listed(own, weights="w.safetensors", token="t.safetensors")
    layout = given(monkeypatch, path)
    weights = {name: value for name, value in read_tensors(layout.weights).items() if ".attn2.to_k." in name}
    weights |= {name.replace("to_k", "to_v"): value for name, value in weights.items()}
    if lacks == "weights":
        weights.pop(next(iter(weights)))
    write_tensors(own / "w.safetensors", weights, {})
    write_tensors(own / "t.safetensors", {"token": torch.zeros(15)}, {})
    message = {"weights": "1 are missing and 0 do not fit", "token": "is of another text encoder"}[lacks]
    with pytest.raises(UserError, match=message):
        customize(layout, "object-mine", "cpu")
    assert not Path(layout.customized("object-mine")["record"]).exists()
