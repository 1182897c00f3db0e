"""The experiment on COCO in miniature: its files, its encoders and its network, small and with invented weights."""

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from forgetrace.artifacts import read_array, read_json, read_table
from forgetrace.figures.catalogue import names

from ..datasets.pictures import write_coco
from ..pipelines import TOKENS, WIDTH, save_pipeline
from .conftest import Checkout, layout_of

IMAGES, PER_IMAGE, K = 48, 5, 4
COLOURS = ("red", "green", "blue", "grey")
CONFIG = "config/miniature.yaml"
SETTINGS = {
    "prepare": {"dataset": "coco", "path": "coco", "size": 32, "tuning_captions": 2, "report_captions": 4},
    "encode": {
        "image_encoder": "autoencoder-kl",
        "text_encoder": "clip",
        "pipeline": "sd",
        "flips": True,
        "caption_dtype": "float16",
    },
    "train": {
        "channels": [8, 8, 8, 8],
        "cross_attention": [True, True, True, False],
        "layers_per_block": 2,
        "norm_groups": 4,
        "prediction": "epsilon",
        "schedule": "linear",
        "steps": 12,
        "warmup_steps": 2,
        "batch_size": 8,
        "snapshots": 2,
        "checkpoint_every": 6,
    },
    "synthesize": {"queries": [{"pool": "report", "count": 1}], "sampler_steps": 3, "guidance": 3.0},
    "fit": {"draws": 64},
    "unlearn": {
        "unlearn": {"weights": "cross-attn-kv", "step_size": 1e-5, "draws": 32},
        "unlearn-ekfac": {"curvature": "ekfac", "weights": "cross-attn-kv", "step_size": 1e-5, "draws": 32},
    },
    "scan": {"timesteps": 4, "shards": 2},
    "score": {
        "methods": {
            "unlearn": {"attributor": "unlearning"},
            "unlearn-ekfac": {"attributor": "unlearning", "flips": "mean"},
            "influence": {"timesteps": 2},
            "d-trak": {"timesteps": 2, "noises": 2, "dimension": 32},
            "both": {"attributor": "ensemble", "methods": ["influence", "d-trak"]},
            "unet-features": {},
            "pixel": {},
            "text": {},
            "random": {},
        }
    },
    "retrain": {"methods": ["unlearn", "both"], "k": [K], "random_draws": 1, "seeds": 1},
    "evaluate": {"timestep_stride": 100, "draws": 1, "bootstrap": 100, "others": 2},
    "figures": {"top": 4},
}


@pytest.fixture(scope="module")
def miniature(tmp_path_factory) -> Checkout:
    """A checkout in which the experiment has run from annotations and photographs to figures."""
    pytest.importorskip("pycocotools", reason="an extra: pip install pycocotools")
    checkout = Checkout.create(tmp_path_factory.mktemp("miniature") / "a clone")
    captions = {
        number: [f"a {COLOURS[number % 4]} thing {view} of {number // 4}" for view in range(PER_IMAGE)]
        for number in range(1, IMAGES + 1)
    }
    write_coco(checkout.folder / "coco", captions)
    save_pipeline(checkout.folder / "sd")
    (checkout.folder / CONFIG).write_text(yaml.safe_dump(SETTINGS))
    checkout("snakemake", "--cores", "2", "--configfile", CONFIG)
    return checkout


@pytest.fixture
def layout(miniature, monkeypatch):
    monkeypatch.chdir(miniature.folder)
    return layout_of(miniature, "miniature")


def test_every_stage_ends_and_there_is_nothing_left_to_do(miniature):
    assert miniature.planned("--configfile", CONFIG) == {}


def test_what_is_encoded_is_what_the_published_experiment_keeps(layout):
    index = read_table(layout.index)
    assert len(index) < IMAGES  # images that carry a held-out caption are not trained on
    assert all(len(rows) == PER_IMAGE for rows in index["caption_rows"])
    assert read_array(layout.latents).shape == (2 * len(index), 4, 8, 8)
    captions = read_array(layout.captions)
    assert (captions.dtype, captions.shape[1:]) == (np.float16, (TOKENS, WIDTH))
    assert read_json(layout.encode_manifest)["image_shape"] == [32, 32, 3]


def test_every_method_ranks_all_training_images(layout):
    images = sorted(read_table(layout.index)["image_id"])
    for method in layout.config.score.methods:
        for query in layout.config.queries():
            table = read_table(layout.score(method, query))
            assert sorted(table["image_id"]) == images
            assert table["score"].nunique() > 1


def test_the_tables_hold_every_judged_method_and_the_figures_are_pictures(layout):
    found = pd.read_csv(f"{layout.root}/evaluate/counterfactual.csv")
    assert set(found["method"]) >= {"unlearn", "both", "random"}
    assert np.isfinite(found["mean"]).all()
    assert set(pd.read_csv(f"{layout.root}/evaluate/unlearning.csv")["variant"]) == {"unlearn", "unlearn-ekfac"}
    for name in names(layout):
        with Image.open(layout.figure(name, "png")) as picture:
            assert min(picture.size) > 100
