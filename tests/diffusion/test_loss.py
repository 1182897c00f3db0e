from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from forgetrace.diffusion.loss import batched_losses, example_losses, noised

TIMESTEPS = torch.tensor([0, 3, 9])


class Stub(torch.nn.Module):
    """Predicts ``w · z_t + mean(c) + t``, something a hand can compute."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, inputs, timesteps, encoder_hidden_states, return_dict=False):
        pooled = encoder_hidden_states.mean(dim=(1, 2))[:, None, None, None]
        return (self.w * inputs + pooled + timesteps[:, None, None, None],)


def schedule(prediction: str) -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=10, beta_schedule="linear", prediction_type=prediction, clip_sample=False)


def batch(count: int = 3):
    source = torch.Generator().manual_seed(0)
    return (
        torch.randn(count, 2, 4, 4, generator=source),
        torch.randn(count, 5, 3, generator=source),
        torch.randn(count, 2, 4, 4, generator=source),
    )


def alpha_bar() -> np.ndarray:
    """diffusers' linear schedule: β from 1e-4 to 0.02."""
    return np.cumprod(1 - np.linspace(1e-4, 0.02, 10))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_loss_and_target_closed_form(prediction):
    latents, captions, noise = batch()
    losses = example_losses(Stub(), schedule(prediction), latents, captions, TIMESTEPS, noise)
    for i, t in enumerate(TIMESTEPS.tolist()):
        signal, spread = np.sqrt(alpha_bar()[t]), np.sqrt(1 - alpha_bar()[t])
        z, e, c = latents[i].double().numpy(), noise[i].double().numpy(), captions[i].double().numpy()
        z_t = signal * z + spread * e
        target = e if prediction == "epsilon" else signal * e - spread * z
        expected = np.mean((target - (0.3 * z_t + c.mean() + t)) ** 2)
        assert losses[i].item() == pytest.approx(expected, rel=1e-5)


def test_noised_inputs_are_the_forward_process():
    latents, _, noise = batch()
    inputs, target = noised(schedule("epsilon"), latents, noise, TIMESTEPS)
    signal = torch.from_numpy(np.sqrt(alpha_bar())[TIMESTEPS]).float()[:, None, None, None]
    torch.testing.assert_close(inputs, signal * latents + (1 - signal**2).sqrt() * noise, rtol=1e-4, atol=1e-5)
    assert target is noise


def test_half_precision_predictions_are_compared_in_fp32():
    latents, captions, noise = batch()
    unet = SimpleNamespace()
    half = lambda *a, **k: (torch.full_like(latents, 1 / 3, dtype=torch.bfloat16),)  # noqa: E731
    unet = half
    losses = example_losses(unet, schedule("epsilon"), latents, captions, TIMESTEPS, noise)
    assert losses.dtype == torch.float32
    exact = (torch.tensor(1 / 3).bfloat16().float() - noise).square().flatten(1).mean(1)
    torch.testing.assert_close(losses, exact)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_batched_losses_do_not_depend_on_the_batch(size):
    latents, captions, noise = batch(7)
    timesteps = np.array([0, 9, 1, 4, 4, 2, 8])
    losses = batched_losses(Stub(), schedule("epsilon"), latents, captions, timesteps, noise.numpy(), batch=size)
    single = example_losses(Stub(), schedule("epsilon"), latents, captions, torch.from_numpy(timesteps), noise)
    assert losses.dtype == np.float64
    np.testing.assert_allclose(losses, single.detach().numpy(), rtol=1e-6)
