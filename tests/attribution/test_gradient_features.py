import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from forgetrace.artifacts import UserError, read_array, write_tensors
from forgetrace.attribution.gradient_features import GradientFeatures, TrainingLosses
from forgetrace.attribution.output_gradients import Examples, OutputGradients
from forgetrace.diffusion.loss import noised
from forgetrace.diffusion.model import load_scheduler, load_unet
from forgetrace.diffusion.noise import NoiseBank
from forgetrace.diffusion.subsets import select
from forgetrace.encoding.store import load_encoded
from forgetrace.layout import Layout

from ..conftest import IMAGES, in_child, settings
from .test_projection import by_hand

DIMENSION, SEED = 48, 5
TIMESTEPS = np.array([0, 33, 66])
SOME = [0, 13, 39]


def features(layout: Layout, output: str = "loss", weights: str = "all", timesteps: int = 3) -> GradientFeatures:
    return GradientFeatures(layout, output, weights, timesteps, DIMENSION, "cpu")


def fitted(source) -> np.ndarray:
    source.fit()
    return read_array(source.layout.features(source.name))


def with_chunk(layout: Layout, chunk: int) -> Layout:
    return replace(layout, config=settings(fit={"chunk": chunk}))


def channels_last(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.movedim(1, -1) if gradient.ndim == 4 else gradient


@pytest.mark.parametrize(("output", "weights"), [("loss", "all"), ("square", "all"), ("mean", "all"), ("loss", "attn")])
def test_features_are_the_plain_loop(tiny, output, weights):
    """One image and timestep at a time, ordinary gradients, P as a dense matrix."""
    found = fitted(features(with_chunk(tiny, 60), output, weights))
    assert found.shape == (IMAGES, DIMENSION)
    assert found.dtype == np.float32
    encoded, scheduler = load_encoded(tiny), load_scheduler(tiny)
    unet = load_unet(tiny, torch.device("cpu"))
    named = dict(unet.named_parameters())
    named = {name: named[name].requires_grad_(True) for name in select(named, weights)}
    shapes = {name: tuple(channels_last(weight).shape) for name, weight in named.items()}
    matrix = np.hstack([by_hand(name, shape, DIMENSION, SEED) for name, shape in shapes.items()])
    bank = NoiseBank(SEED, "features", TIMESTEPS, (12, 8, 8))
    for i in SOME:
        latent = torch.from_numpy(np.array(encoded.latents[i]))[None]
        caption = encoded.captions[encoded.caption_rows[i]][None]
        mean = 0
        for j, timestep in enumerate(TIMESTEPS):
            noise = torch.from_numpy(bank.noise("", j))[None]
            inputs, target = noised(scheduler, latent, noise, torch.tensor([timestep]))
            prediction = unet(inputs, torch.tensor([timestep]), caption).sample
            value = {
                "loss": (prediction - target).square().mean(),
                "square": prediction.square().mean(),
                "mean": prediction.mean(),
            }[output]
            gradients = torch.autograd.grad(value, list(named.values()))
            flat = torch.cat([channels_last(gradient).flatten() for gradient in gradients]).double().numpy()
            mean = mean + (flat / np.linalg.norm(flat) if output == "mean" else flat) / len(TIMESTEPS)
        np.testing.assert_allclose(found[i], matrix @ mean, rtol=1e-3, atol=2e-5 * np.abs(found[i]).max())


def test_they_do_not_hang_on_how_many_share_a_pass(tiny):
    few, many = (fitted(features(with_chunk(tiny, chunk))) for chunk in (10, 120))
    np.testing.assert_allclose(few, many, rtol=0, atol=2e-6 * np.abs(many).max())


@pytest.mark.parametrize("chunk", [1, 4, 10, 20])
def test_one_image_s_draws_may_take_several_passes(tiny, chunk):
    latents, captions, _, _ = examples(tiny, 2)
    timesteps = np.array([0, 20, 20, 50, 99])
    noise = NoiseBank(SEED, "test", timesteps, (12, 8, 8)).draws()
    gradients = OutputGradients(with_chunk(tiny, chunk), "mean", "attn", DIMENSION, "cpu")
    found = gradients.mean(latents, captions, timesteps, noise)
    for i in range(2):
        pairs = zip(torch.from_numpy(timesteps), torch.from_numpy(noise), strict=True)
        one = latents[i : i + 1], captions[i : i + 1]
        expected = np.mean([gradients.single(Examples(*one, t[None], e[None]))[0].numpy() for t, e in pairs], axis=0)
        np.testing.assert_allclose(found[i], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def examples(layout: Layout, count: int) -> Examples:
    encoded = load_encoded(layout)
    rows = np.arange(count)
    noise = torch.randn(count, 12, 8, 8, generator=torch.Generator().manual_seed(0))
    captions = encoded.captions[encoded.caption_rows[rows]]
    return Examples(encoded.batch(rows), captions, torch.tensor([0, 20, 50, 99])[:count], noise)


def test_gradients_of_the_mean_output_have_unit_length_before_they_are_averaged(tiny):
    """With more dimensions than weights no two of them share a bucket with certainty, so lengths survive."""
    unet = load_unet(tiny, torch.device("cpu"))
    size = sum(weight.numel() for name, weight in unet.named_parameters() if ".attn2.to_v" in name)
    gradients = OutputGradients(tiny, "mean", "cross-attn-kv", 2**22, "cpu")
    assert size < 2**15
    lengths = torch.linalg.vector_norm(gradients.single(examples(tiny, 4)), dim=1)
    torch.testing.assert_close(lengths, torch.ones(4), rtol=5e-3, atol=0)
    plain = OutputGradients(tiny, "square", "cross-attn-kv", 2**22, "cpu")
    assert torch.linalg.vector_norm(plain.single(examples(tiny, 4)), dim=1).std() > 1e-6


def test_a_gradient_of_zero_has_a_feature_of_zero(tiny):
    gradients = OutputGradients(tiny, "mean", "cross-attn-kv", DIMENSION, "cpu")
    for name, weight in gradients.unet.named_parameters():
        if ".attn2.to_out" in name:
            weight.zero_()
    assert (gradients.single(examples(tiny, 2)) == 0).all()


def interrupt_after(monkeypatch, blocks: int, how) -> list[int]:
    """Let some blocks of images pass, then interrupt; the list fills with the sizes of those that follow."""
    mean, sizes = OutputGradients.mean, []

    def interrupted(self, latents, *rest):
        if len(sizes) == blocks:
            how()
        sizes.append(len(latents))
        return mean(self, latents, *rest)

    monkeypatch.setattr(OutputGradients, "mean", interrupted)
    return sizes


def test_a_killed_fit_continues_with_the_missing_images(tiny, monkeypatch):
    layout = with_chunk(tiny, 24)  # 8 images at a time
    finished = fitted(features(layout))
    Path(layout.features("loss-all-t3-d48")).unlink()

    def killed():
        interrupt_after(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGKILL))
        features(layout).fit()

    assert in_child(killed) == signal.SIGKILL
    assert not Path(layout.features("loss-all-t3-d48")).exists()
    (left,) = Path(layout.checkpoints("features")).iterdir()
    assert layout.checkpoints("features") in layout.unfinished()
    assert np.isnan(np.load(left)).any(axis=1).tolist() == [False] * 24 + [True] * 16
    sizes = interrupt_after(monkeypatch, -1, None)
    np.testing.assert_array_equal(fitted(features(layout)), finished)
    assert sizes == [8, 8]
    assert list(Path(layout.checkpoints("features")).iterdir()) == []


def test_leftovers_of_other_weights_or_settings_are_not_continued(tiny, monkeypatch):
    names = []

    def spy(path, shape):
        names.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr("forgetrace.attribution.gradient_features.resumable", spy)

    def start(source):
        with pytest.raises(KeyboardInterrupt):
            source.fit()

    for source in (features(tiny), features(tiny, "square"), features(tiny, timesteps=4), TrainingLosses(tiny, 3)):
        start(source)
    start(features(replace(tiny, config=settings().model_copy(update={"seed": 6}))))
    weights = {name: tensor * 1.5 for name, tensor in load_unet(tiny, torch.device("cpu")).state_dict().items()}
    write_tensors(tiny.weights, weights, {})
    start(features(tiny))
    assert len(set(names)) == len(names) == 6


def test_the_name_says_every_setting(tiny):
    names = {
        features(tiny).name,
        features(tiny, "square").name,
        features(tiny, weights="attn").name,
        features(tiny, timesteps=4).name,
        GradientFeatures(tiny, "loss", "all", 3, 49).name,
        TrainingLosses(tiny, 3).name,
        TrainingLosses(tiny, 4).name,
    }
    assert len(names) == 7
    assert {"loss-all-t3-d48", "loss-attn-t3-d48", "losses-t3"} < names


def test_gradients_that_are_not_finite_are_refused(tiny):
    weights = load_unet(tiny, torch.device("cpu")).state_dict()
    weights["conv_out.bias"] = torch.full_like(weights["conv_out.bias"], torch.inf)
    write_tensors(tiny.weights, weights, {})
    with pytest.raises(UserError, match=r"are NaN or infinite: its training went wrong; lower train\.learning_rate"):
        features(tiny).fit()
    assert not Path(tiny.features("loss-all-t3-d48")).exists()


def test_losses_are_those_of_the_same_noised_images(tiny):
    found = fitted(TrainingLosses(tiny, 3, "cpu"))
    encoded, scheduler = load_encoded(tiny), load_scheduler(tiny)
    unet = load_unet(tiny, torch.device("cpu"))
    bank = NoiseBank(SEED, "features", TIMESTEPS, (12, 8, 8))
    assert found.shape == (IMAGES, 3)
    for i in SOME:
        latents = torch.from_numpy(np.array(encoded.latents[i])).expand(3, -1, -1, -1)
        captions = encoded.captions[encoded.caption_rows[i]].expand(3, -1, -1)
        inputs, target = noised(scheduler, latents, torch.from_numpy(bank.draws()), torch.from_numpy(TIMESTEPS))
        with torch.no_grad():
            prediction = unet(inputs, torch.from_numpy(TIMESTEPS), captions).sample
        np.testing.assert_allclose(found[i], (prediction - target).square().mean(dim=(1, 2, 3)), rtol=1e-5)
