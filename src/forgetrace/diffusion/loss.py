"""The training loss L(z, c; θ) per example, and the target it compares with."""

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel


def noised(scheduler: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor):
    """The noised latents z_t and the target (ε or v, whatever the schedule predicts).

    Args:
        scheduler: the training schedule.
        latents: (B, C, H, W).
        noise: (B, C, H, W).
        timesteps: (B,), int64.

    Returns:
        Two tensors (B, C, H, W).
    """
    inputs = scheduler.add_noise(latents, noise, timesteps)
    if scheduler.config.prediction_type == "v_prediction":
        return inputs, scheduler.get_velocity(latents, noise, timesteps)
    return inputs, noise


def predicted(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    latents: torch.Tensor,
    captions: torch.Tensor,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's output f_θ(z_t, t, c) and its target, (B, C, H, W) each, float32; arguments of example_losses."""
    inputs, target = noised(scheduler, latents, noise, timesteps)
    prediction = unet(inputs, timesteps, encoder_hidden_states=captions, return_dict=False)[0]
    return prediction.float(), target.float()


def example_losses(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    latents: torch.Tensor,
    captions: torch.Tensor,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
    region: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared error over the elements of each example: ``‖target − f_θ(z_t, t, c)‖² / (C·H·W)``.

    With a region only over the elements inside, as :func:`example_means` takes it.

    Args:
        unet: f_θ.
        scheduler: the training schedule.
        latents: z, (B, C, H, W).
        captions: token states, (B, tokens, width).
        timesteps: (B,), int64.
        noise: ε, (B, C, H, W).
        region: weights of the latent positions, (H, W).

    Returns:
        Losses (B,), float32.
    """
    prediction, target = predicted(unet, scheduler, latents, captions, timesteps, noise)
    return example_means((prediction - target).square(), region)


def example_means(values: torch.Tensor, region: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over the elements of each example, (B, C, H, W) -> (B,).

    With a region of weights w, (H, W): ``Σ w · values / (C · Σ w)``.
    """
    if region is None:
        return values.flatten(1).mean(dim=1)
    region = region.to(values)
    return (values * region).flatten(1).sum(dim=1) / (values.shape[1] * region.sum())


def draw_losses(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    latents: torch.Tensor,
    captions: torch.Tensor,
    timesteps: np.ndarray,
    noise: np.ndarray,
    region: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`example_losses` of draws as :mod:`forgetrace.diffusion.noise` makes them, on the model's device."""
    device = next(unet.parameters()).device
    tensors = latents, captions, torch.from_numpy(timesteps), torch.from_numpy(noise)
    return example_losses(unet, scheduler, *(tensor.to(device) for tensor in tensors), region)


@torch.no_grad()
def batched_losses(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    latents: torch.Tensor,
    captions: torch.Tensor,
    timesteps: np.ndarray,
    noise: np.ndarray,
    region: torch.Tensor | None = None,
    batch: int = 128,
) -> np.ndarray:
    """:func:`draw_losses` of n examples, a batch at a time.

    Args:
        unet: f_θ.
        scheduler: the training schedule.
        latents: z, (n, C, H, W).
        captions: token states, (n, tokens, width).
        timesteps: (n,), int64.
        noise: ε, (n, C, H, W), float32.
        region: weights of the latent positions, (H, W).
        batch: examples at once.

    Returns:
        Losses (n,), float64.
    """
    losses = []
    for start in range(0, len(timesteps), batch):
        part = slice(start, start + batch)
        examples = latents[part], captions[part], timesteps[part], noise[part]
        losses.append(draw_losses(unet, scheduler, *examples, region).cpu())
    return torch.cat(losses).double().numpy()
