"""EK-FAC Fisher information (George et al., arXiv 1806.03884; AbU+, arXiv 2511.10721): fit and inverse.

A draw's gradient of a linear layer or convolution is one matrix ``g = Σ_p δ_p a_pᵀ`` over positions p, with the
bias as last column. With ``Q_A`` and ``Q_G`` the eigenvectors of ``E[Σ_p a_p a_pᵀ]`` and ``E[Σ_p δ_p δ_pᵀ]``, the
layer's Fisher information is taken to be diagonal in the basis ``Q_G ⊗ Q_A``, where

    Λ = E[(Q_Gᵀ g Q_A)²]

is the diagonal that fits it best. Every other weight has the diagonal Fisher. Gradients are those of the training
loss (the empirical Fisher), of the same draws as the diagonal Fisher's.

``Q_A`` grows with the square of a layer's inputs. The file of a UNet of 1.2 million weights has 48 MB. For that of
Stable Diffusion 1.5, whose widest convolution has 9 · 2560 = 23,040 inputs and so a ``Q_A`` of 2.1 GB, it would have
39 GB, three times as much would be in memory at the peak of the fit, and the keys and values of cross-attention
would be 0.3 GB of it.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn

from forgetrace.curvature.diagonal import DiagonalFisher, add_squares, damped, fisher_report, require
from forgetrace.curvature.draws import losses_of_draws
from forgetrace.curvature.per_example import from_columns, matrix_layers, record, to_columns
from forgetrace.encoding.store import Encoded

Tensors = dict[str, torch.Tensor]
Batches = Iterable[Callable[[], torch.Tensor]]


def fit_ekfac(
    unet: UNet2DConditionModel, scheduler: DDPMScheduler, encoded: Encoded, draws: int, chunk: int, seed: int
) -> Tensors:
    """Estimate the EK-FAC Fisher of every weight, in two passes over the same draws.

    Args:
        unet: θ0.
        scheduler: its schedule.
        encoded: D.
        draws: number of single-draw gradients.
        chunk: how many share a pass through the model; does not change the result beyond rounding.
        seed: of the draws.

    Returns:
        On the CPU, by name of a layer ``<layer>.Q_A``, (columns, columns), and ``<layer>.Q_G``, (outputs, outputs),
        float32 as the gradients are, and ``<layer>.Lambda``, (outputs, columns), float64 because squares of gradients
        leave float32's range; columns as :meth:`forgetrace.curvature.per_example.Record.positions` orders them.
        Every weight of no such layer has its diagonal Fisher, float64, by its own name.
    """
    batches = (losses_of_draws(unet, scheduler, encoded, draws, chunk, seed, f"EK-FAC, pass {i} of 2") for i in (1, 2))
    bases = eigenvectors(second_moments(unet, next(batches)))
    factors = bases | eigenvalues(unet, bases, next(batches))
    return {name: value.cpu() for name, value in factors.items()}


def second_moments(model: nn.Module, batches: Batches) -> Tensors:
    """Sums over draws of ``Σ_p a_p a_pᵀ`` and ``Σ_p δ_p δ_pᵀ`` by layer: ``<layer>.A`` and ``<layer>.G``, float64."""
    layers, total = matrix_layers(model), {}
    for name, layer in layers.items():
        for side, size in zip("GA", _shape(layer), strict=True):
            total[f"{name}.{side}"] = layer.weight.new_zeros(size, size, dtype=torch.float64)
    for losses in batches:
        recorded = record(model, losses)
        for name in layers:
            for a, delta in recorded.positions(name):
                for side, vectors in (("A", a.flatten(0, 1)), ("G", delta.flatten(0, 1))):
                    total[f"{name}.{side}"] += vectors.mT @ vectors
    return total


def eigenvectors(moments: Mapping[str, torch.Tensor]) -> Tensors:
    """Q_A and Q_G, one eigenvector per column, of the sums of :func:`second_moments`: ``<layer>.Q_A``, float32."""
    bases = {}
    for name, moment in moments.items():
        layer, _, side = name.rpartition(".")
        bases[f"{layer}.Q_{side}"] = torch.linalg.eigh(moment).eigenvectors.float()
    return bases


def eigenvalues(model: nn.Module, bases: Mapping[str, torch.Tensor], batches: Batches) -> Tensors:
    """Λ in given bases, ``<layer>.Lambda``, and the diagonal Fisher of all other weights by name; float64."""
    layers, examples = matrix_layers(model), 0
    own = {name for layer in layers for name in (f"{layer}.weight", f"{layer}.bias")}
    rest = {name: weight for name, weight in model.named_parameters() if name not in own}
    total = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in rest.items()}
    for name, layer in layers.items():
        total[f"{name}.Lambda"] = layer.weight.new_zeros(_shape(layer), dtype=torch.float64)
    for losses in batches:
        recorded = record(model, losses)
        examples += recorded.examples
        for name, _, gradients in recorded.gradients(rest):
            add_squares(total[name], gradients)
        for name, layer in layers.items():
            q_a, q_g = (bases[f"{name}.Q_{side}"].to(layer.weight) for side in "AG")
            for a, delta in recorded.positions(name):
                add_squares(total[f"{name}.Lambda"], _projected(a, delta, q_a, q_g))
    for name in layers:
        _clear_rounding(total[f"{name}.Lambda"])
    return {name: value / examples for name, value in total.items()}


def _shape(layer: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    """Outputs and columns of a layer's gradient matrix."""
    return len(layer.weight), layer.weight[0].numel() + (layer.bias is not None)


