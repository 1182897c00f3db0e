import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from forgetrace.artifacts import read_arrays, read_json, read_tensors
from forgetrace.attribution.registry import attributor
from forgetrace.attribution.scan import scan
from forgetrace.attribution.unlearning import skew
from forgetrace.diffusion.loss import noised
from forgetrace.diffusion.model import build_unet, load_scheduler, load_unet
from forgetrace.diffusion.noise import monte_carlo
from forgetrace.diffusion.subsets import select
from forgetrace.encoding.store import Encoded, load_encoded
from forgetrace.randomness import generator
from forgetrace.unlearning.mucs import bounded, unlearn_mirrored, untrained_loss
from forgetrace.unlearning.step import Query, query_loss
from forgetrace.unlearning.variants import read_query, unlearn_query

from ..conftest import settings
from .test_step import CPU, SCHEDULE, query, stub

STUB_DATA = Encoded(["a", "b"], np.zeros((2, 2, 4, 4), np.float32), torch.zeros(2, 3, 2), torch.zeros(2, dtype=int))


def mirrored(unet, null: float, rate: float = 0.01, steps: int = 3, batch: int = 6, seed: int = 9) -> float:
    return unlearn_mirrored(unet, SCHEDULE, query(), STUB_DATA, null, ["w"], rate, steps, batch, seed)["w"].item()


def test_every_draw_is_bounded_by_itself():
    losses = torch.tensor([0.5, 2.0, 0.9, 1.1], requires_grad=True)
    mean = bounded(losses, 1.0)
    assert mean.item() == pytest.approx((0.5 + 1 + 0.9 + 1) / 4)  # not min(mean, 1) = 1
    mean.backward()
    assert losses.grad.tolist() == [0.25, 0, 0.25, 0]


def by_hand(null: float, rate: float, steps: int, batch: int) -> float:
    """AdamW in float64 on the stub, whose draw i has the loss mean (w − ε_i)² and the gradient 2 (w − mean ε_i)."""
    w, m, v = 0.5, 0.0, 0.0
    for k in range(1, steps + 1):
        numbers = range(batch * (k - 1), batch * k)
        forget, retain = (monte_carlo(9, purpose, numbers, 10, (2, 4, 4))[1] for purpose in ("unlearn q", "retain"))
        below = np.square(w - forget.astype(float)).mean(axis=(1, 2, 3)) < null
        away = np.where(below, 2 * (w - forget.astype(float).mean(axis=(1, 2, 3))), 0).mean()
        gradient = 2 * (w - retain.astype(float).mean()) - 0.2 * away
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        w -= rate * 0.01 * w
        w -= rate * m / (1 - 0.9**k) / ((v / (1 - 0.999**k)) ** 0.5 + 1e-8)
    return w


def test_the_steps_are_adamws_by_hand():
    _, noise = monte_carlo(9, "unlearn q", range(6), 10, (2, 4, 4))
    null = 1.3
    assert 0 < (np.square(0.5 - noise).mean(axis=(1, 2, 3)) < null).sum() < 6  # the bound divides the draws
    changed = mirrored(stub(), null)
    assert changed == pytest.approx(by_hand(null, 0.01, 3, 6), rel=1e-5)
    assert changed != pytest.approx(by_hand(1e9, 0.01, 3, 6), rel=1e-4)  # without a bound


def test_images_and_draws_to_retain_are_their_own_random_numbers():
    """Two images that cannot be mistaken: which one is drawn shows in what the model is asked."""
    asked = []

    class Spy(type(stub())):
        def forward(self, inputs, timesteps, encoder_hidden_states, return_dict=False):
            asked.append((encoder_hidden_states[:, 0, 0].tolist(), timesteps.tolist()))
            return super().forward(inputs, timesteps, encoder_hidden_states, return_dict)

    captions = torch.arange(3.0)[:, None, None].expand(3, 3, 2)
    data = replace(STUB_DATA, captions=captions, caption_rows=torch.tensor([0, 1]))
    unlearn_mirrored(Spy().requires_grad_(False), SCHEDULE, query(), data, 1e9, ["w"], 0.01, 2, 8, 9)
    drawn = [float(generator(9, "retain", "image", i).integers(2)) for i in range(16)]
    assert set(drawn) == {0, 1}
    assert [rows for rows, _ in asked[1::2]] == [drawn[:8], drawn[8:]]
    assert asked[1][1] + asked[3][1] == monte_carlo(9, "retain", range(16), 10, (2, 4, 4))[0].tolist()
    assert [rows for rows, _ in asked[0::2]] == [[0] * 8] * 2
    assert asked[0][1] + asked[2][1] == monte_carlo(9, "unlearn q", range(16), 10, (2, 4, 4))[0].tolist()


def test_an_image_that_the_model_does_not_know_is_left_alone_and_named(caplog):
    steps = []

    class Counting(type(stub())):
        def forward(self, *arguments, **named):
            steps.append(self.w.item())
            return super().forward(*arguments, **named)

    # The query's loss is about 1 + w², above 0.95 · 0.5 at once.
    unet = Counting().requires_grad_(False)
    assert mirrored(unet, null=0.5) == 0.5
    assert len(steps) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "θ0 knows no more of q than an untrained model: nothing was unlearned, all its scores are 0."
    ]
    assert not any(weight.requires_grad for weight in unet.parameters())


