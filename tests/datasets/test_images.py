import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from forgetrace.artifacts import UserError, write_image
from forgetrace.datasets.decoding import squared
from forgetrace.datasets.images import TrainingImages
from forgetrace.datasets.prepare import prepare
from forgetrace.layout import Layout

from ..conftest import settings
from .pictures import picture, write_folder

PREPARE = {"dataset": "folder", "path": "in", "size": 8, "tuning_captions": 0, "report_captions": 1}


@pytest.fixture
def layout(tmp_path, monkeypatch) -> Layout:
    monkeypatch.chdir(tmp_path)
    write_folder(Path("in"), {"sub/ä.png": "one", "b.png": "two", "c.png": "three"})
    own = Layout("tiny", settings(prepare=PREPARE, synthesize={"queries": [{"pool": "report", "count": 1}]}))
    prepare(own.config.prepare, own.data)
    return own


def test_images_are_read_as_squares_of_the_size(layout):
    read = TrainingImages(layout)
    for number, name in enumerate(["sub/ä.png", "b.png", "c.png"]):
        np.testing.assert_array_equal(read(name), squared(picture(number), 8))


def test_a_copy_with_another_date_is_the_same_image(layout):
    os.utime("in/b.png", (1, 1))
    shutil.copy("in/c.png", "in/copy.png")
    os.replace("in/copy.png", "in/c.png")
    assert TrainingImages(layout)("b.png").shape == TrainingImages(layout)("c.png").shape == (8, 8, 3)


def test_a_changed_image_is_noticed_though_size_and_date_are_the_same(layout):
    path, before = Path("in/b.png"), os.stat("in/b.png")
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError) as error:
        TrainingImages(layout)("b.png")
    assert str(error.value) == (
        f"in/b.png is not the image that was prepared: put it back, or delete {layout.data_manifest} "
        "and run again to prepare what is there now."
    )


def test_a_moved_image_is_noticed(layout):
    Path("in/b.png").rename("in/moved.png")
    with pytest.raises(UserError, match=r"^in/b.png cannot be read \(No such file or directory\): put it back, or"):
        TrainingImages(layout)("b.png")


def test_the_way_out_works(layout):
    picture(7).save("in/b.png")
    Path(layout.data_manifest).unlink()
    prepare(layout.config.prepare, layout.data)
    np.testing.assert_array_equal(TrainingImages(layout)("b.png"), squared(picture(7), 8))


def test_a_bundled_image_is_read_from_the_data(layout):
    bundled = replace(layout, config=settings())
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    write_image(f"{bundled.data}/images/a.png", pixels)
    np.testing.assert_array_equal(TrainingImages(bundled)("images/a.png"), pixels)
    with pytest.raises(
        UserError, match=r"images/b.png is missing or damaged: delete data/digits/manifest.json and run"
    ):
        TrainingImages(bundled)("images/b.png")


def test_an_image_that_cannot_be_decoded_is_one_sentence_where_nothing_was_hashed(layout):
    prepare(layout.config.prepare, layout.data, look=False)
    Path("in/b.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^in/b.png cannot be read as an image"):
        TrainingImages(layout)("b.png")
