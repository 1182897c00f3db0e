import json

import numpy as np
import pytest
from PIL import Image

from forgetrace.artifacts import UserError, read_arrays, read_image, read_json, write_image
from forgetrace.diffusion.regions import (
    bounding_box,
    boxes_of_file,
    latent_weights,
    pixels_of_boxes,
    pixels_of_mask,
)
from forgetrace.diffusion.synthesis import synthesize
from forgetrace.layout import Layout

from ..conftest import settings

QUERIES = ["report-00", "report-01"]


def with_regions(**regions: dict) -> Layout:
    return Layout("tiny", settings(synthesize={"regions": regions}))


def test_a_region_shares_all_but_its_mask_with_the_whole_image(tiny):
    layout = with_regions(corner={"boxes": [[0, 0, 3, 4]]})
    synthesize(layout, "report-00-corner", "cpu")
    whole, own = (read_arrays(layout.query(query)["tensors"]) for query in ("report-00", "report-00-corner"))
    assert own.keys() - whole.keys() == {"region", "region_pixels"}
    assert all(np.array_equal(own[name], whole[name]) for name in whole)
    expected = np.zeros((8, 8), dtype=np.float32)
    expected[:2, 0], expected[:2, 1] = 1, 0.5  # the third column of pixels is half of a latent position
    np.testing.assert_array_equal(own["region"], expected)
    assert own["region_pixels"].sum() == 12
    images = [read_image(layout.query(query)["image"]) for query in ("report-00", "report-00-corner")]
    assert np.array_equal(*images)
    records = [read_json(layout.query(query)["record"]) for query in ("report-00", "report-00-corner")]
    assert records[0]["prompt"] == records[1]["prompt"]
    assert records[1]["box"] == [0, 0, 3, 4]


def test_regions_follow_their_query_and_belong_to_its_origin():
    config = with_regions(left={"boxes": [[0, 0, 8, 16]]}, dot={"boxes": [[0, 0, 1, 1]], "queries": ["mine"]}).config
    assert config.queries() == [
        "report-00", "report-00-left", "report-01", "report-01-left", "mine", "mine-left", "mine-dot",
    ]  # fmt: skip
    assert config.origin("report-00-left") == "report"
    assert config.generates("report-00-left")
    assert config.origin("mine-dot") == "own"
    assert not config.generates("mine-dot")
    assert config.region("mine-dot") == ("mine", "dot")
    assert config.region("mine") is None


def test_a_config_without_regions_is_what_it_was():
    assert "regions" not in settings().model_dump_json()
    assert settings().queries() == ["report-00", "report-01", "mine"]


