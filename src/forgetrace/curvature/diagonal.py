"""Diagonal Fisher information (AbU, arXiv 2406.09408, eq. 4): fit and inverse.

``F_w = E[(∂L(z, c; t, ε)/∂w)²]``: the mean over draws of the squared gradient of a **single** draw
(one image, its caption, one t, one ε). Squaring the gradient of a batch mean would be a different
and wrong quantity. Sums are kept in float64.
"""

import functools
from collections.abc import Mapping

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from forgetrace.artifacts import UserError
from forgetrace.curvature.per_example import per_example_gradients
from forgetrace.diffusion.loss import example_losses
from forgetrace.diffusion.noise import monte_carlo
from forgetrace.encoding.store import Encoded
from forgetrace.progress import progress
from forgetrace.randomness import generator

PURPOSE = "fisher"


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
    device = next(unet.parameters()).device
    total = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in unet.named_parameters()}
    with progress(total=draws, unit="draw", what="Fisher") as bar:
        for start in range(0, draws, chunk):
            numbers = range(start, min(start + chunk, draws))
            losses = functools.partial(_losses, unet, scheduler, *_draw(encoded, scheduler, numbers, seed, device))
            for name, _, gradients in per_example_gradients(unet, losses):
                # Squares cannot cancel, so a sum of this few in float32 is as accurate as the gradients are.
                squares = gradients.square_()
                # Given where to, sum follows the layout in memory, which for convolutions is not the shape's.
                total[name] += torch.sum(squares, dim=0, out=torch.empty_like(squares[0]))
            bar.update(len(numbers))
    return {name: (value / draws).cpu() for name, value in total.items()}


def _draw(encoded: Encoded, scheduler: DDPMScheduler, numbers: range, seed: int, device: torch.device):
    """The numbered draws: latents, token states, timesteps and noise."""
    rows = np.array([int(generator(seed, PURPOSE, "image", i).integers(len(encoded))) for i in numbers])
    length, shape = scheduler.config.num_train_timesteps, tuple(encoded.latents.shape[1:])
    timesteps, noise = monte_carlo(seed, PURPOSE, numbers, length, shape)
    captions = encoded.captions[encoded.caption_rows[torch.from_numpy(rows)]]
    examples = encoded.batch(rows), captions, torch.from_numpy(timesteps), torch.from_numpy(noise)
    return tuple(tensor.to(device) for tensor in examples)


def _losses(*arguments) -> torch.Tensor:
    # Where attention is saturated, its gradients are small differences that the fused kernels lose.
    with sdpa_kernel(SDPBackend.MATH):
        return example_losses(*arguments)


class DiagonalFisher:
    """Preconditioning with ``1 / (F + λ)``, ``λ = damping · mean(F)`` of each weight tensor."""

    def __init__(self, fisher: Mapping[str, torch.Tensor], damping: float):
        """Args: fisher by weight name, float64; damping as a multiple of each tensor's mean entry."""
        self.fisher, self.damping = fisher, damping

    def precondition(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """(F + λ)⁻¹ g by weight name.

        Raises:
            UserError: without damping, where a Fisher entry is 0.
        """
        result = {}
        for name, gradient in gradients.items():
            fisher = self.fisher[name].to(gradient.device)
            damped = fisher + self.damping * fisher.mean()
            if zeros := int((damped == 0).sum()):
                raise UserError(
                    f"The Fisher information of {name} has {zeros} zero entries, so the step is infinite: "
                    "set the variant's damping above 0 (0.1 is the default)."
                )
            result[name] = (gradient.double() / damped).to(gradient.dtype)
        return result


def fisher_report(fisher: Mapping[str, torch.Tensor], draws: int) -> dict:
    """Draws, zero entries and means, in total and for each weight tensor."""
    tensors = {
        name: {"entries": value.numel(), "zeros": int((value == 0).sum()), "mean": float(value.mean())}
        for name, value in fisher.items()
    }
    totals = {key: sum(entry[key] for entry in tensors.values()) for key in ("entries", "zeros")}
    return {"draws": draws, **totals, "tensors": tensors}