def test_it_stops_as_soon_as_a_batch_reaches_the_bound(tiny, caplog):
    scheduler, encoded, target = load_scheduler(tiny), load_encoded(tiny), read_query(tiny, "report-00")
    names = select(read_tensors(tiny.weights), "mlp")
    null = query_loss(load_unet(tiny, CPU), scheduler, target, 5)

    def changed(steps: int) -> torch.Tensor:
        unet = load_unet(tiny, CPU)
        weights = unlearn_mirrored(unet, scheduler, target, encoded, null, names, 3e-2, steps, 10, 5)
        return torch.cat([weights[name].flatten() for name in names])

    enough = changed(30)
    assert not caplog.records
    assert torch.equal(changed(40), enough)  # the limit no longer matters
    assert not torch.equal(changed(2), enough)
    assert len(caplog.records) == 1


def test_a_bound_that_is_never_reached_is_told(caplog):
    mirrored(stub(), null=50.0)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    said = record.getMessage()
    assert said.startswith("Unlearning q ended after 3 steps with a bounded loss of 1.")
    assert said.endswith("below 0.95 of an untrained model's 50: raise the variant's steps or step_size.")


def test_seed_and_query_decide_alone():
    assert mirrored(stub(), 1.3) == mirrored(stub(), 1.3)
    assert mirrored(stub(), 1.3, seed=8) != mirrored(stub(), 1.3)
    other = Query("r", torch.zeros(2, 4, 4), torch.zeros(3, 2))
    changed = unlearn_mirrored(stub(), SCHEDULE, other, STUB_DATA, 1.3, ["w"], 0.01, 3, 6, 9)
    assert changed["w"].item() != mirrored(stub(), 1.3)


def test_an_untrained_model_loses_about_the_target(tiny):
    scheduler, target = load_scheduler(tiny), read_query(tiny, "report-00")
    null = untrained_loss(tiny.config.train, scheduler, target, 5, CPU)
    timesteps, noise = monte_carlo(5, "check report-00", range(100), 100, (12, 8, 8))
    many = target.latent.expand(100, -1, -1, -1)
    inputs, velocity = noised(scheduler, many, torch.from_numpy(noise), torch.from_numpy(timesteps))
    assert null == pytest.approx(velocity.square().mean().item(), rel=0.5)
    with torch.no_grad():
        untrained = build_unet(tiny.config.train, (12, 8, 8), 16, 5)
        made = untrained(inputs, torch.from_numpy(timesteps), target.prompt.expand(100, -1, -1)).sample
    assert null == pytest.approx((velocity - made).square().mean().item(), rel=1e-5)
    # It follows the query.
    dark = Query("report-00", torch.zeros(12, 8, 8), target.prompt)
    assert untrained_loss(tiny.config.train, scheduler, dark, 5, CPU) < null * 0.9


@pytest.fixture
def layout(tiny):
    """The tiny experiment with a variant of few steps and with its score."""
    variant = {"procedure": "mucs", "steps": 3, "draws": 10}
    methods = {"methods": {"mucs": {"attributor": "unlearning", "score": "skew"}}}
    return replace(tiny, config=settings(unlearn={"mucs": variant}, score=methods, retrain={"methods": []}))


def test_the_stages_take_it_like_any_variant(layout, caplog):
    unlearn_query(layout, "mucs", "report-00", "cpu")
    assert "ended after 3 steps" in caplog.text
    files = layout.unlearned("mucs", "report-00")
    base, changed = read_tensors(layout.weights), read_tensors(files["weights"])
    assert set(changed) == set(select(base, "mlp"))
    assert all(not torch.equal(changed[name], base[name]) for name in changed)
    scheduler, target = load_scheduler(layout), read_query(layout, "report-00")
    null = untrained_loss(layout.config.train, scheduler, target, 5, CPU)
    rate = 2e-3 / 10
    unet = load_unet(layout, CPU)
    again = unlearn_mirrored(unet, scheduler, target, load_encoded(layout), null, list(changed), rate, 3, 10, 5)
    assert all(torch.equal(changed[name], again[name]) for name in changed)
    for name, weight in unet.named_parameters():
        if name not in changed:
            assert torch.equal(weight, base[name]), name
    assert read_json(files["losses"])["made_by"]["config"]["unlearn"]["step_size"] == rate

    scan(layout, "mucs", "report-00", "cpu")
    before, after = (
        read_arrays(path)["losses"].astype(float) for path in attributor(layout, "mucs").inputs("report-00")
    )
    scores = attributor(layout, "mucs").scores("report-00")
    np.testing.assert_allclose(scores, skew(before, after).mean(axis=1))
    assert np.ptp(scores) > 0


def test_the_query_is_forgotten_more_than_the_rest(layout):
    quick = layout.config.unlearn["mucs"].model_copy(update={"step_size": 1e-2, "steps": 30, "draws": 20})
    layout = replace(layout, config=layout.config.model_copy(update={"unlearn": {"mucs": quick}}))
    unlearn_query(layout, "mucs", "report-00", "cpu")
    record = read_json(layout.unlearned("mucs", "report-00")["losses"])
    rise = {name: record["after"][name] / record["before"][name] - 1 for name in ("query", "others")}
    assert rise["query"] > 0.02
    assert rise["others"] < 0.02
