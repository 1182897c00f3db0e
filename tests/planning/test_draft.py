"""``forgetrace init``: the config it writes works as it is, and it overwrites nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetrace.artifacts import UserError, read_json, read_table
from forgetrace.config import parse_config
from forgetrace.encoding.check import check_data
from forgetrace.layout import Layout, load_layout
from forgetrace.planning import draft
from forgetrace.planning.draft import init

from ..datasets.pictures import picture, write_folder

SCENES = {f"{place}/{i} ä.png": f"thing {i} in the {place}" for place in ("garden", "house") for i in range(30)}


@pytest.fixture
def timed(tmp_path, monkeypatch) -> list:
    """What is timed, in the order it is; every step takes as long as the test says, at first 50 ms."""
    monkeypatch.chdir(tmp_path)
    asked = [0.05]

    def seconds(scale, captions, device):
        asked.append(scale)
        return asked[0]

    monkeypatch.setattr(draft, "_step_seconds", seconds)
    return asked


def drafted(name: str, data: str) -> Layout:
    file, _ = init(name, data, "cpu")
    assert file == Path("config", f"{name}.yaml")
    layout = load_layout(file)
    check_data(layout)
    return layout


def test_a_config_is_of_the_images_there_are(timed):
    write_folder(Path("my: {photos}"), SCENES)
    for number, name in enumerate(SCENES):
        picture(number, 64, 48).save(Path("my: {photos}", name))
    config = drafted("mine", "my: {photos}").config
    assert (config.prepare.path, config.prepare.size, config.encode.factor) == ("my: {photos}", 32, 4)
    assert (config.prepare.tuning_captions, config.prepare.report_captions) == (4, 4)
    assert config.queries() == [f"report-0{i}" for i in range(4)]
    assert config.retrain.k == [(60 - 8) // 25]
    assert config.train.channels == [64, 128]
    assert config.train.steps == 5000  # 5 minutes would do for 6,000


@pytest.mark.parametrize(
    ("seconds", "channels", "steps", "size"),
    [(0.01, [64, 128], 5000, 32), (0.1, [64, 128], 3000, 32), (0.2, [32, 64], 1500, 16), (9, [32, 64], 1000, 16)],
)
def test_a_slower_machine_has_smaller_images_a_smaller_model_and_fewer_steps(timed, seconds, channels, steps, size):
    for number, name in enumerate(write_folder(Path("in"), SCENES) and SCENES):
        picture(number, 32, 32).save(Path("in", name))
    timed[0] = seconds
    config = drafted("mine", "in").config
    assert (config.train.channels, config.train.steps, config.prepare.size) == (channels, steps, size)


@pytest.mark.parametrize("kind", draft.SCALES)
def test_no_network_is_narrower_than_its_latents(kind):
    """300 emoji at 32 pixels, 48 channels in a network of 32, came out as noise."""
    assert all(scale.channels[0] >= 3 * scale.factor**2 for scale in draft.SCALES[kind])


@pytest.mark.parametrize(("side", "size"), [(9, 16), (16, 16), (31, 16), (32, 32), (500, 32)])
def test_small_images_are_not_blown_up(timed, side, size):
    write_folder(Path("in"), SCENES)
    for number, name in enumerate(SCENES):
        picture(number, side, side + 7).save(Path("in", name))
    assert drafted("mine", "in").config.prepare.size == size


def test_where_captions_are_few_none_is_held_out_and_an_image_is_the_query(timed):
    write_folder(Path("in"), {f'{i} "q", {{}}.png': f"class: {i % 3}, #'x'" for i in range(12)})
    config = drafted("classes", "in").config
    assert (config.prepare.tuning_captions, config.prepare.report_captions) == (0, 0)
    [query] = config.synthesize.queries
    assert Path(query.image).is_file()
    assert query.prompt == "class: 0, #'x'"
    assert "tuning_captions" in Path("config/classes.yaml").read_text()


def test_large_data_are_thinned_on_a_cpu(timed, monkeypatch):
    write_folder(Path("in"), SCENES)
    monkeypatch.setitem(draft.MOST_IMAGES, "cpu", 50)
    config = drafted("mine", "in").config
    assert config.encode.max_images == 50
    assert config.retrain.k == [2]


@settings(max_examples=50)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_stands_in_yaml_as_it_is(text):
    assert yaml.safe_load(f"{{a: {draft.quoted(text)}}}") == {"a": text}


def test_nothing_is_overwritten(timed):
    write_folder(Path("in"), SCENES)
    init("mine", "in", "cpu")
    Path("config/mine.yaml").write_text("my changes")
    with pytest.raises(UserError, match=r"^config/mine.yaml exists: choose another name, or remove it first\.$"):
        init("mine", "in", "cpu")
    assert Path("config/mine.yaml").read_text() == "my changes"


@pytest.mark.parametrize("name", ["../mine", "Mine", "", "a b", "ä", "-a"])
def test_a_name_that_cannot_be_a_folder_is_refused(timed, name):
    write_folder(Path("in"), SCENES)
    with pytest.raises(UserError, match="cannot name an experiment"):
        init(name, "in", "cpu")
    assert not Path("config").exists()


def test_too_few_images_are_refused(timed):
    write_folder(Path("in"), {"a.png": "one", "b.png": "two"})
    with pytest.raises(UserError, match="in has only 2 images to train on: attribution needs 10 or more"):
        init("mine", "in", "cpu")


def test_broken_rows_are_told(timed):
    write_folder(Path("in"), SCENES)
    Path("in/garden/3 ä.png").unlink()
    with pytest.raises(UserError, match=r"line 4: the file garden/3 ä.png is missing"):
        init("mine", "in", "cpu")


def forgetrace(*arguments: str) -> str:
    """Run a command as a user does; what it printed."""
    command = [sys.executable, "-m", "forgetrace.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_folder_goes_from_init_to_a_ranking(tmp_path, monkeypatch):
    """Nothing of the config is changed but how long it trains; images of many kinds, some captions in lists."""
    monkeypatch.chdir(tmp_path)
    data = write_folder(tmp_path / "my photos", SCENES | {"both.jpg": ["a thing", "another thing"], "gray.jpg": "gray"})
    picture(98).convert("CMYK").save(data / "both.jpg")
    picture(99).convert("L").save(data / "gray.jpg")
    assert "62 images at 16 pixels, 63 distinct captions" in forgetrace("init", "mine", "--data", "my photos")
    config = Path("config/mine.yaml")
    content = yaml.safe_load(config.read_text())
    content["train"] |= {"steps": 6, "warmup_steps": 2, "checkpoint_every": 6, "precision": "fp32"}
    parse_config(content, config)
    config.write_text(yaml.safe_dump(content))
    for stage, options in {"prepare": [], "encode": [], "train": [], "synthesize": ["--query", "report-00"]}.items():
        forgetrace(stage, "--config", str(config), *options)
    for method in ("pixel-l2", "text"):
        forgetrace("score", "--config", str(config), "--method", method, "--query", "report-00")
    layout = load_layout(config)
    prepared = read_json(layout.data_manifest)
    assert read_json(layout.query("report-00")["record"])["prompt"] == prepared["pools"]["report"][0]
    ranking = read_table(layout.score("pixel-l2", "report-00"))
    assert len(ranking) == prepared["counts"]["train"]
    assert set(ranking["image_id"]) < {*SCENES, "both.jpg", "gray.jpg"}
