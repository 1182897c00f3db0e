"""Deterministic DDIM sampling with optional classifier-free guidance."""

from collections.abc import Iterator

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel,
    schedule: DDPMScheduler,
    initial_noise: torch.Tensor,
    captions: torch.Tensor,
    empty: torch.Tensor,
    steps: int,
    guidance: float,
) -> torch.Tensor:
    """Generate latents from their initial noise.

    Args:
        unet: the model.
        schedule: its training schedule.
        initial_noise: (B, C, H, W).
        captions: token states of the prompts, (B, tokens, width).
        empty: token states of the empty caption, (tokens, width); used when ``guidance`` is not 1.
        steps: DDIM steps.
        guidance: scale w of ``f(∅) + w (f(c) − f(∅))``.

    Returns:
        Latents (B, C, H, W), float32.
    """
    for _, _, reached in trajectory(unet, schedule, initial_noise, captions, empty, steps, guidance):
        latents = reached
    return latents.float()


@torch.no_grad()
def trajectory(
    unet: UNet2DConditionModel,
    schedule: DDPMScheduler,
    initial_noise: torch.Tensor,
    captions: torch.Tensor,
    empty: torch.Tensor,
    steps: int,
    guidance: float,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """The steps of :func:`sample`, with its arguments.

    Yields:
        Timestep t, the clean latents x̂₀ that the (guided) model makes out at z_t, and the next, less noisy latents.
    """
    # Trailing spacing starts at the last timestep, where training's noise is pure too.
    sampler = DDIMScheduler.from_config(schedule.config, timestep_spacing="trailing", clip_sample=False)
    sampler.set_timesteps(steps, device=initial_noise.device)
    latents = initial_noise
    for timestep in sampler.timesteps:
        prediction = unet(latents, timestep, captions, return_dict=False)[0]
        if guidance != 1:
            unconditional = unet(latents, timestep, empty.expand_as(captions), return_dict=False)[0]
            prediction = unconditional + guidance * (prediction - unconditional)
        latents, estimate = sampler.step(prediction, timestep, latents, return_dict=False)
        yield int(timestep), estimate, latents
