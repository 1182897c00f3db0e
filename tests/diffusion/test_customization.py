import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from forgetrace.artifacts import UserError, read_arrays, read_image, read_json, read_tensors, sha256_of
from forgetrace.config import Customize
from forgetrace.datasets.concepts import names, query_names
from forgetrace.diffusion import customization
from forgetrace.diffusion.customization import customize, prior_rows
from forgetrace.diffusion.synthesis import generate
from forgetrace.encoding.store import load_encoded

from ..conftest import in_child
from ..customized import CUSTOMIZE, customised_layout


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
    with pytest.raises(UserError, match=r"customize.prompts: 'V\* like .*' has 12 tokens"):
        customize(own, names(own.config.customize, 5)["test"][0], "cpu")


def test_a_training_that_diverges_says_so(layout, monkeypatch):
    own = customised_layout(monkeypatch, customize={"learning_rate": 1e30})
    with pytest.raises(UserError, match=r"diverged at step .: lower customize.learning_rate"):
        customize(own, names(own.config.customize, 5)["test"][0], "cpu")
