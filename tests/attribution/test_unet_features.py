from pathlib import Path

import numpy as np
import pytest

from forgetrace.artifacts import UserError, read_array, read_arrays, read_json, read_table, write_arrays, write_json
from forgetrace.attribution.registry import all_features, attributor, check_methods
from forgetrace.attribution.score import score
from forgetrace.attribution.unet_features import UNetFeatures
from forgetrace.encoding.store import load_encoded
from forgetrace.layout import Layout

from ..conftest import IMAGES, settings


def experiment(**methods: dict) -> Layout:
    return Layout("tiny", settings(score={"methods": methods or {"unet-features": {}}}, retrain={"methods": []}))


def fit(layout):
    for features in all_features(layout, "cpu").values():
        features.fit()


def test_the_distance_by_hand():
    # Means (1, 2) and deviations (3, 4) against (1, 5) and (3, 0): sqrt(9 + 16).
    rows = np.array([[1.0, 2.0, 3.0, 4.0], [1.0, 5.0, 3.0, 0.0]])
    np.testing.assert_array_equal(UNetFeatures.similarity(rows, np.array([1.0, 5.0, 3.0, 0.0])), [-5, 0])


def test_a_training_image_as_query_ranks_first_at_distance_zero(tiny):
    layout = experiment()
    fit(layout)
    (name,) = all_features(layout)
    assert name == "unet-t2-noises4"  # timestep 25 of 1000 is 2 of 100
    features = read_array(layout.features(name))
    assert features.shape == (IMAGES, 2 * 16)
    assert features.dtype == np.float32
    latent = load_encoded(layout).latents[17]
    path = layout.query("report-00")["tensors"]
    write_arrays(path, read_arrays(path) | {"latent": np.array(latent)}, {})
    score(layout, "unet-features", device="cpu")
    table = read_table(layout.score("unet-features", "report-00"))
    assert table["image_id"][0] == "tiny-17"
    assert table["score"][0] == pytest.approx(0, abs=1e-5)
    assert table["score"][1] < -1e-3
    # Of two training images, the distance is that of their kept rows.
    row = table.set_index("image_id")["score"]["tiny-03"]
    assert row == pytest.approx(-np.linalg.norm(features[3].astype(float) - features[17]), rel=1e-4)


def test_scores_of_a_users_query_do_not_depend_on_the_others(tiny):
    layout = experiment()
    fit(layout)
    source = attributor(layout, "unet-features", "cpu")
    together = source.scores_of(["report-00", "mine"])
    np.testing.assert_allclose(together["mine"], source.scores("mine"), atol=1e-5)
    assert not np.allclose(together["mine"], together["report-00"])


def test_every_setting_has_features_of_its_own(tiny):
    methods = {
        "a": {"attributor": "unet-features"},
        "b": {"attributor": "unet-features", "timestep": 0},
        "c": {"attributor": "unet-features", "noises": 2},
        "d": {"attributor": "unet-features", "timestep": 2, "noises": 4},
    }
    layout = experiment(**methods)
    check_methods(layout.config)
    assert set(all_features(layout)) == {"unet-t2-noises4", "unet-t0-noises4", "unet-t2-noises2"}
    fit(layout)
    kept = [read_array(layout.features(name)) for name in all_features(layout)]
    assert not np.allclose(kept[0], kept[1])
    assert not np.allclose(kept[0], kept[2])


def test_features_of_another_model_are_not_compared(tiny):
    layout = experiment()
    fit(layout)
    assert set(read_json(layout.features_record("unet-t2-noises4"))["config"]) == {
        "timestep",
        "noises",
        "seed",
        "versions",
    }
    assert all(Path(path).is_file() for path in attributor(layout, "unet-features").inputs("mine"))
    write_json(layout.scheduler, read_json(layout.scheduler) | {"beta_schedule": "linear"})
    with pytest.raises(UserError, match="other data, weights or settings"):
        score(layout, "unet-features", "mine", "cpu")


def test_a_timestep_beyond_the_schedule_is_refused():
    with pytest.raises(UserError, match=r"score.methods.u.timestep: 100 is not less than train.timesteps = 100"):
        check_methods(experiment(u={"attributor": "unet-features", "timestep": 100}).config)
    check_methods(experiment(u={"attributor": "unet-features", "timestep": 99}).config)


def test_published_token_states_without_the_empty_caption_are_refused():
    given = {"encode": {"given": "published", "flips": True}, "prepare": {"tuning_captions": 0, "report_captions": 0}}
    given |= {
        "synthesize": {"queries": [{"given": "published", "count": 1}], "guidance": 1},
        "retrain": {"methods": []},
    }
    given |= {"train": {"caption_dropout": 0}, "score": {"methods": {"unet-features": {}}}}
    with pytest.raises(UserError, match=r"score.methods.unet-features asks θ0 with the empty caption, .* encode.given"):
        check_methods(settings(**given))
