"""DataInf's approximate inverse of the Fisher information (Kwon et al., arXiv 2310.00902, eq. 5).

Of each weight tensor by itself, the inverse of ``mean_i(g_i g_iᵀ) + λ`` over n draws is replaced by the mean of the
inverses of ``g_i g_iᵀ + λ``, each of which is known in closed form (Sherman and Morrison):

    H⁻¹ v ≈ (1 / (n λ)) Σ_i [ v − g_i (g_iᵀ v) / (λ + ‖g_i‖²) ],    λ = damping · mean over i and entries of g_i²

One g_i is the gradient of a single draw of (image, caption, t, ε), the same as for the diagonal Fisher.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn

from forgetrace.artifacts import UserError
from forgetrace.curvature.draws import losses_of_draws
from forgetrace.curvature.per_example import record
from forgetrace.encoding.store import Encoded

Tensors = dict[str, torch.Tensor]
Batches = Iterable[Callable[[], torch.Tensor]]


def datainf(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    encoded: Encoded,
    gradients: Mapping[str, torch.Tensor],
    draws: int,
    chunk: int,
    seed: int,
    damping: float,
) -> Tensors:
    """H⁻¹ v of several gradients v, in two passes over the draws.

    Args:
        unet: θ0.
        scheduler: its schedule.
        encoded: D.
        gradients: by weight name, (V, *shape).
        draws: n.
        chunk: how many share a pass through the model; does not change the result beyond rounding.
        seed: of the draws.
        damping: λ of each weight tensor over its mean squared gradient.

    Returns:
        By weight name, (V, *shape), float32; zeros of weights that no draw moves.

    Raises:
        UserError: λ is 0, which has no inverse.
    """
    passes = (losses_of_draws(unet, scheduler, encoded, draws, chunk, seed, f"DataInf, pass {i} of 2") for i in (1, 2))
    return inverse_products(unet, passes, gradients, damping)


def inverse_products(
    model: nn.Module, passes: Iterable[Batches], gradients: Mapping[str, torch.Tensor], damping: float
) -> Tensors:
    """The same for any model and any two passes over the same batches of losses."""
    passes = iter(passes)
    vectors = {name: value.flatten(1) for name, value in gradients.items()}
    dots, squares = _dots_and_squares(model, next(passes), vectors)
    result, shares = {}, {}
    for name, v in vectors.items():
        level = damping * squares[name].mean() / v.shape[1]
        if damping > 0 and not squares[name].any():
            level = level + torch.inf
        if not level > 0:
            raise UserError(f"DataInf's λ of {name} is 0: set the method's damping above 0 (0.1 is the default).")
        shares[name] = (dots[name] / (level + squares[name])[:, None] / len(squares[name]) / level).float()
        result[name] = (v / level).float()
    start = 0
    for losses in next(passes):
        recorded = record(model, losses, vectors)
        for name, rows, g in recorded.gradients(vectors):
            share = shares[name][start + rows.start : start + rows.stop]
            result[name] -= share.T @ g.flatten(1)
        start += recorded.examples
    return {name: value.reshape(gradients[name].shape) for name, value in result.items()}


def _dots_and_squares(
    model: nn.Module, batches: Batches, vectors: Mapping[str, torch.Tensor]
) -> tuple[Tensors, Tensors]:
    """g_iᵀ v, (n, V), and ‖g_i‖², (n,), of every weight tensor, float64."""
    dots, squares = {name: [] for name in vectors}, {name: [] for name in vectors}
    for losses in batches:
        for name, _, g in record(model, losses, vectors).gradients(vectors):
            g = g.flatten(1)
            dots[name].append((g @ vectors[name].T).double())
            squares[name].append(g.square().sum(dim=1).double())
    return {n: torch.cat(v) for n, v in dots.items()}, {n: torch.cat(v) for n, v in squares.items()}
