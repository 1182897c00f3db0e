"""Inner products of the gradients of training images with given directions, in one pass over D.

A gradient of all weights is as large as the model, so none is kept: each is multiplied with every direction, weight
by weight, as :meth:`forgetrace.curvature.per_example.Record.gradients` yields it. Directions for many queries
cost little more than those for one.
"""

import functools
from collections.abc import Callable, Mapping

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from forgetrace.curvature.draws import losses_for_gradients
from forgetrace.curvature.per_example import record
from forgetrace.diffusion.noise import NoiseBank
from forgetrace.encoding.store import Encoded


def inner_products(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    encoded: Encoded,
    bank: NoiseBank,
    directions: Mapping[str, torch.Tensor],
    found: np.ndarray,
    done: Callable[[int], object] = lambda gradients: None,
    batch: int = 100,
) -> None:
    """Fill in, for the gradient g of every image at every draw, ⟨g, v⟩ for each direction v, and ‖g‖².

    Args:
        unet: θ at which to differentiate.
        scheduler: its schedule.
        encoded: D.
        bank: T draws of (t, ε).
        directions: by weight name, (V, *shape of the weight); other weights do not count.
        found: (N, T, V + 1), float32, NaN where missing; filled in place. The last column holds ‖g‖².
        done: told, as they come, how many gradients there are more.
        batch: gradients at once; does not change the result beyond rounding.
    """
    device = next(unet.parameters()).device
    flat = {name: vectors.to(device).flatten(1) for name, vectors in directions.items()}
    # A draw whose squared norm is there is complete: it is written with the row.
    missing = np.argwhere(np.isnan(found[:, :, -1]))
    for start in range(0, len(missing), batch):
        rows, draws = missing[start : start + batch].T
        losses = _losses_of(unet, scheduler, encoded, bank, rows, draws)
        found[rows, draws] = products(unet, losses, flat).cpu().numpy()
        done(len(rows))


def products(
    model: torch.nn.Module, losses: Callable[[], torch.Tensor], flat: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """⟨g_b, v⟩ for every loss b and direction v, and ‖g_b‖² behind them; (B, V + 1), float32.

    Args:
        model: the model.
        losses: computes the losses (B,), as for :func:`forgetrace.curvature.per_example.record`.
        flat: directions by weight name, (V, numbers of the weight).
    """
    recorded, width = record(model, losses, flat), len(next(iter(flat.values()))) + 1
    result = torch.zeros(recorded.examples, width, device=next(model.parameters()).device)
    for name, rows, gradients in recorded.gradients(flat):
        gradients = gradients.flatten(1)
        result[rows, :-1] += gradients @ flat[name].T
        result[rows, -1] += gradients.square().sum(dim=1)
    return result


def _losses_of(unet, scheduler, encoded: Encoded, bank: NoiseBank, rows: np.ndarray, draws: np.ndarray):
    """A function that computes the losses of the given (image, draw) pairs."""
    ids = [encoded.image_ids[row] for row in rows]
    # One view for each draw of an image: on average over draws all of them count.
    picks = encoded.picks(bank.seed, bank.purpose, list(zip(ids, draws.tolist(), strict=True)))
    examples = *encoded.examples(rows, picks), bank.timesteps[draws], bank.of(ids, draws[:, None])
    return functools.partial(losses_for_gradients, unet, scheduler, *examples)
