"""From published artifacts to scores and their comparison with published ones."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from forgetrace.artifacts import (
    UserError,
    read_array,
    read_arrays,
    read_image,
    read_json,
    read_table,
    read_tensors,
    sha256_of,
    write_image,
)
from forgetrace.attribution.scan import scan
from forgetrace.attribution.score import score
from forgetrace.cli import app
from forgetrace.config import Config, parse_config
from forgetrace.curvature.fit import fit
from forgetrace.datasets.prepare import prepare
from forgetrace.diffusion.base import train_base
from forgetrace.diffusion.synthesis import synthesize
from forgetrace.encoding.check import check_data
from forgetrace.encoding.encode import encode
from forgetrace.encoding.given import query_files, query_image
from forgetrace.encoding.store import load_encoded
from forgetrace.evaluation.tables import evaluate
from forgetrace.figures.catalogue import draw, names
from forgetrace.layout import Layout
from forgetrace.planning.estimate import plan
from forgetrace.release.compare import compare
from forgetrace.unlearning.variants import unlearn_query

from .conftest import imported
from .published import CAPTIONS, IMAGES, QUERIES, captions_of, fisher, states_of, write_influence

CPU = "cpu"
QUICK = {"scan": {"timesteps": 2, "batch_size": 500}}


def quick(source: Path, **changes) -> Layout:
    """A release's experiment with few draws, its data prepared and encoded."""
    step = {"weights": "cross-attn-kv", "step_size": 0.01, "damping": 0.1, "draws": 64}
    step["curvature"] = "diagonal" if source.name == "mscoco" else "ekfac"
    layout = imported(source, **{**QUICK, "unlearn": {"unlearn": step}, **changes})
    check_data(layout)
    prepare(layout.config.prepare, layout.data)
    encode(layout)
    check_data(layout)
    return layout


@pytest.fixture(autouse=True)
def few_checks(monkeypatch):
    monkeypatch.setattr("forgetrace.unlearning.step.query_loss.__defaults__", (20,))


def changed(layout: Layout, **sections: dict) -> Config:
    content = layout.config.model_dump(mode="json", exclude_unset=True)
    return parse_config(
        {**content, **{name: content.get(name, {}) | keys for name, keys in sections.items()}}, "c.yaml"
    )


def test_from_abus_artifacts_to_scores_and_their_comparison(abu):
    layout = quick(abu)
    encoded = load_encoded(layout)
    assert (len(encoded), encoded.orientations) == (IMAGES, 2)
    assert Path(layout.latents).is_symlink()
    for image in (0, 40, IMAGES - 1):
        np.testing.assert_array_equal(encoded.latents[image], np.load(abu / "coco17_train_latents.npy")[image])
        for number, caption in enumerate(captions_of(image)[:CAPTIONS]):
            (row,) = encoded.caption(np.array([image]), number)
            np.testing.assert_array_equal(encoded.captions[row], states_of(caption).astype(np.float16))
    assert torch.isnan(encoded.captions[encoded.empty_row]).all()
    train_base(layout, CPU)
    fit(layout, "diagonal", CPU)
    kept = read_tensors(layout.fisher)
    assert all(torch.equal(kept[name], value) for name, value in fisher().items())
    assert read_json(layout.fisher_report)["draws"] == 5 * 2 * IMAGES
    scan(layout, device=CPU)
    for query in layout.config.queries():
        synthesize(layout, query, CPU)
        unlearn_query(layout, "unlearn", query, CPU)
        scan(layout, "unlearn", query, CPU)
        score(layout, "unlearn", query)
    record, arrays = read_json(layout.query("sample-001")["record"]), read_arrays(layout.query("sample-001")["tensors"])
    assert (record["prompt"], record["source"], record["number"]) == ("prompt 1", "release", 1)
    assert arrays.keys() == {"latent", "prompt"}
    np.testing.assert_array_equal(arrays["prompt"], states_of("prompt 1"))
    np.testing.assert_array_equal(read_image(layout.query("sample-001")["image"]), read_image(abu / "sample/1.png"))
    losses = read_json(layout.unlearned("unlearn", "sample-000")["losses"])
    assert losses["after"]["query"] > losses["before"]["query"]
    assert all(np.isfinite(list(part.values())).all() for part in (losses["before"], losses["after"]))
    evaluate(layout)
    assert names(layout) == ["attribution-sample-000", "attribution-sample-001"]
    draw(layout, "attribution-sample-000")
    own = {query: scores_of(layout, query) for query in layout.config.queries()}
    for number, query in enumerate(layout.config.queries()):
        write_influence(Path(f"results-of-abu/influence_{number}.pkl"), own[query] + 1e-3 * number)
    command = ["compare-release", "--config", "config/published.yaml", "--influence", "results-of-abu"]
    done = CliRunner().invoke(app, [*command, "--table", "compared.csv"])
    assert done.exit_code == 0, done.output
    assert "mean of 2 queries" in done.output
    compared = pd.read_csv("compared.csv")
    assert compared["query"].tolist() == ["sample-000", "sample-001"]
    np.testing.assert_allclose(compared["spearman"], 1)
    np.testing.assert_allclose(compared["overlap_50"], 1)
    assert compared["overlap_200"].isna().all()
    np.testing.assert_allclose(compared["largest_difference"], [0, 1e-3], atol=1e-12, rtol=1e-4)


