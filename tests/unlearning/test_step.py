import os

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from forgetrace.artifacts import UserError, read_json, read_tensors
from forgetrace.curvature.contract import Identity
from forgetrace.curvature.diagonal import DiagonalFisher
from forgetrace.diffusion.loss import example_losses
from forgetrace.diffusion.model import load_scheduler, load_unet
from forgetrace.diffusion.noise import monte_carlo
from forgetrace.diffusion.subsets import select
from forgetrace.encoding.store import load_encoded
from forgetrace.unlearning import step as module
from forgetrace.unlearning.sample import others_loss
from forgetrace.unlearning.step import Course, Query, move, query_gradient, query_loss, unlearn
from forgetrace.unlearning.variants import load_curvature, read_query, step_scale, unlearn_query

from ..conftest import settings

CPU = torch.device("cpu")
SCHEDULE = DDPMScheduler(num_train_timesteps=10, prediction_type="epsilon", clip_sample=False)


class Bias(torch.nn.Module):
    """Predicts ``w`` everywhere, so that ``L = mean (w − ε)²`` and ``∇L = 2 (w − mean ε)``."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(0.5))
        self.unused = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, inputs, timesteps, encoder_hidden_states, return_dict=False):
        return (self.w + 0 * inputs,)


def query() -> Query:
    return Query("q", torch.zeros(2, 4, 4), torch.zeros(3, 2))


def gradient_of(w: float, draws: range) -> float:
    _, noise = monte_carlo(9, "unlearn q", draws, 10, (2, 4, 4))
    return 2 * (w - noise.astype(float).mean())


def stub() -> Bias:
    unet = Bias()
    unet.requires_grad_(False)
    return unet


def test_one_newton_step_closed_form():
    unet = stub()
    curvature = DiagonalFisher({"w": torch.tensor(3.0).double()}, damping=0.5)  # F + λ = 4.5
    changed = unlearn(unet, SCHEDULE, query(), curvature, ["w"], 0.2 / 40, Course(1, 12), 9)
    expected = 0.5 + 0.2 / 40 * gradient_of(0.5, range(12)) / 4.5
    assert changed.keys() == {"w"}
    assert changed["w"].item() == pytest.approx(expected, rel=1e-6)
    assert unet.w.item() == changed["w"].item()
    assert unet.unused.item() == 3


def test_every_step_takes_the_gradient_afresh():
    unet, w = stub(), 0.5
    unlearn(unet, SCHEDULE, query(), Identity(), ["w"], 0.1, Course(3, 6), 9)
    for step in range(3):
        w += 0.1 * gradient_of(w, range(6 * step, 6 * step + 6))
    assert unet.w.item() == pytest.approx(w, rel=1e-5)


def test_steps_may_grow():
    unet, w = stub(), 0.5
    unlearn(unet, SCHEDULE, query(), Identity(), ["w"], 0.1, Course(3, 6, growth=1.5), 9)
    for step in range(3):
        w += 0.1 * 1.5**step * gradient_of(w, range(6 * step, 6 * step + 6))
    assert unet.w.item() == pytest.approx(w, rel=1e-5)


def test_steps_end_when_the_querys_loss_has_risen_enough(caplog):
    def after(steps: int, rise: float | None = None) -> torch.nn.Module:
        unet = stub()
        unlearn(unet, SCHEDULE, query(), Identity(), ["w"], 0.02, Course(steps, 6, rise=rise), 9)
        return unet

    def loss(unet: torch.nn.Module) -> float:
        return query_loss(unet, SCHEDULE, query(), 9, module.LOOK_DRAWS)

    theta0, some, more = loss(stub()), after(8), after(10)
    rise = loss(more) / theta0
    assert loss(some) < loss(more)
    assert after(100, 0.999 * rise).w == more.w  # looks come every second step
    assert not caplog.messages
    assert after(10, 1.001 * rise).w == more.w
    assert "10 steps did not raise its loss" in caplog.text
    caplog.clear()
    last = after(9)
    assert after(9, 0.999 * loss(last) / theta0).w == last.w
    assert not caplog.messages  # the last step is looked at too


def test_gradient_ascent_is_autograds_gradient(tiny):
    """The step without curvature, by one plain backward pass through the mean loss."""
    unet, scheduler, target = load_unet(tiny, CPU), load_scheduler(tiny), read_query(tiny, "report-00")
    names = select([name for name, _ in unet.named_parameters()], "attn")
    reference = load_unet(tiny, CPU).requires_grad_(True)
    timesteps, noise = monte_carlo(5, "unlearn report-00", range(10), 100, (12, 8, 8))
    example_losses(
        reference,
        scheduler,
        target.latent.repeat(10, 1, 1, 1),
        target.prompt.repeat(10, 1, 1),
        torch.from_numpy(timesteps),
        torch.from_numpy(noise),
    ).mean().backward()
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    changed = unlearn(unet, scheduler, target, Identity(), names, 0.3, Course(1, 10), 5)
    expected = dict(reference.named_parameters())
    assert list(changed) == names
    for name, weight in unet.state_dict().items():
        if name in changed:
            torch.testing.assert_close(weight, before[name] + 0.3 * expected[name].grad, rtol=1e-5, atol=1e-6)
            assert torch.equal(weight, changed[name])
        else:
            assert torch.equal(weight, before[name]), name
    assert not any(weight.requires_grad for weight in unet.parameters())


def test_the_gradient_does_not_depend_on_the_batch(tiny, monkeypatch):
    unet, scheduler, target = load_unet(tiny, CPU), load_scheduler(tiny), read_query(tiny, "report-00")
    names = [name for name, _ in unet.named_parameters()]
    whole = query_gradient(unet, scheduler, target, names, range(13), 5)
    for batch in (1, 5):
        monkeypatch.setattr(module, "BATCH", batch)
        parts = query_gradient(unet, scheduler, target, names, range(13), 5)
        for name in names:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6, msg=name)


def test_draws_differ_between_queries_and_seeds():
    other = Query("r", torch.zeros(2, 4, 4), torch.zeros(3, 2))
    one, two, three = (
        query_gradient(stub(), SCHEDULE, target, ["w"], range(6), seed)["w"].item()
        for target, seed in ((query(), 9), (other, 9), (query(), 8))
    )
    assert len({one, two, three}) == 3


def test_the_check_uses_draws_no_step_was_taken_on():
    _, noise = monte_carlo(9, "check q", range(20), 10, (2, 4, 4))
    expected = np.square(0.5 - noise.astype(float)).mean()
    assert query_loss(stub(), SCHEDULE, query(), 9, 20) == pytest.approx(expected, rel=1e-6)
    _, stepped = monte_carlo(9, "unlearn q", range(20), 10, (2, 4, 4))
    assert not np.array_equal(noise, stepped)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_to_nowhere_names_query_and_weight(bad):
    unet = stub()
    with pytest.raises(UserError, match="Unlearning q made w NaN or infinite: lower the variant's step_size"):
        move(unet, {"w": torch.tensor(bad)}, 1.0, "q")
    with pytest.raises(UserError, match="made w NaN or infinite"):
        move(stub(), {"w": torch.tensor(1e30)}, 1e30, "q")


@pytest.mark.parametrize(("step_size", "broken"), [(1e38, r"\S+"), (1e20, "the loss")])
def test_a_failed_stage_writes_nothing(tiny, step_size, broken):
    """The larger step overflows a weight; after the smaller one weights are finite and losses are not."""
    huge = type(tiny)("tiny", settings(unlearn={"unlearn": {"step_size": step_size, "draws": 4}}))
    with pytest.raises(UserError, match=f"^Unlearning report-01 .*made {broken} NaN or infinite"):
        unlearn_query(huge, "unlearn", "report-01", "cpu")
    assert not any(os.path.exists(path) for path in tiny.unlearned("unlearn", "report-01").values())


def test_the_query_is_forgotten_more_than_the_rest(tiny):
    record = read_json(tiny.unlearned("unlearn", "report-00")["losses"])
    rise = {name: record["after"][name] / record["before"][name] - 1 for name in ("query", "others")}
    assert rise["query"] > 1e-3
    assert rise["query"] > 2 * abs(rise["others"])


def test_losses_before_and_after_are_those_of_the_two_models(tiny):
    scheduler, encoded, target = load_scheduler(tiny), load_encoded(tiny), read_query(tiny, "report-00")
    files = tiny.unlearned("unlearn", "report-00")
    for moment, weights in (("before", None), ("after", files["weights"])):
        unet = load_unet(tiny, CPU, changed=weights)
        losses = read_json(files["losses"])[moment]
        assert losses["query"] == pytest.approx(query_loss(unet, scheduler, target, 5), rel=1e-6)
        assert losses["others"] == pytest.approx(others_loss(unet, scheduler, encoded, 5), rel=1e-6)


def test_only_the_subset_is_kept(tiny):
    unlearn_query(tiny, "unlearn-sgd", "report-00", "cpu")
    names = list(read_tensors(tiny.weights))
    assert set(read_tensors(tiny.unlearned("unlearn-sgd", "report-00")["weights"])) == set(select(names, "attn"))
    assert set(read_tensors(tiny.unlearned("unlearn", "report-00")["weights"])) == set(names)


def test_the_stage_takes_the_step_of_the_paper(tiny):
    """θ + (α/N) (F + 0.1 mean F)⁻¹ ∇L, from the files of the stages before."""
    before, after = read_tensors(tiny.weights), read_tensors(tiny.unlearned("unlearn", "report-00")["weights"])
    unet, names = load_unet(tiny, CPU), list(before)
    target, fisher = read_query(tiny, "report-00"), read_tensors(tiny.fisher)
    gradient = query_gradient(unet, load_scheduler(tiny), target, names, range(32), 5)
    for name in names:
        change = 1e-4 / 40 * gradient[name].double() / (fisher[name] + 0.1 * fisher[name].mean())
        torch.testing.assert_close(after[name].double(), before[name].double() + change, rtol=1e-5, atol=1e-6)


def test_step_scale_and_curvature_follow_the_variant(tiny):
    newton, ascent = tiny.config.unlearn["unlearn"], tiny.config.unlearn["unlearn-sgd"]
    assert step_scale(newton, 40) == 1e-4 / 40
    assert step_scale(ascent, 40) == 1e-2
    assert isinstance(load_curvature(tiny, newton.curvature, newton.damping), DiagonalFisher)
    assert isinstance(load_curvature(tiny, ascent.curvature, ascent.damping), Identity)


def test_others_are_a_fixed_sample(tiny):
    encoded, unet, scheduler = load_encoded(tiny), load_unet(tiny, CPU), load_scheduler(tiny)
    loss = others_loss(unet, scheduler, encoded, 5)
    assert others_loss(unet, scheduler, encoded, 5) == loss
    assert others_loss(unet, scheduler, encoded, 6) != loss
    # All 40 images, 4 draws each, one at a time.
    timesteps, noise = monte_carlo(5, "others", range(160), 100, (12, 8, 8))
    picked = range(0, 160, 23)
    single = [
        example_losses(
            unet,
            scheduler,
            encoded.batch(np.array([i % 40])),
            encoded.captions[encoded.caption_rows[i % 40]][None],
            torch.tensor([timesteps[i]]),
            torch.from_numpy(noise[i])[None],
        ).item()
        for i in picked
    ]
    every = example_losses(
        unet,
        scheduler,
        encoded.batch(np.tile(np.arange(40), 4)),
        encoded.captions[encoded.caption_rows.repeat(4)],
        torch.from_numpy(timesteps),
        torch.from_numpy(noise),
    )
    np.testing.assert_allclose(every[list(picked)], single, rtol=1e-5)
    assert loss == pytest.approx(every.double().mean().item(), rel=1e-6)
