"""A tiny experiment that has run through every stage up to the scores, for tests of single stages.

Forty pictures of 16x16 pixels, six captions with invented token states, a UNet of 8 and 16 channels
trained for eight steps: every file is real, nothing in it means anything.
"""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from forgetrace.config import Config, parse_config
from forgetrace.layout import Layout

# How long an example takes says how busy the machine is, not whether it is right.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

IMAGES, TOKENS, WIDTH, CAPTIONS = 40, 5, 16, 6
HELD_OUT = {"tuning": ["tuning prompt one", "tuning prompt two"], "report": ["report prompt one", "report prompt two"]}
SETTINGS = {
    "seed": 5,
    "train": {
        "channels": [8, 16],
        "norm_groups": 4,
        "timesteps": 100,
        "steps": 8,
        "warmup_steps": 2,
        "batch_size": 8,
        "snapshots": 2,
        "checkpoint_every": 3,
        "ema_decay": 0.5,
        "precision": "fp32",
    },
    "synthesize": {
        "queries": [{"pool": "report", "count": 2}, {"name": "mine", "image": "mine.png", "prompt": "my own"}],
        "sampler_steps": 3,
    },
    "fit": {"draws": 60, "chunk": 7},
    "unlearn": {
        "unlearn": {"step_size": 1e-4, "draws": 32},
        "unlearn-sgd": {"curvature": "none", "weights": "attn", "step_size": 1e-2, "draws": 32},
    },
    "scan": {"timesteps": 4, "batch_size": 64},
    "score": {
        "methods": {
            "unlearn": {"attributor": "unlearning"},
            "skewed": {"attributor": "unlearning", "variant": "unlearn", "score": "skew"},
            "pixel": {},
            "pixel-l2": {},
            "text": {},
            "random": {},
        }
    },
    "retrain": {"methods": ["unlearn"], "k": [10], "random_draws": 2, "seeds": 1},
    "evaluate": {"timestep_stride": 20, "draws": 2, "bootstrap": 100},
}


def settings(**sections: dict) -> Config:
    """The tiny experiment's config, with some keys of some sections replaced."""
    merged = {**SETTINGS, **{name: {**SETTINGS.get(name, {}), **keys} for name, keys in sections.items()}}
    return parse_config(merged, "config/tiny.yaml")


def fake_token_states(captions: list[str], tokens: int | None = None) -> np.ndarray:
    """Invented token states, a function of each caption alone; padded with zeros behind its words."""
    from forgetrace.randomness import generator

    states = np.zeros((len(captions), tokens or TOKENS, WIDTH), dtype=np.float32)
    for row, caption in enumerate(captions):
        words = len(caption.split()) + 1
        states[row, :words] = generator(0, caption).standard_normal((words, WIDTH), dtype=np.float32)
    return states


def write_data(layout: Layout) -> None:
    """The dataset as ``prepare`` leaves it, here of pictures that follow their caption."""
    import json

    from forgetrace.artifacts import write_image, write_json

    random = np.random.default_rng(0)
    tints = random.integers(0, 256, size=(CAPTIONS, 3))
    rows = []
    for i in range(IMAGES):
        noise = random.integers(-60, 60, size=(16, 16, 3))
        pixels = np.clip(tints[i % CAPTIONS] + noise, 0, 255).astype(np.uint8)
        name = f"images/tiny-{i:02d}.png"
        write_image(f"{layout.data}/{name}", pixels)
        rows.append({"id": f"tiny-{i:02d}", "file_name": name, "text": f"caption {i % CAPTIONS}", "split": "train"})
    Path(layout.metadata).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_json(layout.data_manifest, {"image_shape": [16, 16, 3], "pools": HELD_OUT})


def _build(layout: Layout) -> None:
    from forgetrace.artifacts import write_image
    from forgetrace.attribution.scan import scan
    from forgetrace.attribution.score import score
    from forgetrace.curvature.fit import fit
    from forgetrace.diffusion.base import train_base
    from forgetrace.diffusion.synthesis import synthesize
    from forgetrace.encoding.encode import encode
    from forgetrace.unlearning.variants import unlearn_query

    write_data(layout)
    encode(layout)
    train_base(layout, "cpu")
    write_image("mine.png", np.random.default_rng(1).integers(0, 256, size=(20, 24, 3), dtype=np.uint8))
    for query in layout.config.queries():
        synthesize(layout, query, "cpu")
    fit(layout, "diagonal", "cpu")
    scan(layout, device="cpu")
    for query in ("report-00", "mine"):
        unlearn_query(layout, "unlearn", query, "cpu")
        scan(layout, "unlearn", query, "cpu")
        score(layout, "unlearn", query)


def _make_quick(patch: pytest.MonkeyPatch) -> None:
    """Invented token states, and losses checked on 100 draws instead of 1,000."""
    patch.setattr("forgetrace.encoding.text.token_states", fake_token_states)
    patch.setattr("forgetrace.unlearning.step.query_loss.__defaults__", (100,))


# Whole workflows: what takes longest comes first, so that no process of pytest-xdist is left alone with it.
LONGEST = ("test_smoke_run.py", "test_miniature.py", "test_customized.py", "test_slurm.py", "test_regions.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files; the tests of a file keep theirs."""

    def place(item: pytest.Item) -> int:
        known = item.path.parent.name == "workflow" and item.path.name in LONGEST
        return LONGEST.index(item.path.name) if known else len(LONGEST)

    items.sort(key=place)


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """The tiny experiment's files, made once; not to be changed."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        _make_quick(patch)
        _build(Layout("tiny", settings()))
    return folder


@pytest.fixture
def tiny(built, tmp_path, monkeypatch) -> Layout:
    """The tiny experiment; a copy of its files is in the current folder."""
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    _make_quick(monkeypatch)
    return Layout("tiny", settings())


@pytest.fixture
def regions(tiny) -> Layout:
    """The tiny experiment with two regions of report-00, of 5x7 pixels and of all."""
    from forgetrace.diffusion.synthesis import synthesize

    found = {"part": {"boxes": [[0, 2, 5, 9]]}, "all": {"boxes": [[0, 0, 16, 16]]}}
    methods = SETTINGS["score"]["methods"]
    methods = {**methods, "trak": {"timesteps": 2, "noises": 2, "dimension": 32}, "efficientnet": {}}
    layout = Layout("tiny", settings(synthesize={"regions": found}, score={"methods": methods}))
    for name in found:
        synthesize(layout, f"report-00-{name}", "cpu")
    return layout


@pytest.fixture(autouse=True)
def own_processor_state() -> None:
    """One thread, because tests run beside other work; denormal numbers, which a training switches off."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
        torch.set_flush_denormal(False)


def in_child(action: Callable[[], None]) -> int:
    """Run an action in a forked process; its exit status as ``os.waitpid`` gives it (9: killed)."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]