def scores_of(layout: Layout, query: str) -> np.ndarray:
    """In the order of the training images."""
    table = read_table(layout.score("unlearn", query)).set_index("image_id")
    return table.loc[read_table(layout.index)["image_id"], "score"].to_numpy()


def test_fastgdas_factors_unlearn_and_its_scores_of_some_images_are_compared(fastgda):
    layout = quick(fastgda)
    train_base(layout, CPU)
    fit(layout, "ekfac", CPU)
    assert read_json(layout.ekfac_report)["draws"] == 40
    scan(layout, device=CPU)
    query = "train-001"
    synthesize(layout, query, CPU)
    unlearn_query(layout, "unlearn", query, CPU)
    scan(layout, "unlearn", query, CPU)
    score(layout, "unlearn", query)
    own = scores_of(layout, query)
    images = np.stack([np.random.default_rng(i).permutation(IMAGES)[:60] for i in range(QUERIES)])
    subset = own[images]
    places = np.argsort(-subset, axis=1)
    content = {
        "influence_subset": subset,
        "rank_influence_subset": places,
        "rank": np.take_along_axis(images, places, axis=1),
    }
    Path("influence_train.pkl").write_bytes(pickle.dumps({"random": content}))
    (row,) = compare(layout, Path("influence_train.pkl"), "unlearn").to_dict("records")
    assert (row["query"], row["images"], row["overlap_50"]) == (query, 60, 1)
    assert row["spearman"] == pytest.approx(1)
    assert np.isnan(row["largest_difference"])
    full = np.stack([np.zeros(IMAGES), -own])
    ranked = {"influence": full, "rank": np.argsort(-full, axis=1)}
    Path("influence_test.pkl").write_bytes(pickle.dumps({"random": ranked}))
    with pytest.raises(UserError, match=r"unlearn has scored none of the queries in influence_test.pkl: run"):
        compare(layout, Path("influence_test.pkl"), "unlearn")
    Path(layout.score("unlearn", "test-001")).parent.mkdir(parents=True, exist_ok=True)
    Path(layout.score("unlearn", "test-001")).write_bytes(Path(layout.score("unlearn", query)).read_bytes())
    (row,) = compare(layout, Path("influence_test.pkl"), "unlearn").to_dict("records")
    assert row["spearman"] == pytest.approx(-1)
    assert row["overlap_50"] == pytest.approx((2 * 50 - IMAGES) / 50)


