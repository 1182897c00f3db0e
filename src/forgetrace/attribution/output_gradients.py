"""Projected gradients of an output function of the model, averaged over noised versions of an image.

What the TRAK family differentiates, f_θ being the model's output at one (t, ε), means taken over its elements:

    loss     mean((target − f_θ)²)     TRAK (arXiv 2303.14186), Journey-TRAK (2312.06205)
    square   mean(f_θ²)                D-TRAK (2311.00500)
    mean     mean(f_θ)                 DAS (2410.18639), each gradient divided by its length before the average

DAS does so because the timesteps with the longest gradients would else make up the average.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from forgetrace.attribution.projection import project
from forgetrace.curvature.draws import attention_for_gradients
from forgetrace.curvature.per_example import per_example_gradients
from forgetrace.diffusion.device import pick_device
from forgetrace.diffusion.loss import example_means, predicted
from forgetrace.diffusion.model import load_scheduler, load_unet
from forgetrace.diffusion.subsets import select
from forgetrace.layout import Layout


class Examples(NamedTuple):
    """What a pass of the model is asked, B rows each: arguments of :func:`forgetrace.diffusion.loss.predicted`."""

    latents: torch.Tensor
    captions: torch.Tensor
    timesteps: torch.Tensor
    noise: torch.Tensor


OUTPUTS = {
    "loss": lambda prediction, target: (prediction - target).square(),
    "square": lambda prediction, target: prediction.square(),
    "mean": lambda prediction, target: prediction,
}
OF_UNIT_LENGTH = {"mean"}


class OutputGradients:
    """φ = P · mean over (t, ε) of ∂ output / ∂ weights, under θ0."""

    def __init__(self, layout: Layout, output: str, weights: str, dimension: int, device: str = "auto"):
        """Load θ0.

        Args:
            layout: the experiment; its seed is that of P.
            output: one of ``OUTPUTS``.
            weights: the subset to differentiate by, as :func:`forgetrace.diffusion.subsets.select` takes it.
            dimension: of φ.
            device: where to compute, as :func:`forgetrace.diffusion.device.pick_device` takes it.
        """
        self.layout, self.output, self.dimension = layout, output, dimension
        self.device = pick_device(device)
        self.unet, self.scheduler = load_unet(layout, self.device), load_scheduler(layout)
        self.names = set(select((name for name, _ in self.unet.named_parameters()), weights))

    def mean(
        self,
        latents: torch.Tensor,
        captions: torch.Tensor,
        timesteps: np.ndarray,
        noise: np.ndarray,
        region: torch.Tensor | None = None,
    ) -> np.ndarray:
        """φ of n images, all of them noised by the same w draws of (t, ε).

        Args:
            latents: (n, C, H, W); the config's ``fit.chunk`` or fewer.
            captions: token states, (n, tokens, width).
            timesteps: (w,), int64.
            noise: (w, C, H, W), float32.
            region: weights of the latent positions the output is the mean over, (H, W); by default all alike.

        Returns:
            (n, dimension), float32.
        """
        count, draws = len(latents), len(timesteps)
        width = max(1, self.layout.config.fit.chunk // count)
        total = torch.zeros(count, self.dimension, device=self.device)
        for start in range(0, draws, width):
            some = torch.from_numpy(timesteps[start : start + width]), torch.from_numpy(noise[start : start + width])
            examples = Examples(
                latents.repeat_interleave(len(some[0]), dim=0),
                captions.repeat_interleave(len(some[0]), dim=0),
                some[0].repeat(count),
                some[1].repeat(count, 1, 1, 1),
            )
            total += self.single(examples, region).unflatten(0, (count, -1)).sum(dim=1)
        return (total / draws).cpu().numpy()

    def single(self, examples: Examples, region: torch.Tensor | None = None) -> torch.Tensor:
        """P g of each of B examples, or P g / ‖g‖ where the output asks for it; (B, dimension), float32."""
        examples = Examples(*(tensor.to(self.device) for tensor in examples))
        count = len(examples.timesteps)

        def outputs() -> torch.Tensor:
            with attention_for_gradients():
                prediction, target = predicted(self.unet, self.scheduler, *examples)
            return example_means(OUTPUTS[self.output](prediction, target), region)

        gradients = per_example_gradients(self.unet, outputs, self.names)
        if self.output not in OF_UNIT_LENGTH:
            return project(gradients, count, self.dimension, self.layout.config.seed)
        squares = torch.zeros(count, device=self.device)
        projected = project(_measured(gradients, squares), count, self.dimension, self.layout.config.seed)
        # A gradient of zero stays zero.
        return projected / squares.sqrt().clamp_min(torch.finfo(squares.dtype).tiny)[:, None]


def _measured(
    gradients: Iterator[tuple[str, slice, torch.Tensor]], squares: torch.Tensor
) -> Iterator[tuple[str, slice, torch.Tensor]]:
    """Pass gradients on and add their squared lengths to ``squares``, (B,)."""
    for name, rows, gradient in gradients:
        squares[rows] += torch.linalg.vector_norm(gradient, dim=tuple(range(1, gradient.ndim))).square()
        yield name, rows, gradient
