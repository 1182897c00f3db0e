"""What a UNet makes of nearly clean images inside, as channel statistics (IntroStyle, arXiv 2412.14432).

A latent is noised to one timestep, the output of one up block read off, averaged over a few noises, and described by
the mean and the standard deviation of every channel over the positions.
"""

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from forgetrace.diffusion.noise import NoiseBank

BATCH = 256  # UNet evaluations at once


def middle_up_block(unet: UNet2DConditionModel) -> int:
    """Number of the up block that is read: 1 of Stable Diffusion's four as in the paper, 0 of two."""
    return (len(unet.up_blocks) - 1) // 2


@torch.no_grad()
def channel_statistics(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    latents: torch.Tensor,
    caption: torch.Tensor,
    bank: NoiseBank,
    block: int,
) -> np.ndarray:
    """Means, then standard deviations, of the channels of an up block's output.

    Args:
        unet: the model, as :func:`forgetrace.diffusion.inference.for_inference` returns it.
        scheduler: its schedule.
        latents: (n, C, H, W).
        caption: token states (tokens, width), the same for all.
        bank: the noises to average over with their timestep, shared by all images.
        block: number of the up block, of c channels.

    Returns:
        (n, 2c), float32.
    """
    device, draws = next(unet.parameters()).device, len(bank.timesteps)
    noise, timesteps = torch.from_numpy(bank.draws()).to(device), torch.from_numpy(bank.timesteps).to(device)
    seen = []
    hook = unet.up_blocks[block].register_forward_hook(lambda module, inputs, output: seen.append(output))
    rows = []
    try:
        for part in latents.split(max(1, BATCH // draws)):
            t = timesteps.repeat(len(part))
            noised = scheduler.add_noise(
                part.to(device).repeat_interleave(draws, dim=0), noise.repeat(len(part), 1, 1, 1), t
            )
            unet(noised, t, encoder_hidden_states=caption[None].to(device))
            maps = seen.pop().float().unflatten(0, (len(part), draws)).mean(dim=1)
            rows.append(moments(maps).cpu())
    finally:
        hook.remove()
    return torch.cat(rows).numpy()


def moments(maps: torch.Tensor) -> torch.Tensor:
    """Means, then standard deviations (of the population), over positions; (n, c, H, W) -> (n, 2c)."""
    flat = maps.flatten(2)
    return torch.cat([flat.mean(dim=2), flat.std(dim=2, correction=0)], dim=1)
