"""Forward-INF (Mirrored Influence, arXiv 2402.08922): gradient ascent on the query's loss by Adam, without a Fisher.

Influence is taken to be mutual: the images whose loss rises when the model is trained away from the query are those
without which it could not have made it. With g = ∇L(ẑ, ĉ; θ) of fresh draws, step k of Adam is

    m ← 0.9 m + 0.1 g,   v ← 0.999 v + 0.001 g²,   θ ← θ + α · m/(1 − 0.9ᵏ) / (√(v/(1 − 0.999ᵏ)) + 1e-8),

so that the first moves every weight by α along the sign of its gradient. The authors' notebook ranks training images
by |ΔL|; here the score is the signed difference, as for every variant.
"""

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from forgetrace.unlearning.step import Course, Query, Weights, ascend


def unlearn_by_adam(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    query: Query,
    names: list[str],
    rate: float,
    course: Course,
    seed: int,
) -> Weights:
    """Take Adam's steps up the query's loss, in place.

    Args:
        unet: θ0; holds θ_Q afterwards.
        scheduler: its schedule.
        query: the image to forget.
        names: weights that may change.
        rate: α, the learning rate.
        course: the steps.
        seed: the experiment's seed.

    Returns:
        The changed weights.
    """
    weights = dict(unet.named_parameters())
    adam = torch.optim.Adam([weights[name] for name in names], lr=rate, maximize=True)

    def step(gradient: Weights, number: int) -> None:
        for name, value in gradient.items():
            weights[name].grad = value
        adam.step()
        adam.zero_grad()

    return ascend(unet, scheduler, query, names, course, seed, step)
