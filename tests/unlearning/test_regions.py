"""Unlearning a region: its loss is the query's, averaged over the latent positions inside."""

from dataclasses import replace

import pytest
import torch

from forgetrace.diffusion.loss import predicted
from forgetrace.diffusion.model import load_scheduler, load_unet
from forgetrace.diffusion.noise import monte_carlo
from forgetrace.encoding.store import load_encoded
from forgetrace.unlearning.mucs import untrained_loss
from forgetrace.unlearning.step import query_gradient, query_loss
from forgetrace.unlearning.variants import carry_out, load_curvature, read_query

from ..conftest import settings

CPU = torch.device("cpu")


def test_the_gradient_is_that_of_the_masked_loss(regions):
    """By one plain backward pass through the loss written out, with the draws of the whole image."""
    unet, scheduler, target = load_unet(regions, CPU), load_scheduler(regions), read_query(regions, "report-00-part")
    names = [name for name, _ in unet.named_parameters()]
    reference = load_unet(regions, CPU).requires_grad_(True)
    timesteps, noise = monte_carlo(5, "unlearn report-00", range(10), 100, (12, 8, 8))
    mask = torch.zeros(8, 8)
    mask[1:4, :2], mask[1:4, 2] = 1, 0.5  # rows 2 to 8 and columns 0 to 4 of the pixels
    mask[4, :2], mask[4, 2] = 0.5, 0.25
    output, wanted = predicted(
        reference,
        scheduler,
        target.latent.repeat(10, 1, 1, 1),
        target.prompt.repeat(10, 1, 1),
        torch.from_numpy(timesteps),
        torch.from_numpy(noise),
    )
    (((output - wanted) ** 2 * mask).sum() / (10 * 12 * mask.sum())).backward()
    expected = dict(reference.named_parameters())
    for name, gradient in query_gradient(unet, scheduler, target, names, range(10), 5).items():
        torch.testing.assert_close(gradient, expected[name].grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_region_of_all_is_the_whole_image(regions):
    unet, scheduler = load_unet(regions, CPU), load_scheduler(regions)
    whole, everything, part = (read_query(regions, f"report-00{tail}") for tail in ("", "-all", "-part"))
    names = [name for name, _ in unet.named_parameters()]
    one, two = (query_gradient(unet, scheduler, query, names, range(10), 5) for query in (whole, everything))
    for name in names:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6, msg=name)
    losses = [query_loss(unet, scheduler, query, 5) for query in (whole, everything, part)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)


@pytest.mark.parametrize(
    "variant",
    [
        {"step_size": 1e-4, "draws": 16},
        {"curvature": "none", "step_size": 1e-2, "draws": 16},
        {"procedure": "adam", "step_size": 1e-3, "draws": 16},
        {"procedure": "mucs", "steps": 1, "draws": 8, "weights": "all", "step_size": 1e-3},
    ],
)
def test_every_procedure_takes_the_region_into_account(regions, variant):
    config = settings(unlearn={"v": variant})
    scheduler, encoded = load_scheduler(regions), load_encoded(regions)
    part = read_query(regions, "report-00-part")
    whole = replace(part, region=None, whole=None, name="report-00")
    changed = []
    for query in (part, whole):
        unet = load_unet(regions, CPU)
        curvature = load_curvature(regions, config.unlearn["v"].curvature, 0.1)
        changed.append(carry_out(config, config.unlearn["v"], unet, scheduler, encoded, query, curvature))
    assert any(not torch.allclose(changed[0][name], changed[1][name], rtol=1e-6, atol=0) for name in changed[0])


def test_the_bound_of_mucs_is_that_of_the_region(regions):
    part = read_query(regions, "report-00-part")
    whole = read_query(regions, "report-00")
    scheduler = load_scheduler(regions)
    bounds = [untrained_loss(regions.config.train, scheduler, query, 5, CPU) for query in (part, whole)]
    assert bounds[0] != pytest.approx(bounds[1], rel=1e-3)
