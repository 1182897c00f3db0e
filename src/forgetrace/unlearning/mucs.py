"""Mirrored unlearning (MUCS, arXiv 2605.17938): train on, and away from the query until it is as good as unknown.

From θ0, AdamW minimises on batches of draws

    mean L(z, c; θ) − 0.2 · mean min(L(ẑ, ĉ; θ), L_null),

z from D, the minimum taken draw by draw: a draw whose loss is above L_null pulls no further. L_null is the loss of an
untrained model on the query. The end is reached when the mean of the minima is 0.95 · L_null. Captions are never
dropped: the scan asks with captions only.

The paper scores with 100 shared noises, the higher ones of a grid of 142 levels. Here the experiment's own scan
serves every variant: evenly spaced timesteps, the lowest among them.
"""

import logging

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from forgetrace.config import Train
from forgetrace.curvature.draws import training_draws
from forgetrace.diffusion.loss import draw_losses
from forgetrace.diffusion.model import build_unet, frozen
from forgetrace.encoding.store import Encoded
from forgetrace.unlearning.step import Query, Weights, current, query_draws, query_loss

FORGET, BOUND, DECAY = 0.2, 0.95, 0.01
PURPOSE = "retain"
log = logging.getLogger(__name__)


def untrained_loss(recipe: Train, scheduler: DDPMScheduler, query: Query, seed: int, device: torch.device) -> float:
    """L_null: mean loss on the query, over (t, ε), of a model with θ0's architecture and fresh weights.

    The mean is over draws of the query, not of D, whose images may be easier or harder to an untrained model: its loss
    is about the mean square of the target, and that of v follows the image (.56 and .94 for two digits).

    Args:
        recipe: the architecture.
        scheduler: θ0's schedule.
        query: the image to forget.
        seed: the experiment's seed, from which the training of θ0 started too.
        device: where to compute.
    """
    untrained = build_unet(recipe, tuple(query.latent.shape), query.prompt.shape[-1], seed)
    return query_loss(frozen(untrained, device), scheduler, query, seed)


def unlearn_mirrored(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    query: Query,
    encoded: Encoded,
    null: float,
    names: list[str],
    rate: float,
    steps: int,
    batch: int,
    seed: int,
) -> Weights:
    """Train on until the query's bounded loss is nearly L_null, in place; warn where the steps end before.

    Args:
        unet: θ0, in evaluation mode; holds θ_Q afterwards.
        scheduler: its schedule.
        query: the image to forget.
        encoded: D.
        null: L_null.
        names: weights that may change.
        rate: AdamW's learning rate.
        steps: number of steps at most.
        batch: draws per step of the query, and as many of training images.
        seed: the experiment's seed.

    Returns:
        The changed weights.
    """
    weights = dict(unet.named_parameters())
    trained = [weights[name].requires_grad_() for name in names]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=DECAY)
    for step in range(steps):
        numbers = range(step * batch, (step + 1) * batch)
        forget = bounded(draw_losses(unet, scheduler, *query_draws(scheduler, query, numbers, seed)), null)
        if forget >= BOUND * null:
            if step == 0:
                log.warning(
                    "θ0 knows no more of %s than an untrained model: nothing was unlearned, all its scores are 0.",
                    query.name,
                )
            break
        retain = draw_losses(unet, scheduler, *training_draws(scheduler, encoded, numbers, seed, PURPOSE)).mean()
        (retain - FORGET * forget).backward()
        optimizer.step()
        optimizer.zero_grad()
    else:
        log.warning(
            "Unlearning %s ended after %d steps with a bounded loss of %.3g, below %g of an untrained model's %.3g: "
            "raise the variant's steps or step_size.",
            query.name,
            steps,
            forget.item(),
            BOUND,
            null,
        )
    unet.requires_grad_(False)
    return current(unet, names)


def bounded(losses: torch.Tensor, null: float) -> torch.Tensor:
    """Mean of min(L, L_null) over draws (B,), each bounded by itself: those above L_null have no gradient."""
    return losses.clamp(max=null).mean()
