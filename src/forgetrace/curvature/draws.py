"""The draws a Fisher information is the mean over: one image, one of its views, one t and one ε each."""

import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from forgetrace.diffusion.loss import draw_losses
from forgetrace.diffusion.noise import monte_carlo
from forgetrace.encoding.store import Encoded
from forgetrace.progress import progress
from forgetrace.randomness import generator

PURPOSE = "fisher"


def losses_of_draws(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    encoded: Encoded,
    draws: int,
    chunk: int,
    seed: int,
    what: str,
) -> Iterator[Callable[[], torch.Tensor]]:
    """Functions that each compute the training losses of the next ``chunk`` draws.

    Args:
        unet: θ0.
        scheduler: its schedule.
        encoded: D.
        draws: number of draws; each is a function of the seed and its own number.
        chunk: how many share a pass through the model.
        seed: of the draws.
        what: named beside the progress.

    Yields:
        A function without arguments that returns the losses, (at most chunk,).
    """
    with progress(total=draws, unit="draw", what=what) as bar:
        for start in range(0, draws, chunk):
            numbers = range(start, min(start + chunk, draws))
            examples = training_draws(scheduler, encoded, numbers, seed, PURPOSE)
            yield functools.partial(losses_for_gradients, unet, scheduler, *examples)
            bar.update(len(numbers))


def training_draws(scheduler: DDPMScheduler, encoded: Encoded, numbers: range, seed: int, purpose: str):
    """The numbered draws from D, each a function of the seed, the purpose and its own number.

    Returns:
        Latents, token states, timesteps and noise, as :func:`forgetrace.diffusion.loss.draw_losses` takes them.
    """
    rows = np.array([int(generator(seed, purpose, "image", i).integers(len(encoded))) for i in numbers])
    length, shape = scheduler.config.num_train_timesteps, tuple(encoded.latents.shape[1:])
    timesteps, noise = monte_carlo(seed, purpose, numbers, length, shape)
    return *encoded.examples(rows, encoded.picks(seed, purpose, numbers)), timesteps, noise


def losses_for_gradients(*arguments) -> torch.Tensor:
    """:func:`forgetrace.diffusion.loss.draw_losses` for a backward pass that tells the examples apart."""
    with attention_for_gradients():
        return draw_losses(*arguments)


def attention_for_gradients():
    """A context: where attention is saturated, its gradients are small differences that the fused kernels lose."""
    return sdpa_kernel(SDPBackend.MATH)
