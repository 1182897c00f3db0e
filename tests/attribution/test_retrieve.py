"""A customised model as an experiment of its own, through every kind of method."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from forgetrace.artifacts import (
    UserError,
    read_array,
    read_arrays,
    read_json,
    read_table,
    read_tensors,
    sha256_of,
    write_table,
)
from forgetrace.attribution import retrieve as module
from forgetrace.attribution.asked import asked, customised_files
from forgetrace.attribution.candidates import (
    candidates,
    discard,
    exemplar_files,
    exemplar_ids,
    validation_images,
    validation_subjects,
)
from forgetrace.attribution.registry import attributor
from forgetrace.attribution.retrieve import retrieve
from forgetrace.datasets.concepts import names, query_manners
from forgetrace.datasets.images import images_folder
from forgetrace.diffusion.customization import customize
from forgetrace.diffusion.synthesis import generate
from forgetrace.encoding.store import load_encoded
from forgetrace.unlearning.sweep import sweep
from forgetrace.unlearning.variants import read_query, unlearn_query

from ..conftest import in_child
from ..customized import WITH_CONTROLS, customised_layout

METHODS = {"unlearn": {"attributor": "unlearning"}, "pixel": {}, "text": {}, "unet-features": {"noises": 2}}
METHODS |= {"shift": {"attributor": "output-shift", "variant": "unlearn", "timesteps": 2}}
METHODS |= {"influence": {"timesteps": 2, "weights": "cross-attn-kv"}, "random": {}}
COSTLY = {"costly": {"methods": ["influence"], "models": 1, "queries": 1}}


@pytest.fixture
def layout(tiny, monkeypatch):
    layout = customised_layout(monkeypatch, score={"methods": METHODS}, retrieve=COSTLY)
    customize(layout, style(layout), "cpu")
    return layout


def style(layout) -> str:
    return next(name for name in names(layout.config.customize, 5)["test"] if name.startswith("style"))


def test_exemplars_stand_behind_the_base_set_with_their_own_prompts(layout):
    own = candidates(layout, style(layout), ["pixel"])
    base, encoded, exemplars = (
        load_encoded(layout),
        load_encoded(own),
        read_arrays(layout.customized(own.concept)["exemplars"]),
    )
    assert encoded.image_ids == [*base.image_ids, *exemplar_ids(own.concept, 3)]
    np.testing.assert_array_equal(encoded.latents[: len(base)], base.latents)
    np.testing.assert_array_equal(encoded.latents[len(base) :], exemplars["latents"])
    rows = np.array([0, 7, len(base), len(base) + 2])
    states = encoded.states(encoded.caption(rows)).numpy()
    np.testing.assert_array_equal(states[:2], base.states(base.caption(rows[:2])).numpy())
    np.testing.assert_array_equal(states[2:], exemplars["states"][[0, 2]])
    np.testing.assert_array_equal(encoded.captions[encoded.empty_row], base.captions[base.empty_row])


def test_mirror_images_of_exemplars_stand_behind_those_of_the_base_set(tiny, monkeypatch):
    from forgetrace.encoding.encode import encode

    layout = customised_layout(monkeypatch, encode={"flips": True})
    encode(layout)
    customize(layout, style(layout), "cpu")
    own = candidates(layout, style(layout), ["random"])
    latents, base = read_array(own.latents), read_array(layout.latents)
    assert len(latents) == 2 * (40 + 3) == len(base) + 6
    np.testing.assert_array_equal(latents[43:83], base[40:])
    np.testing.assert_array_equal(
        latents[83:], latents[40:43].reshape(3, 3, 2, 2, 8, 8)[..., ::-1][:, :, :, ::-1].reshape(3, 12, 8, 8)
    )


def test_the_attributed_model_is_the_customised_one(layout):
    own = candidates(layout, style(layout), ["pixel"])
    changed = read_tensors(layout.customized(own.concept)["weights"])
    weights, base = read_tensors(own.weights), read_tensors(layout.weights)
    assert all((weights[name] == changed.get(name, base[name])).all() for name in base)
    query, arrays = own.config.queries()[1], read_arrays(layout.customized(own.concept)["queries"])
    np.testing.assert_array_equal(read_query(own, query).latent.numpy(), arrays["latents"][1])
    import torch

    from forgetrace.diffusion.model import load_unet

    again = generate(own, load_unet(own, torch.device("cpu")), arrays["initial_noise"], arrays["prompts"])
    np.testing.assert_array_equal(again, arrays["latents"])


def test_every_method_ranks_the_base_set_and_the_exemplars(layout):
    retrieve(layout, style(layout), "cpu")
    found = read_table(layout.ranks(style(layout)))
    assert found.groupby("method")["query"].nunique().to_dict() == {
        "unlearn": 2, "shift": 2, "pixel": 2, "text": 2, "unet-features": 2, "influence": 1, "random": 2,
    }  # fmt: skip
    for method, own in asked(layout, style(layout), query_manners(layout.config.customize, style(layout))).items():
        for query in own:
            table = read_table(layout.retrieved(style(layout), method, query))
            assert len(table) == 40 + 3
            ranks = found[(found["method"] == method) & (found["query"] == query)].set_index("image_id")["rank"]
            assert ranks.to_dict() == {
                image: int(table.index[table["image_id"] == image][0]) + 1 for image in exemplar_ids(style(layout), 3)
            }
    assert not Path(layout.checkpoints(f"retrieve/{style(layout)}")).exists()


def test_every_control_is_ranked_for_beside_images_that_are_not_made_anew(layout, monkeypatch):
    model = style(layout)
    retrieve(layout, model, "cpu")
    before = {query: sha256_of(layout.retrieved(model, "unlearn", query)) for query in (f"{model}-00", f"{model}-01")}
    controlled = customised_layout(
        monkeypatch, customize={"prompts": WITH_CONTROLS}, score={"methods": METHODS}, retrieve=COSTLY
    )
    customize(controlled, model, "cpu")
    retrieve(controlled, model, "cpu")
    found = read_table(controlled.ranks(model))
    control = f"{model}-02"
    assert set(found.loc[found["query"] == control, "method"]) == set(METHODS)
    assert set(found.loc[found["method"] == "influence", "query"]) == {f"{model}-00", control}
    assert before == {query: sha256_of(layout.retrieved(model, "unlearn", query)) for query in before}


def test_settings_are_not_chosen_on_controls(monkeypatch, tiny):
    layout = customised_layout(monkeypatch, customize={"prompts": WITH_CONTROLS})
    images = validation_images(layout, 4)
    assert {query[-2:] for _, query in images} == {"00", "01"}
    with pytest.raises(UserError, match="validation models make 4 images"):
        validation_images(layout, 5)


def test_a_killed_run_goes_on_with_the_query_it_was_at_and_ends_the_same(layout, monkeypatch):
    model, done = style(layout), []
    retrieve(layout, model, "cpu")
    before = read_table(layout.ranks(model))
    Path(layout.ranks(model)).unlink()
    shutil.rmtree(Path(layout.root, "retrieve"))
    unlearn = module.unlearn_query

    def killed():
        def once(*arguments):
            if done:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(unlearn(*arguments))

        module.unlearn_query = once
        retrieve(layout, model, "cpu")

    assert in_child(killed) == signal.SIGKILL
    monkeypatch.setattr(module, "unlearn_query", lambda *a: done.append(a[2]) or unlearn(*a))
    retrieve(layout, model, "cpu")
    assert done == [f"{model}-01"]
    assert read_table(layout.ranks(model)).equals(before)


def test_what_was_ranked_is_not_unlearned_again_for_one_more_method(layout, monkeypatch):
    model, asked_for, unlearn = style(layout), [], module.unlearn_query
    retrieve(layout, model, "cpu")
    before = {path: read_table(path) for path in map(str, Path(layout.root, "retrieve").rglob("*.parquet"))}
    monkeypatch.setattr(module, "unlearn_query", lambda *a: asked_for.append(a[1:3]) or unlearn(*a))
    more = METHODS | {"unlearn-sgd": {"attributor": "unlearning"}}
    both = {"costly": {"methods": ["unlearn-sgd"], "models": 1, "queries": 1}}
    retrieve(customised_layout(monkeypatch, score={"methods": more}, retrieve=both), model, "cpu")
    assert asked_for == [("unlearn-sgd", f"{model}-00")]
    unchanged = [path for path in before if not path.endswith(f"{model}.parquet")]
    assert all(read_table(path).equals(before[path]) for path in unchanged)
    asked_for.clear()
    # A table of before there were fingerprints is made once more, and then no more.
    path = layout.retrieved(model, "unlearn", f"{model}-00")
    write_table(path, read_table(path), {})
    retrieve(layout, model, "cpu")
    retrieve(layout, model, "cpu")
    assert asked_for == [("unlearn", f"{model}-00")]
    asked_for.clear()
    other = {"unlearn": {"step_size": 2e-4, "steps": 2, "draws": 8, "weights": "cross-attn-kv"}}
    retrieve(customised_layout(monkeypatch, score={"methods": METHODS}, unlearn=other), model, "cpu")
    assert asked_for == [("unlearn", f"{model}-00"), ("unlearn", f"{model}-01")]


def test_an_ensemble_is_of_its_members_new_scores_wherever_it_stands(layout, monkeypatch):
    both = {"both": {"attributor": "ensemble", "methods": ["unlearn", "pixel"]}}
    methods = both | {name: METHODS[name] for name in ("unlearn", "pixel")}
    model, query = style(layout), f"{style(layout)}-01"
    for step_size in (1e-4, 1e-3):
        variant = {"unlearn": {"step_size": step_size, "steps": 2, "draws": 8, "weights": "cross-attn-kv"}}
        layout = customised_layout(monkeypatch, score={"methods": methods}, unlearn=variant)
        retrieve(layout, model, "cpu")
        scores = {
            name: read_table(layout.retrieved(model, name, query)).set_index("image_id")["score"] for name in methods
        }
        expected = sum((own - own.mean()) / own.std(ddof=0) for own in (scores["unlearn"], scores["pixel"]))
        np.testing.assert_allclose(scores["both"][expected.index], expected, rtol=1e-9)


def test_exemplars_are_found_beside_images_of_ones_own(layout):
    Path("far/away/photos").mkdir(parents=True)
    Path("photos").symlink_to(Path("far/away/photos").absolute())
    for path in ("photos", str(Path("far/away/photos").absolute())):
        prepare = layout.config.prepare.model_copy(update={"dataset": "folder", "path": path})
        own = replace(layout, config=layout.config.model_copy(update={"prepare": prepare}))
        (file,) = exemplar_files(own, style(layout), 1)
        found = Path(images_folder(own), file)
        assert found.samefile(layout.customized_image(style(layout), "exemplar-00"))


@pytest.mark.parametrize("changed", ["code", "Fisher information"])
def test_leftovers_of_other_code_or_fisher_information_are_thrown_away(layout, monkeypatch, changed):
    own = candidates(layout, style(layout), ["pixel"])
    stale = Path(own.root, "unlearn/unlearn/leftover.safetensors")
    stale.parent.mkdir(parents=True)
    stale.touch()
    if changed == "code":
        versions = {"unlearn": 99}
        monkeypatch.setattr("forgetrace.attribution.candidates.stage_versions", lambda *stages: versions)
    else:
        Path(layout.fisher).write_bytes(b"another fit")
    candidates(layout, style(layout), ["pixel"])
    assert not stale.exists()


def test_leftovers_of_another_config_are_thrown_away(layout):
    own = candidates(layout, style(layout), ["pixel"])
    stale = Path(own.root, "scan/base.npz")
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.touch()
    candidates(layout, style(layout), ["pixel"])
    assert stale.exists()
    candidates(layout, style(layout), ["pixel", "random"])
    assert not stale.exists()
    discard(own)
    assert not Path(own.root).exists()


def test_features_of_an_image_encoder_are_computed_for_exemplars_alone(layout, monkeypatch):
    from forgetrace.attribution.image_features import EncodedImages
    from forgetrace.encoding.image_encoder import ImageEncoder

    seen = []

    def prepare(images):
        seen.append(len(images))
        return images.reshape(len(images), -1)[:, :12].astype(np.float32)

    monkeypatch.setattr(
        "forgetrace.encoding.images.SHIPPED", {"efficientnet-lite0": lambda d: ImageEncoder(prepare, lambda x: x, {})}
    )
    methods = {"efficientnet": {}}
    layout = customised_layout(monkeypatch, score={"methods": methods})
    EncodedImages(layout, "efficientnet-lite0").fit()
    seen.clear()
    base = sha256_of(layout.features(EncodedImages(layout, "efficientnet-lite0").name))
    own = candidates(layout, style(layout), ["efficientnet"])
    assert sum(seen) == 3
    scores = attributor(own, "efficientnet").scores(own.config.queries()[0])
    assert scores.shape == (43,)
    assert base == sha256_of(layout.features(EncodedImages(layout, "efficientnet-lite0").name))


def test_every_file_that_is_kept_is_known_to_tidy(layout):
    retrieve(layout, style(layout), "cpu")
    written = {path.as_posix() for stage in ("customize", "retrieve") for path in Path(layout.root, stage).rglob("*.*")}
    assert written
    assert written <= customised_files(layout)


def test_a_step_size_is_tried_on_images_of_validation_models(tiny, monkeypatch):
    monkeypatch.setattr("forgetrace.unlearning.sweep.largest_within", lambda rise, share, start: rise(start) and start)
    layout = customised_layout(monkeypatch, score={"methods": METHODS})
    models = names(layout.config.customize, layout.config.seed)["validation"]
    for model in models:
        customize(layout, model, "cpu")
    subjects = validation_subjects(layout, len(models) + 1)
    assert {subject.layout.concept for subject in subjects} == set(models)
    assert len({(subject.layout.concept, subject.query.name) for subject in subjects}) == len(subjects)
    _, tried = sweep(layout, "unlearn", subjects, share=0.01, device="cpu")
    for subject, (_, row) in zip(subjects, tried.iterrows(), strict=True):
        unlearn_query(subject.layout, "unlearn", subject.query.name, "cpu")
        losses = read_json(subject.layout.unlearned("unlearn", subject.query.name)["losses"])
        assert row["query"] == subject.query.name
        for when in ("before", "after"):
            assert row[f"query_{when}"] == pytest.approx(losses[when]["query"], rel=1e-6)
            assert row[f"others_{when}"] == pytest.approx(losses[when]["others"], rel=1e-6)


def test_more_images_than_validation_models_make_is_an_error(tiny, monkeypatch):
    layout = customised_layout(monkeypatch, score={"methods": METHODS})
    with pytest.raises(UserError, match=r"^--queries 99: validation models make \d+ images; lower it"):
        validation_subjects(layout, 99)
