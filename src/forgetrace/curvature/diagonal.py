"""Diagonal Fisher information (AbU, arXiv 2406.09408, eq. 4): fit and inverse.

``F_w = E[(∂L(z, c; t, ε)/∂w)²]``: the mean over draws of the squared gradient of a **single** draw
(one image, its caption, one t, one ε). Squaring the gradient of a batch mean would be a different
and wrong quantity. Sums are kept in float64.
"""

from collections.abc import Container, Iterable, Mapping

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from forgetrace.artifacts import UserError
from forgetrace.curvature.draws import losses_of_draws
from forgetrace.curvature.per_example import per_example_gradients
from forgetrace.encoding.store import Encoded


def fit_fisher(
    unet: UNet2DConditionModel, scheduler: DDPMScheduler, encoded: Encoded, draws: int, chunk: int, seed: int
) -> dict[str, torch.Tensor]:
    """Estimate the diagonal Fisher of every weight.

    Args:
        unet: θ0.
        scheduler: its schedule.
        encoded: D.
        draws: number of single-draw gradients.
        chunk: how many share a pass through the model; does not change the result beyond rounding.
        seed: of the draws.

    Returns:
        By weight name, the weight's shape, float64, on the CPU.
    """
    total = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in unet.named_parameters()}
    for losses in losses_of_draws(unet, scheduler, encoded, draws, chunk, seed, "Fisher"):
        for name, _, gradients in per_example_gradients(unet, losses):
            add_squares(total[name], gradients)
    return {name: (value / draws).cpu() for name, value in total.items()}


def add_squares(total: torch.Tensor, gradients: torch.Tensor) -> None:
    """Add the squares of b gradients, (b, *shape), which they overwrite, to a sum in float64, in place."""
    # Squares cannot cancel, so a sum of this few in float32 is as accurate as the gradients are.
    squares = gradients.square_()
    # Given where to, sum follows the layout in memory, which for convolutions is not the shape's.
    total += torch.sum(squares, dim=0, out=torch.empty_like(squares[0]))


class DiagonalFisher:
    """Preconditioning with ``1 / (F + λ)``, ``λ = damping · mean(F)`` of each weight tensor."""

    def __init__(self, fisher: Mapping[str, torch.Tensor], damping: float):
        """Args: fisher by weight name, float64; damping as a multiple of each tensor's mean entry."""
        self.fisher, self.damping = fisher, damping

    def precondition(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """(F + λ)⁻¹ g by weight name.

        Raises:
            UserError: without damping, where a Fisher entry is 0; or where there is none for a weight.
        """
        require(gradients, self.fisher)
        result = {}
        for name, gradient in gradients.items():
            fisher = damped(name, self.fisher[name].to(gradient.device), self.damping)
            result[name] = (gradient.double() / fisher).to(gradient.dtype)
        return result


def require(names: Iterable[str], fisher: Container[str]) -> None:
    """Refuse weights a Fisher information says nothing of; an estimated one has all, a published one perhaps not.

    Raises:
        UserError: names the first such weight.
    """
    if missing := next((name for name in names if name not in fisher), None):
        raise UserError(
            f"The Fisher information (fit.given) says nothing of the weights {missing}: choose weights that it has, "
            "such as weights: cross-attn-kv, or remove fit.given to estimate it."
        )


def damped(name: str, fisher: torch.Tensor, damping: float) -> torch.Tensor:
    """F + λ with λ = damping · mean(F); infinite where no draw moves any of the weights, which then stay.

    Such are the queries and keys of self-attention over a single position.

    Raises:
        UserError: an entry is 0 without damping; names the weights.
    """
    if damping > 0 and not fisher.any():
        return torch.full_like(fisher, torch.inf)
    result = fisher + damping * fisher.mean()
    if zeros := int((result == 0).sum()):
        raise UserError(
            f"The Fisher information of {name} has {zeros} zero entries, so the step is infinite: "
            "set the variant's damping above 0 (0.1 is the default)."
        )
    return result


def fisher_report(fisher: Mapping[str, torch.Tensor], draws: int) -> dict:
    """Draws, zero entries and means, in total and for each weight tensor."""
    tensors = {
        name: {"entries": value.numel(), "zeros": int((value == 0).sum()), "mean": float(value.mean())}
        for name, value in fisher.items()
    }
    totals = {key: sum(entry[key] for entry in tensors.values()) for key in ("entries", "zeros")}
    return {"draws": draws, **totals, "tensors": tensors}
