"""Models trained as one come out as they would alone."""

import contextlib
import copy
import signal
from dataclasses import replace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from forgetrace.artifacts import UserError
from forgetrace.diffusion import training as module
from forgetrace.diffusion.captured import Captured
from forgetrace.diffusion.stacked import clip_each, stacked
from forgetrace.diffusion.training import Training, discard_checkpoints, train, train_as_one
from forgetrace.encoding.store import load_encoded

from ..conftest import IMAGES, in_child, settings
from .test_training import kill_after

NONE = np.zeros(IMAGES, dtype=bool)


def without(*images: int) -> np.ndarray:
    return np.isin(np.arange(IMAGES), images)


TRAININGS = [Training("a", 5, without(0, 3)), Training("b", 5, NONE), Training("c", 6, without(7))]


def unet(seed: int) -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = UNet2DConditionModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        for parameter in model.parameters():  # norms start as ones and zeros, which would hide a mix-up
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.double()


def test_outputs_and_gradients_are_those_of_each_model_alone():
    models, batch = [unet(seed) for seed in range(3)], 2
    whole = stacked(models)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    inputs, captions, weights = draw(6, 3, 8, 8), draw(6, 5, 12), draw(6, 3, 8, 8)
    timesteps = torch.tensor([3, 500, 999, 0, 10, 77])
    out = whole(inputs, timesteps, encoder_hidden_states=captions).sample
    (out * weights).sum().backward()
    for number, model in enumerate(models):
        part = slice(number * batch, (number + 1) * batch)
        alone = model(inputs[part], timesteps[part], encoder_hidden_states=captions[part]).sample
        torch.testing.assert_close(out[part], alone, rtol=1e-9, atol=1e-11)
        (alone * weights[part]).sum().backward()
        expected = dict(model.named_parameters())
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(parameter.grad[number], expected[name].grad, rtol=1e-7, atol=1e-10)
    assert {name for name, _ in whole.named_parameters()} == set(expected)


def test_the_models_are_left_as_they_were():
    model = unet(0)
    before = copy.deepcopy(model.state_dict())
    whole = stacked([model, unet(1)])
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_each_model_is_clipped_by_its_own_norm():
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 4, 5), (3, 6)]
    together = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for parameter in together:
        scale = torch.tensor([0.01, 1.0, 100.0]).view(3, *[1] * (parameter.dim() - 1))
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
    before = [parameter.grad.clone() for parameter in together]
    clip_each(together, 0.5)
    for model in range(3):
        alone = [nn.Parameter(torch.zeros(shape[1:])) for shape in shapes]
        for parameter, gradient in zip(alone, before, strict=True):
            parameter.grad = gradient[model].clone()
        torch.nn.utils.clip_grad_norm_(alone, 0.5)
        for parameter, whole in zip(alone, together, strict=True):
            torch.testing.assert_close(whole.grad[model], parameter.grad)


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, dilation=2)])
def test_a_layer_that_cannot_be_stacked_is_named(layer):
    model = nn.Sequential(nn.Linear(3, 3), layer)
    with pytest.raises(UserError, match=rf"layer like 1 \({type(layer).__name__}\).*retrain.stack: 1"):
        stacked([model, copy.deepcopy(model)])


def test_trained_as_one_each_model_is_what_it_is_alone(tiny):
    encoded = load_encoded(tiny)
    for training, (weights, curve, record) in zip(
        TRAININGS, train_as_one(tiny, encoded, TRAININGS, "cpu"), strict=True
    ):
        alone, alone_curve, alone_record = train(tiny, encoded, training, "cpu")
        assert record == alone_record
        np.testing.assert_allclose(curve["loss"], alone_curve["loss"], rtol=1e-4)
        start = module.initial_unet(
            tiny.config.train, (12, 8, 8), encoded.captions.shape[2], training.seed
        ).state_dict()
        moved = max(float((alone[name] - start[name]).abs().max()) for name in alone)
        for name in alone:
            torch.testing.assert_close(weights[name], alone[name], rtol=0, atol=0.02 * moved)


def test_models_of_different_sets_differ(tiny):
    (first, *_), (second, *_), (third, *_) = train_as_one(tiny, load_encoded(tiny), TRAININGS, "cpu")
    for other in (second, third):
        assert any(not torch.allclose(first[name], other[name], rtol=0, atol=1e-5) for name in first)


def test_killed_models_resume_to_the_same_bits(tiny, monkeypatch):
    encoded = load_encoded(tiny)
    finished = train_as_one(tiny, encoded, TRAININGS, "cpu")
    discard_checkpoints(tiny, *TRAININGS)
    run_step = module._Loop.run_step

    def killed():
        monkeypatch.setattr(module._Loop, "run_step", kill_after(5))
        train_as_one(tiny, encoded, TRAININGS, "cpu")

    assert in_child(killed) == signal.SIGKILL
    steps = []
    monkeypatch.setattr(module._Loop, "run_step", lambda loop: (steps.append(loop.step), run_step(loop)))
    for (weights, curve, _), (expected, expected_curve, _) in zip(
        train_as_one(tiny, encoded, TRAININGS, "cpu"), finished, strict=True
    ):
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        assert curve.equals(expected_curve)
    assert steps == [3, 4, 5, 6, 7]


def test_with_batches_drawn_ahead_as_on_a_gpu_a_training_is_the_same(tiny, monkeypatch):
    encoded = load_encoded(tiny)
    expected = train_as_one(tiny, encoded, TRAININGS, "cpu")
    discard_checkpoints(tiny, *TRAININGS)
    begin, ahead = module._Loop.__init__, []

    def drawing_ahead(loop, *given):
        begin(loop, *given)
        loop.draws_ahead = True
        submit = loop.ahead.submit
        loop.ahead.submit = lambda draw, step: ahead.append(step) or submit(draw, step)

    monkeypatch.setattr(module._Loop, "__init__", drawing_ahead)
    for (weights, curve, _), (alone, alone_curve, _) in zip(
        train_as_one(tiny, encoded, TRAININGS, "cpu"), expected, strict=True
    ):
        assert all(torch.equal(weights[name], alone[name]) for name in alone)
        assert curve.equals(alone_curve)
    assert ahead == list(range(1, 8))


def test_a_step_that_cannot_be_recorded_is_launched_each_time(monkeypatch, caplog):
    @contextlib.contextmanager
    def refuses(*_):
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    for name in ("Stream", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", refuses)
    cleared = []
    double = Captured(lambda value: 2 * value, lambda: cleared.append(1))
    assert [float(double(torch.tensor(float(i)))) for i in range(6)] == [0, 2, 4, 6, 8, 10]
    assert len(cleared) == 6 + 2
    assert len(caplog.records) == 1
    assert "cannot record" in caplog.text


def test_a_diverged_model_is_named(tiny):
    layout = replace(tiny, config=settings(train={"learning_rate": 1e30}))
    with pytest.raises(UserError, match=r"The training a diverged at step"):
        train_as_one(layout, load_encoded(layout), TRAININGS, "cpu")