def test_given_data_of_other_images_or_captions_are_refused(abu):
    layout = quick(abu)
    manifest = Path("given/encoded/manifest.json")
    content = manifest.read_text()
    manifest.write_text(content.replace('"images": 83', '"images": 84'))
    with pytest.raises(UserError, match=r"encode.given: given holds 84 images, the dataset has 83"):
        check_data(layout)
    with pytest.raises(UserError, match=r"holds 84 images with .* prepared were 83 with"):
        encode(layout)
    manifest.write_text(content)
    lines = Path(layout.metadata).read_text().splitlines(keepends=True)
    Path(layout.metadata).write_text("".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(UserError, match=r"as many images and captions, but in another order or with other words"):
        encode(layout)
    Path(layout.metadata).write_text("".join(lines))
    np.save("given/encoded/latents.npy", np.zeros((IMAGES, 4, 4, 4), dtype=np.float32))
    with pytest.raises(UserError, match=r"latents.npy has 83 rows, not 166: delete it"):
        encode(layout)
    latents = read_array("mscoco/coco17_train_latents.npy")
    np.save("given/encoded/latents.npy", np.where(np.arange(len(latents)) == 7, 0, latents.T).T)
    with pytest.raises(UserError, match=r"latents.npy has changed since it was made: delete it"):
        encode(layout)
    manifest.write_text("[]")
    with pytest.raises(
        UserError, match=r"manifest.json is damaged; delete it and run `forgetrace import-release` again"
    ):
        check_data(layout)
    manifest.unlink()
    with pytest.raises(UserError, match=r"encode.given: given/encoded/manifest.json is missing; name a folder that"):
        check_data(layout)


def test_a_pipeline_gives_the_empty_captions_state(abu, monkeypatch):
    layout = quick(abu)
    encoders = {"pipeline": "sd", "image_encoder": "autoencoder-kl", "text_encoder": "clip"}
    layout = replace(layout, config=changed(layout, encode=encoders))
    without, source = read_array(layout.captions), read_json(layout.encode_manifest)["source"]
    asked = []

    def states(settings, captions, tokens, device) -> np.ndarray:
        asked.append((settings.pipeline, captions, tokens))
        return np.full((1, tokens, without.shape[2]), 0.5, dtype=np.float32)

    monkeypatch.setattr("forgetrace.encoding.captions.caption_states", states)
    monkeypatch.setattr("forgetrace.encoding.encode.text_source", lambda _: "its weights")
    encode(layout)
    assert asked == [("sd", [""], without.shape[1])]
    found = read_array(layout.captions)
    assert read_json(layout.encode_manifest)["source"] != source
    np.testing.assert_array_equal(found[:-1], without[:-1])
    assert (found[-1] == 0.5).all()
    assert np.isnan(read_array("given/encoded/captions.npy")[-1]).all()
    monkeypatch.setattr("forgetrace.encoding.captions.caption_states", lambda *_: np.zeros((1, 7, 7), dtype=np.float32))
    with pytest.raises(UserError, match=r"encode.pipeline: its text encoder gives states of \(7, 7\)"):
        encode(layout)


def test_what_is_given_must_be_there_and_fit(abu):
    layout = quick(abu)
    train_base(layout, CPU)
    more = replace(layout, config=changed(layout, synthesize={"queries": [{"given": "given", "count": 3}]}))
    with pytest.raises(UserError, match=r"synthesize.queries: given has 2 queries 'sample', not 3"):
        check_data(more)
    with pytest.raises(UserError, match=r"synthesize.queries: given has 2 queries 'sample'; lower its count"):
        synthesize(more, "sample-002", CPU)
    other = replace(
        layout, config=changed(layout, synthesize={"queries": [{"given": "given", "count": 1, "name": "x"}]})
    )
    with pytest.raises(UserError, match=r"synthesize.queries \(x\): given/queries/x/latents.npy is missing"):
        check_data(other)
    ekfac = replace(layout, config=changed(layout, unlearn={"unlearn": {"curvature": "ekfac", "step_size": 1}}))
    with pytest.raises(UserError, match=r"fit.given: given/fit/ekfac.safetensors is missing, the release has no curv"):
        check_data(ekfac)
    with pytest.raises(UserError, match=r"fit.given: given/fit/ekfac.safetensors is missing"):
        fit(ekfac, "ekfac", CPU)
    methods = {"influence": {"attributor": "influence", "curvature": "ekfac"}}
    inverse = replace(layout, config=changed(layout, score={"methods": methods}))
    with pytest.raises(UserError, match=r"fit.given: given/fit/ekfac.safetensors is missing"):
        check_data(inverse)
    synthesize(layout, "sample-001", CPU)
    made_by = read_json(layout.query("sample-001")["record"])["made_by"]["inputs"]
    files = query_files("given", "sample") | {"image": query_image("given", "sample", 1)}
    assert made_by == {role: sha256_of(path) for role, path in ({"weights": layout.weights} | files).items()}
    write_image(files["image"], np.zeros((8, 8, 3), dtype=np.uint8))
    with pytest.raises(UserError, match=r"sample-001 in given has 8 pixels a side, .* set prepare.size: 8"):
        synthesize(layout, "sample-001", CPU)
    np.save("given/queries/sample/latents.npy", np.zeros((2, 4, 8, 8), dtype=np.float32))
    with pytest.raises(UserError, match=r"the latent of sample-000 in given has shape \(4, 8, 8\), those of the train"):
        synthesize(layout, "sample-000", CPU)
    with pytest.raises(UserError, match=r"forgetrace plan times the encoders, none of which runs with encode.given"):
        plan(layout, 1, CPU)


def test_a_fisher_information_serves_the_weights_it_has(abu):
    kept = {name: value for name, value in fisher().items() if "attn2" in name}
    torch.save(kept, abu / "fisher_info.pt")
    layout = quick(abu)
    train_base(layout, CPU)
    fit(layout, "diagonal", CPU)
    synthesize(layout, "sample-000", CPU)
    unlearn_query(layout, "unlearn", "sample-000", CPU)
    every = replace(layout, config=changed(layout, unlearn={"unlearn": {"step_size": 1, "draws": 4}}))
    with pytest.raises(
        UserError, match=r"\(fit.given\) says nothing of the weights conv_in.weight: choose weights that"
    ):
        unlearn_query(every, "unlearn", "sample-000", CPU)
    from safetensors.torch import save_file

    save_file({"conv_in.weight": torch.zeros(3)}, "given/fit/fisher.safetensors", {"provenance": '{"draws": 1}'})
    with pytest.raises(UserError, match=r"holds 'conv_in.weight' of shape \(3,\), which is none of the model"):
        fit(layout, "diagonal", CPU)


GIVEN = {
    "prepare": {"dataset": "coco", "path": "p", "tuning_captions": 0, "report_captions": 0},
    "encode": {"given": "given", "flips": True},
    "train": {"pretrained": "given"},
    "synthesize": {"queries": [{"given": "given", "count": 2}]},
    "score": {"methods": {"text": {}}},
}
PIPELINE = {"pipeline": "sd", "image_encoder": "autoencoder-kl", "text_encoder": "clip"}
REFUSED = {
    "guidance": ({"synthesize": {"guidance": 2}}, "synthesize.guidance: the state of the empty caption is not in"),
    "other images": ({"evaluate": {"others": 3}}, "evaluate.others: nothing can be generated, the state of the empty"),
    "own images": (
        {"synthesize": {"queries": [{"name": "mine", "image": "a", "prompt": "b"}]}},
        "synthesize.queries: the image 'mine' cannot be encoded with encode.given alone, or name the Stable",
    ),
    "training with dropped captions": ({"train": {"pretrained": None}}, "train.caption_dropout: the state of the emp"),
    "captions held out": ({"prepare": {"report_captions": 1}}, "encode.given: all images are in it, none can be held"),
    "no mirror images": ({"encode": {"flips": False}}, "given holds mirror images too: set flips: true"),
    "an encoder": ({"encode": {"text_encoder": "minilm"}}, "text_encoder has no effect with given: remove it"),
    "some images": ({"encode": {"max_images": 3}}, "max_images has no effect with given: remove it"),
    "another precision": ({"encode": {"caption_dtype": "float16"}}, "caption_dtype has no effect with given: remove"),
    "half a pipeline": (
        {"encode": {**PIPELINE, "text_encoder": "minilm"}},
        "given with a pipeline needs image_encoder autoencoder-kl and text_encoder clip",
    ),
    "draws of a given Fisher information": ({"fit": {"given": "given", "draws": 3}}, "draws has no effect with given"),
    "published noise in a narrowed scan": (
        {"encode": {}, "scan": {"noise": "release", "narrowing": {}}},
        "noise release is that of evenly spaced timesteps: not with narrowing",
    ),
}


def config_of(changes: dict) -> Config:
    sections = {**GIVEN, **{name: GIVEN.get(name, {}) | keys for name, keys in changes.items()}}
    return parse_config(sections, "config/given.yaml")


@pytest.mark.parametrize("refused", REFUSED)
def test_what_published_data_cannot_serve_is_refused_by_the_config(refused):
    changes, sentence = REFUSED[refused]
    with pytest.raises(UserError, match=sentence):
        config_of(changes)


def test_what_they_can_serve_is_not():
    config = config_of({})
    assert (config.queries(), config.forgotten_queries(), config.judged_queries()) == (
        ["sample-000", "sample-001"],
        [],
        [],
    )
    assert (config.origin("sample-000"), config.generates("sample-000")) == ("own", False)
    entry, number = config.given_query("sample-001")
    assert (entry.given, number) == ("given", 1)
    assert config.given_query("sample-002") is None
    trained = config_of({"train": {"pretrained": None, "caption_dropout": 0}})
    assert trained.judged_queries() == trained.queries()
    config_of({"encode": PIPELINE, "synthesize": {"queries": [{"name": "mine", "image": "a", "prompt": "b"}]}})
