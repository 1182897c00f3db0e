import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from forgetrace.config import Train
from forgetrace.diffusion.device import pick_device
from forgetrace.diffusion.model import load_scheduler, load_unet
from forgetrace.diffusion.sampling import sample
from forgetrace.encoding.store import load_encoded


@pytest.fixture
def model(tiny):
    return load_unet(tiny, pick_device("cpu")), load_scheduler(tiny), load_encoded(tiny).captions


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 12, 8, 8, generator=torch.Generator().manual_seed(3))


def test_sampling_is_deterministic(model):
    unet, schedule, captions = model
    runs = [sample(unet, schedule, noise(2), captions[:2], captions[-1], 4, 2.0) for _ in range(2)]
    assert torch.equal(*runs)
    assert runs[0].dtype == torch.float32
    assert not torch.equal(runs[0][0], sample(unet, schedule, -noise(2), captions[:2], captions[-1], 4, 2.0)[0])


def test_an_image_does_not_depend_on_its_batch(model):
    unet, schedule, captions = model
    together = sample(unet, schedule, noise(3), captions[:3], captions[-1], 4, 1.5)
    alone = sample(unet, schedule, noise(3)[1:2], captions[1:2], captions[-1], 4, 1.5)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


def test_guidance_of_one_is_none(model):
    unet, schedule, captions = model
    plain = sample(unet, schedule, noise(1), captions[:1], captions[-1], 4, 1.0)
    assert torch.equal(plain, sample(unet, schedule, noise(1), captions[:1], captions[3], 4, 1.0))
    almost = sample(unet, schedule, noise(1), captions[:1], captions[-1], 4, 1 + 1e-7)
    torch.testing.assert_close(plain, almost, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(plain, sample(unet, schedule, noise(1), captions[:1], captions[-1], 4, 3.0), atol=1e-3)


def test_guidance_of_zero_ignores_the_prompt(model):
    unet, schedule, captions = model
    free = sample(unet, schedule, noise(1), captions[:1], captions[-1], 4, 0.0)
    empty = sample(unet, schedule, noise(1), captions[-1:], captions[-1], 4, 1.0)
    torch.testing.assert_close(free, empty, rtol=1e-4, atol=1e-5)


def test_ddim_closed_form_for_a_model_that_knows_the_noise():
    """With f = ε of the first step, every step solves z_t for z_0 and noises it again: the end is z_0."""
    schedule = DDPMScheduler(num_train_timesteps=10, prediction_type="epsilon", clip_sample=False)
    initial = noise(1)
    seen = []

    def unet(latents, timestep, captions, return_dict):
        seen.append(int(timestep))
        return (initial,)

    result = sample(unet, schedule, initial, torch.zeros(1, 2, 3), torch.zeros(2, 3), 5, 1.0)
    assert seen == [9, 7, 5, 3, 1]
    signal = np.sqrt(np.cumprod(1 - np.linspace(1e-4, 0.02, 10)))
    clean = initial * (1 - np.sqrt(1 - signal[9] ** 2)) / signal[9]
    torch.testing.assert_close(result, clean.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "linear", "scaled_linear"])
def test_sampling_forgives_a_models_error_unless_the_config_refuses_the_recipe(prediction, schedule):
    """The best model of normal data with standard deviation 0.5, off by a tenth of its target's."""
    betas = DDPMScheduler(beta_schedule=schedule, prediction_type=prediction, clip_sample=False)
    errors = torch.Generator().manual_seed(4)

    def unet(latents, timestep, captions, return_dict):
        signal = betas.alphas_cumprod[timestep]
        variance = 0.25 * signal + (1 - signal)
        added, clean = (1 - signal).sqrt() * latents / variance, signal.sqrt() * 0.25 * latents / variance
        target = added if prediction == "epsilon" else signal.sqrt() * added - (1 - signal).sqrt() * clean
        return (target + 0.1 * torch.randn(latents.shape, generator=errors),)

    spread = sample(unet, betas, noise(20), torch.zeros(20, 2, 3), torch.zeros(2, 3), 25, 1.0).std()
    try:
        Train(prediction=prediction, schedule=schedule)
    except ValueError:
        assert spread > 10
    else:
        assert 0.4 < spread < 0.55
