"""Diagonal Fisher information (AbU, arXiv 2406.09408, eq. 4): fit and inverse.

``F_w = E[(∂L(z, c; t, ε)/∂w)²]``: the mean over draws of the squared gradient of a **single** draw
(one image, its caption, one t, one ε). Squaring the gradient of a batch mean would be a different
and wrong quantity. Sums are kept in float64.
"""

from collections.abc import Callable, Mapping

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from forgetrace.artifacts import UserError
from forgetrace.diffusion.loss import noised
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
        chunk: how many are held in memory at once; does not change the result beyond rounding.
        seed: of the draws.

    Returns:
        By weight name, the weight's shape, float64, on the CPU.
    """
    device = next(unet.parameters()).device
    weights = {name: weight.detach() for name, weight in unet.named_parameters()}
    total = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
    gradients = per_example_gradients(unet)
    captions = encoded.captions.to(device)
    with progress(total=draws, unit="draw", what="Fisher") as bar:
        for start in range(0, draws, chunk):
            numbers = range(start, min(start + chunk, draws))
            rows, inputs, target, timesteps = _draw(encoded, scheduler, numbers, seed, device)
            states = captions[encoded.caption_rows[rows].to(device)]
            # vmap has no rule for the fused attention kernels and would loop over the examples.
            with sdpa_kernel(SDPBackend.MATH):
                stacked = gradients(weights, inputs, timesteps, states, target)
            for name, gradient in stacked.items():
                total[name] += gradient.square().sum(dim=0, dtype=torch.float64)
            bar.update(len(numbers))
    return {name: (value / draws).cpu() for name, value in total.items()}


def _draw(encoded: Encoded, scheduler: DDPMScheduler, numbers: range, seed: int, device: torch.device):
    """Images of the numbered draws, with their noised latents, targets and timesteps."""
    rows = torch.tensor([int(generator(seed, PURPOSE, "image", i).integers(len(encoded))) for i in numbers])
    timesteps, noise = monte_carlo(
        seed, PURPOSE, numbers, scheduler.config.num_train_timesteps, encoded.latents.shape[1:]
    )
    timesteps = torch.from_numpy(timesteps).to(device)
    latents = encoded.batch(rows.numpy()).to(device)
    inputs, target = noised(scheduler, latents, torch.from_numpy(noise).to(device), timesteps)
    return rows, inputs, target, timesteps


def per_example_gradients(unet: UNet2DConditionModel) -> Callable[..., dict[str, torch.Tensor]]:
    """A function from (weights, inputs, timesteps, token states, targets) to stacked gradients.

    Its arguments are batches (B, …); its result has a leading B on every weight's shape.
    """

    def loss(weights, latent, timestep, states, target):
        prediction = functional_call(
            unet, weights, (latent[None], timestep[None]), {"encoder_hidden_states": states[None]}
        ).sample
        return (prediction - target[None]).square().mean()

    return vmap(grad(loss), in_dims=(None, 0, 0, 0, 0))


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
