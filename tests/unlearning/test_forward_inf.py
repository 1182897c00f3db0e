from dataclasses import replace

import numpy as np
import pytest
import torch

from forgetrace.artifacts import read_json, read_tensors
from forgetrace.attribution.scan import scan
from forgetrace.attribution.score import score
from forgetrace.diffusion.model import load_scheduler, load_unet
from forgetrace.diffusion.noise import monte_carlo
from forgetrace.unlearning import step as module
from forgetrace.unlearning.forward_inf import unlearn_by_adam
from forgetrace.unlearning.step import Course, query_gradient, query_loss
from forgetrace.unlearning.variants import read_query, unlearn_query

from ..conftest import settings
from .test_step import CPU, SCHEDULE, query, stub


def test_the_first_step_moves_every_weight_by_the_rate_along_its_gradients_sign(tiny):
    unet, scheduler, target = load_unet(tiny, CPU), load_scheduler(tiny), read_query(tiny, "report-00")
    before = {name: weight.clone() for name, weight in unet.named_parameters()}
    names = [name for name in before if "conv" in name]
    gradient = query_gradient(unet, scheduler, target, names, range(10), 5)
    loss = query_loss(unet, scheduler, target, 5)
    changed = unlearn_by_adam(unet, scheduler, target, names, 1e-3, Course(1, 10), 5)
    assert list(changed) == names
    for name, weight in unet.named_parameters():
        if name not in names:
            assert torch.equal(weight, before[name]), name
            continue
        # θ ← θ + α g / (|g| + 1e-8)
        g = gradient[name].double()
        expected = before[name].double() + 1e-3 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(weight.double(), expected, rtol=0, atol=2e-6, msg=name)
        assert torch.equal(weight, changed[name])
    assert query_loss(unet, scheduler, target, 5) > loss
    assert not any(weight.requires_grad or weight.grad is not None for weight in unet.parameters())


def test_several_steps_are_adams_by_hand():
    """The recursion of the module's docstring in float64, on a model whose gradient is known."""
    unet = stub()
    changed = unlearn_by_adam(unet, SCHEDULE, query(), ["w"], 0.3, Course(4, 6), 9)
    w, m, v = 0.5, 0.0, 0.0
    for k in range(1, 5):
        _, noise = monte_carlo(9, "unlearn q", range(6 * k - 6, 6 * k), 10, (2, 4, 4))
        gradient = 2 * (w - noise.astype(float).mean())
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        w += 0.3 * m / (1 - 0.9**k) / ((v / (1 - 0.999**k)) ** 0.5 + 1e-8)
    assert changed["w"].item() == unet.w.item() == pytest.approx(w, rel=1e-5)
    assert abs(w - 0.5 - 4 * 0.3) > 1e-4  # more than four signs
    assert unet.unused.item() == 3


def test_the_result_depends_on_the_seed_but_not_on_how_draws_are_batched(monkeypatch):
    def weight(seed: int) -> float:
        return unlearn_by_adam(stub(), SCHEDULE, query(), ["w"], 0.3, Course(3, 13), seed)["w"].item()

    whole, other = weight(9), weight(8)
    assert abs(whole - other) > 1e-5
    monkeypatch.setattr(module, "BATCH", 5)
    assert weight(9) == pytest.approx(whole, abs=1e-6)


def test_the_stages_take_it_like_any_variant(tiny):
    variant = {"procedure": "adam", "weights": "attn", "step_size": 1e-3, "steps": 2, "draws": 16}
    methods = {"methods": {"forward-inf": {"attributor": "unlearning"}}}
    layout = replace(tiny, config=settings(unlearn={"forward-inf": variant}, score=methods, retrain={"methods": []}))
    unlearn_query(layout, "forward-inf", "report-00", "cpu")
    scan(layout, "forward-inf", "report-00", "cpu")
    score(layout, "forward-inf", "report-00")
    files = layout.unlearned("forward-inf", "report-00")
    unet = load_unet(layout, CPU)
    names = [name for name, _ in unet.named_parameters() if ".attn" in name]
    target = read_query(layout, "report-00")
    expected = unlearn_by_adam(unet, load_scheduler(layout), target, names, 1e-3, Course(2, 16), 5)
    written = read_tensors(files["weights"])
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in names)
    losses = read_json(files["losses"])
    assert losses["after"]["query"] > losses["before"]["query"]
    recorded = losses["made_by"]["config"]["unlearn"]
    assert (recorded["procedure"], recorded["curvature"]) == ("adam", "none")
    with np.load(layout.scan("forward-inf", "report-00")) as after, np.load(layout.base_scan) as before:
        assert not np.allclose(after["losses"], before["losses"], rtol=1e-4)
