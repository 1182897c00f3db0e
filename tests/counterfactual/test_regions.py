import numpy as np
import pytest
import torch

from forgetrace.artifacts import read_arrays, read_json
from forgetrace.counterfactual.measure import brief_measures, measure, query_losses, region_losses
from forgetrace.diffusion.model import load_unet
from forgetrace.evaluation.measures import read_measure
from forgetrace.layout import BASE

THETA0 = (BASE, 0, BASE)


def test_inside_and_outside_weighed_by_area_are_the_whole(regions):
    unet = load_unet(regions, torch.device("cpu"))
    arrays = read_arrays(regions.query("report-00-part")["tensors"])
    parts, share = region_losses(regions, unet, arrays), arrays["region"].mean()
    whole = query_losses(regions, unet, arrays)[1].mean()
    assert share == 5 * 7 / 256
    assert share * parts["inside"] + (1 - share) * parts["outside"] == pytest.approx(whole, rel=1e-5)
    assert parts["inside"] != pytest.approx(parts["outside"], rel=1e-2)


def test_a_region_of_all_has_no_outside(regions):
    unet = load_unet(regions, torch.device("cpu"))
    arrays = read_arrays(regions.query("report-00-all")["tensors"])
    parts = region_losses(regions, unet, arrays)
    assert parts.keys() == {"inside"}
    assert parts["inside"] == pytest.approx(query_losses(regions, unet, arrays)[1].mean(), rel=1e-5)


def test_a_measure_of_a_region_says_both_and_one_of_an_image_neither(regions):
    unet = load_unet(regions, torch.device("cpu"))
    for query in ("report-00", "report-00-part"):
        measure(regions, unet, THETA0, query, "key")
    whole, part = (read_measure(regions, THETA0, query) for query in ("report-00", "report-00-part"))
    assert "regions" not in read_json(regions.measure(*THETA0, "report-00")["losses"])
    assert whole.regions == {}
    assert part.regions.keys() == {"inside", "outside"}
    assert whole.loss == part.loss  # the same draws
    np.testing.assert_array_equal(whole.image, part.image)
    brief = brief_measures(regions, unet, ["report-00-part"])["report-00-part"]
    assert brief["loss"] == pytest.approx(part.regions["inside"], abs=1e-9)
