"""Methods asked about a region: those of gradients by its loss, those of images by its pixels."""

import numpy as np
import pytest
import torch

from forgetrace.artifacts import read_image, read_table, write_image
from forgetrace.attribution.gradients import Gradients
from forgetrace.attribution.image_features import EncodedImages
from forgetrace.attribution.output_gradients import OutputGradients
from forgetrace.attribution.registry import attributor
from forgetrace.datasets.images import TrainingImages
from forgetrace.layout import Layout


def scores(layout: Layout, method: str, query: str) -> np.ndarray:
    return attributor(layout, method, "cpu").scores(query)


def test_pixels_outside_do_not_count(regions):
    before = {method: scores(regions, method, "report-00-part") for method in ("pixel", "pixel-l2")}
    files = [f"{regions.data}/{name}" for name in read_table(regions.index)["file_name"]]
    for path in (*files, regions.query("report-00-part")["image"]):
        image = read_image(path).copy()
        image[9:], image[:, 5:], image[:2] = 7, 99, 200
        write_image(path, image)
    for method, expected in before.items():
        np.testing.assert_array_equal(scores(regions, method, "report-00-part"), expected)


def test_the_score_of_pixels_inside_closed_form(regions):
    read, query = TrainingImages(regions), read_image(regions.query("report-00")["image"])
    crops = [read(name)[2:9, :5] / 127.5 - 1 for name in read_table(regions.index)["file_name"]]
    expected = [-((crop - (query[2:9, :5] / 127.5 - 1)) ** 2).sum() for crop in crops]
    np.testing.assert_allclose(scores(regions, "pixel-l2", "report-00-part"), expected)


@pytest.mark.parametrize("method", ["pixel", "pixel-l2", "text"])
def test_a_region_of_all_scores_as_the_whole_image(regions, method):
    np.testing.assert_allclose(scores(regions, method, "report-00-all"), scores(regions, method, "report-00"))


def test_the_tensors_of_a_region_are_an_input_of_what_reads_them(regions):
    for method in ("pixel", "efficientnet", "trak"):
        source = attributor(regions, method)
        assert regions.query("report-00-part")["tensors"] in source.inputs("report-00-part")
    assert regions.query("report-00")["tensors"] not in attributor(regions, "pixel").inputs("report-00")


def test_image_features_see_the_crop(regions, monkeypatch):
    seen = []
    encode = lambda images: seen.append(images) or np.zeros((len(images), 2))  # noqa: E731
    monkeypatch.setattr(EncodedImages, "_encode", staticmethod(encode))
    EncodedImages(regions, "efficientnet-lite0", "cpu").of_queries(["report-00", "report-00-part"])
    whole = read_image(regions.query("report-00")["image"])
    assert [images.shape for images in seen] == [(1, 16, 16, 3), (1, 7, 5, 3)]
    np.testing.assert_array_equal(seen[1][0], whole[2:9, :5])


def test_gradients_by_timestep_are_those_of_the_region(regions):
    gradients = Gradients(regions, "attn", 3, "cpu")
    whole, everything, part = (
        gradients.of_queries([query], 2, False) for query in ("report-00", "report-00-all", "report-00-part")
    )
    for name in whole:
        torch.testing.assert_close(whole[name], everything[name], rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(whole[name], part[name], rtol=1e-2) for name in whole)


@pytest.mark.parametrize("output", ["loss", "square", "mean"])
def test_projected_outputs_are_those_of_the_region(regions, output):
    """The output of a region is the mean over two halves, weighed by their areas, where those make up the image."""
    source = OutputGradients(regions, output, "attn", 16, "cpu")
    random = np.random.default_rng(0)
    noise = random.standard_normal((1, 12, 8, 8), dtype=np.float32)
    one = torch.from_numpy(random.standard_normal((1, 12, 8, 8), dtype=np.float32)), torch.zeros(1, 5, 16)
    left = torch.zeros(8, 8)
    left[:, :3] = 1
    whole, all_, a, b = (source.mean(*one, np.array([40]), noise, r) for r in (None, torch.ones(8, 8), left, 1 - left))
    np.testing.assert_allclose(whole, all_, rtol=1e-3, atol=1e-6)
    if output != "mean":  # whose gradients have length 1
        np.testing.assert_allclose(whole, (3 * a + 5 * b) / 8, rtol=1e-3, atol=1e-5)
    assert not np.allclose(a, b, rtol=1e-2)