@pytest.mark.parametrize("shape", [(16, 32), (8, 8)])
def test_weights_are_the_share_of_pixels_inside(shape):
    inside = np.random.default_rng(0).random(shape) < 0.4
    weights = latent_weights(inside, (shape[0] // 4, shape[1] // 2))
    for row in range(shape[0] // 4):
        for column in range(shape[1] // 2):
            block = inside[4 * row : 4 * row + 4, 2 * column : 2 * column + 2]
            assert weights[row, column] == block.sum() / 8
    assert weights.dtype == np.float32
    assert (latent_weights(np.ones(shape, dtype=bool), (2, 2)) == 1).all()


def test_an_empty_region_has_no_weights():
    with pytest.raises(UserError, match="region is empty"):
        latent_weights(np.zeros((8, 8), dtype=bool), (4, 4))


def test_boxes_unite_and_are_bounded():
    inside = pixels_of_boxes([[1, 2, 3, 4], [5, 0, 6, 1]], (6, 8), "here")
    assert inside.sum() == 5
    assert inside[2, 1]
    assert inside[0, 5]
    assert not inside[4, 1]
    assert bounding_box(inside) == [1, 0, 6, 4]


@pytest.mark.parametrize("box", [[0, 0, 17, 4], [4, 0, 4, 4], [-1, 0, 4, 4], [0, 5, 4, 5], [0, 0, 4, 17]])
def test_a_box_outside_the_image_is_refused(box):
    with pytest.raises(UserError, match=r"here: the box .* reaches outside the image, 16 wide and 16 high"):
        pixels_of_boxes([box], (16, 16), "here")


@pytest.mark.parametrize("box", [[4, 0, 4, 4], [5, 0, 4, 4], [-1, 0, 4, 4]])
def test_an_empty_box_of_the_config_is_refused_before_anything_runs(box):
    with pytest.raises(UserError, match="is empty or begins outside the image"):
        with_regions(left={"boxes": [box]})


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ({"left": {}}, "give one of boxes, mask, file and phrase"),
        ({"left": {"boxes": [[0, 0, 1, 1]], "mask": "m.png"}}, "give one of boxes"),
        ({"left": {"boxes": [[0, 0, 1, 1]], "queries": ["nobody"]}}, "there is no query 'nobody'"),
        ({"left": {"phrase": "a dog"}}, "needs a detector"),
    ],
)
def test_a_wrong_region_is_refused(regions, message):
    with pytest.raises(UserError, match=message):
        with_regions(**regions)


def test_a_mask_says_what_is_inside(tmp_path):
    mask = np.zeros((4, 6, 3), dtype=np.uint8)
    mask[1:3, 2] = 255
    path = str(tmp_path / "mask.png")
    write_image(path, mask)
    assert np.array_equal(pixels_of_mask(path, (4, 6), "r"), mask[..., 0] > 0)
    with pytest.raises(UserError, match="6x4 pixels, the query's image 4x4"):
        pixels_of_mask(path, (4, 4), "r")
    write_image(path, np.zeros_like(mask))
    with pytest.raises(UserError, match="is empty, no pixel is brighter"):
        pixels_of_mask(path, (4, 6), "r")
    with pytest.raises(UserError, match="missing or no image"):
        pixels_of_mask(str(tmp_path / "none.png"), (4, 6), "r")


def test_what_is_transparent_or_dark_in_16_bits_is_outside_a_mask(tmp_path):
    mask, path = np.full((4, 6, 4), 255, dtype=np.uint8), str(tmp_path / "mask.png")
    mask[:, 3:, 3] = 0  # white, but transparent
    Image.fromarray(mask).save(path)
    left = np.arange(6) < 3
    assert np.array_equal(pixels_of_mask(path, (4, 6), "r"), np.tile(left, (4, 1)))
    Image.new("F", (6, 4)).save(tmp_path / "mask.tiff")
    with pytest.raises(UserError, match=r"mask.tiff is missing .* \(32-bit gray has no fixed white: save it with 8"):
        pixels_of_mask(str(tmp_path / "mask.tiff"), (4, 6), "r")
    Image.fromarray(np.where(np.tile(left, (4, 1)), 65535, 1000).astype(np.uint16)).save(path)
    assert np.array_equal(pixels_of_mask(path, (4, 6), "r"), np.tile(left, (4, 1)))


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_boxes_come_from_a_file(tmp_path, suffix):
    path = tmp_path / f"boxes.{suffix}"
    path.write_text(json.dumps({"report-00": [0, 0, 2, 2], "report-01": {"left": [[0, 0, 1, 1], [2, 2, 3, 3]]}}))
    assert boxes_of_file(str(path), "report-00", "left", QUERIES) == [[0, 0, 2, 2]]
    assert boxes_of_file(str(path), "report-01", "left", QUERIES) == [[0, 0, 1, 1], [2, 2, 3, 3]]
    with pytest.raises(UserError, match="has no box for the region right of report-01"):
        boxes_of_file(str(path), "report-01", "right", QUERIES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"report-07": [0, 0, 2, 2]}', "there is no query 'report-07' .there are report-00, report-01"),
        ('{"report-00": [0, 0, 2]}', "is no box; give four whole numbers"),
        ('{"report-00": [0, 0, 2.5, 2]}', "is no box; give four whole numbers"),
        ("[1, 2]", "must hold boxes by query"),
        ("{", "not valid JSON or YAML"),
    ],
)
def test_a_wrong_file_of_boxes_is_refused(tmp_path, text, message):
    path = tmp_path / "boxes.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        boxes_of_file(str(path), "report-00", "left", QUERIES)
    with pytest.raises(UserError, match="cannot read"):
        boxes_of_file(str(tmp_path / "none.json"), "report-00", "left", QUERIES)
