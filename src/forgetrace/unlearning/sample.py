"""The fixed sample of other training images whose loss tells what a step destroys."""

import numpy as np
from diffusers import DDPMScheduler, UNet2DConditionModel

from forgetrace.diffusion.loss import batched_losses
from forgetrace.diffusion.noise import monte_carlo
from forgetrace.encoding.store import Encoded
from forgetrace.randomness import generator

SAMPLE, DRAWS = 256, 4


def others_loss(unet: UNet2DConditionModel, scheduler: DDPMScheduler, encoded: Encoded, seed: int) -> float:
    """Mean loss of up to 256 fixed training images, 4 draws of (t, ε) each.

    Args:
        unet: any model of the experiment.
        scheduler: its schedule.
        encoded: D.
        seed: the experiment's seed; the sample and the draws follow from it.
    """
    order = generator(seed, "others").permutation(len(encoded))[:SAMPLE]
    rows = np.tile(np.sort(order), DRAWS)
    length, shape = scheduler.config.num_train_timesteps, encoded.latents.shape[1:]
    timesteps, noise = monte_carlo(seed, "others", range(len(rows)), length, shape)
    examples = encoded.examples(rows, encoded.picks(seed, "others", range(len(rows))))
    return float(batched_losses(unet, scheduler, *examples, timesteps, noise).mean())
