import json
import sys
from pathlib import Path

import numpy as np
import pytest

from forgetrace.artifacts import UserError, read_json, read_table
from forgetrace.datasets.decoding import decoded, squared
from forgetrace.datasets.prepare import prepare, read_metadata
from forgetrace.encoding.encode import encode
from forgetrace.encoding.latents import to_latents
from forgetrace.encoding.store import load_encoded
from forgetrace.layout import Layout

from ..conftest import fake_token_states, settings
from .pictures import write_coco

pytest.importorskip("pycocotools", reason="an extra: pip install pycocotools")
# Not in the order of their numbers; seven captions, five and one.
IMAGES = {391895: [f"a man {i}" for i in range(7)], 9: [f"a plate {i}" for i in range(5)], 522418: [" a cake \n"]}
PREPARE = {"dataset": "coco", "path": "coco", "tuning_captions": 0, "report_captions": 0}


@pytest.fixture
def layout(tmp_path, monkeypatch) -> Layout:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("forgetrace.encoding.text.token_states", fake_token_states)
    write_coco(Path("coco"), IMAGES)
    queries = [{"name": "mine", "image": "mine.png", "prompt": "a cake"}]  # for want of held-out captions
    return Layout("tiny", settings(prepare=PREPARE, encode={"factor": 8}, synthesize={"queries": queries}))


def test_images_come_in_the_order_of_the_annotations_with_their_first_five_captions(layout, capfd):
    prepare(layout.config.prepare, layout.data)
    rows = read_metadata(layout.metadata)
    assert [row["id"] for row in rows] == ["000000391895", "000000000009", "000000522418"]
    assert [row["text"] for row in rows] == [IMAGES[391895][:5], IMAGES[9], "a cake"]
    assert read_json(layout.data_manifest)["image_shape"] == [128, 128, 3]
    assert capfd.readouterr().out == ""


def test_jpegs_become_latents_of_the_square_at_their_centre(layout):
    prepare(layout.config.prepare, layout.data)
    encode(layout)
    assert read_table(layout.index)["image_id"].tolist() == ["000000391895", "000000000009", "000000522418"]
    latents = load_encoded(layout).latents
    assert latents.shape == (3, 192, 16, 16)
    for row, number in enumerate(IMAGES):
        content = Path(f"coco/train2017/{number:012d}.jpg").read_bytes()
        np.testing.assert_array_equal(latents[row], to_latents(squared(decoded(content), 128)[None], 8)[0])


def test_what_cannot_be_used_is_told_all_at_once(layout):
    Path("coco/train2017/000000391895.jpg").unlink()
    Path("coco/train2017/000000000009.jpg").write_bytes(b"no image")
    annotations = Path("coco/annotations/captions_train2017.json")
    content = json.loads(annotations.read_text())
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] != 522418]
    annotations.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        prepare(layout.config.prepare, layout.data)
    assert str(error.value).split("\n  ") == [
        f"{annotations}: mend or remove what cannot be used (3), then run again:",
        "image 1: 000000391895.jpg is missing in coco/train2017",
        "image 2: 000000000009.jpg cannot be read as an image (no format that Pillow knows)",
        "image 3: 000000522418.jpg has no caption",
    ]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"images": 3}', '{"images": [{}]}', "\x00", '{"annotations": [{}]}']
)
def test_annotations_of_something_else_are_refused(layout, content):
    Path("coco/annotations/captions_train2017.json").write_text(content)
    with pytest.raises(UserError, match=r"captions_train2017.json is no file of COCO captions, or damaged"):
        prepare(layout.config.prepare, layout.data)


@pytest.mark.parametrize("missing", ["annotations", "train2017"])
def test_what_is_missing_is_named_with_where_it_comes_from(layout, missing):
    Path("coco", missing).rename("elsewhere")
    with pytest.raises(UserError, match=rf"^prepare.path: coco/{missing}\S* is missing; .*images.cocodataset.org"):
        prepare(layout.config.prepare, layout.data)


def test_a_missing_package_is_one_sentence(layout, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(UserError, match=r"package pycocotools, which is not installed: run `pip install pycocotools`"):
        prepare(layout.config.prepare, layout.data)
