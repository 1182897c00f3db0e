"""Single draws one at a time, each with a backward pass of its own: what the batched fits are checked against."""

from collections.abc import Iterator

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from forgetrace.diffusion.loss import example_losses
from forgetrace.diffusion.model import load_scheduler, load_unet
from forgetrace.diffusion.noise import monte_carlo
from forgetrace.encoding.store import load_encoded
from forgetrace.randomness import generator


def run_draws(layout, unet: UNet2DConditionModel, draws: int) -> Iterator[int]:
    """The numbers of the draws, each after its backward pass."""
    encoded, scheduler = load_encoded(layout), load_scheduler(layout)
    unet.requires_grad_(True)
    timesteps, noise = monte_carlo(5, "fisher", range(draws), 100, (12, 8, 8))
    for i in range(draws):
        row = int(generator(5, "fisher", "image", i).integers(len(encoded)))
        unet.zero_grad()
        example_losses(
            unet,
            scheduler,
            encoded.batch(np.array([row])),
            encoded.captions[encoded.caption_rows[row]][None],
            torch.tensor([timesteps[i]]),
            torch.from_numpy(noise[i])[None],
        ).mean().backward()
        yield i


def draw_gradients(layout, draws: int) -> list[dict[str, torch.Tensor]]:
    """The gradient of every single draw by name of the weight, float64."""
    unet = load_unet(layout, torch.device("cpu"))
    return [
        {name: weight.grad.double().clone() for name, weight in unet.named_parameters()}
        for _ in run_draws(layout, unet, draws)
    ]