def _projected(a: torch.Tensor, delta: torch.Tensor, q_a: torch.Tensor, q_g: torch.Tensor) -> torch.Tensor:
    """``Q_Gᵀ (δᵀ a) Q_A`` of b examples: (b, outputs, columns)."""
    delta = (delta @ q_g).mT
    # Q_A is the largest factor: it multiplies whichever has fewer rows.
    return delta @ (a @ q_a) if a.shape[1] < delta.shape[1] else (delta @ a) @ q_a


def _clear_rounding(total: torch.Tensor) -> None:
    """Set to 0, in place, what float32 cannot tell from it: entries of ε² of their sum, that of all squares."""
    total[total < torch.finfo(torch.float32).eps ** 2 * total.sum()] = 0


class EKFAC:
    """Preconditioning with ``Q_G [(Q_Gᵀ g Q_A) / (Λ + λ)] Q_Aᵀ``, ``λ = damping · mean(Λ)`` of each layer."""

    def __init__(self, factors: Mapping[str, torch.Tensor], damping: float):
        """Args: factors of :func:`fit_ekfac`; damping as a multiple of each layer's mean eigenvalue."""
        self.factors, self.damping = factors, damping

    def precondition(self, gradients: Mapping[str, torch.Tensor]) -> Tensors:
        """(F + λ)⁻¹ g by weight name; a layer's weight or bias that has no gradient counts as 0.

        Raises:
            UserError: without damping, where an eigenvalue is 0; or where there are none for a layer.
        """
        rest = {name: gradient for name, gradient in gradients.items() if name in self.factors}
        result = DiagonalFisher(self.factors, self.damping).precondition(rest)
        layers = {name.rpartition(".")[0]: None for name in gradients if name not in rest}
        require([f"{layer}.Lambda" for layer in layers], self.factors)
        for layer in layers:
            result |= self._of_layer(layer, gradients.get(f"{layer}.weight"), gradients.get(f"{layer}.bias"))
        return {name: result[name] for name in gradients}

    def _of_layer(self, layer: str, weight: torch.Tensor | None, bias: torch.Tensor | None) -> Tensors:
        to = (bias if weight is None else weight).device, torch.float64
        q_a, q_g, values = (self.factors[f"{layer}.{key}"].to(*to) for key in ("Q_A", "Q_G", "Lambda"))
        matrix = torch.zeros_like(values)
        if weight is not None:
            columns = to_columns(weight)
            matrix[:, : columns.shape[1]] = columns
        if bias is not None:
            matrix[:, -1] = bias
        change = q_g @ ((q_g.mT @ matrix @ q_a) / damped(layer, values, self.damping)) @ q_a.mT
        result = {}
        if weight is not None:
            result[f"{layer}.weight"] = from_columns(change[:, : columns.shape[1]], weight.shape).to(weight.dtype)
        if bias is not None:
            result[f"{layer}.bias"] = change[:, -1].to(bias.dtype)
        return result


def ekfac_report(factors: Mapping[str, torch.Tensor], draws: int) -> dict:
    """Draws, zero entries and means of the eigenvalues of each layer and of the Fisher of each other weight."""
    spectra = {name.removesuffix(".Lambda"): value for name, value in factors.items() if ".Q_" not in name}
    return fisher_report(spectra, draws)
