"""Gradients of queries as directions, and the pass over D that multiplies every training gradient with them."""

from pathlib import Path

import numpy as np
import torch

from forgetrace.attribution.inner_products import inner_products
from forgetrace.attribution.resumable import resumable
from forgetrace.config import Variant
from forgetrace.curvature.datainf import datainf
from forgetrace.curvature.draws import attention_for_gradients, losses_for_gradients
from forgetrace.diffusion.device import pick_device
from forgetrace.diffusion.model import load_scheduler, load_unet, load_weights
from forgetrace.diffusion.noise import NoiseBank, spaced_timesteps
from forgetrace.diffusion.subsets import select
from forgetrace.encoding.store import load_encoded
from forgetrace.layout import Layout
from forgetrace.progress import progress
from forgetrace.unlearning.step import Query, Weights, query_gradient
from forgetrace.unlearning.variants import load_curvature, read_query

HELD = 2**32  # bytes of directions
DRAWS = Variant.model_fields["draws"].default  # of (t, ε) for a query's gradient, as an unlearning step takes it


class Gradients:
    """A model of an experiment whose gradients on queries and training images are compared."""

    def __init__(self, layout: Layout, weights: str, timesteps: int, device: str = "auto"):
        """Args: the experiment; the subset of weights that count; timesteps each training gradient averages over."""
        self.layout, self.seed = layout, layout.config.seed
        self.encoded, self.scheduler = load_encoded(layout), load_scheduler(layout)
        self.unet = load_unet(layout, pick_device(device))
        self.names = select([name for name, _ in self.unet.named_parameters()], weights)
        self.shape = tuple(self.encoded.latents.shape[1:])
        self.timesteps = spaced_timesteps(timesteps, self.scheduler.config.num_train_timesteps)
        self.known: dict[tuple[str, int], Weights] = {}  # gradients that several settings of a method ask for

    def at_once(self) -> int:
        """Of how many queries the directions are held at once."""
        weights = dict(self.unet.named_parameters())
        return max(1, HELD // sum(weights[name].nbytes for name in self.names))

    def load(self, weights: str) -> None:
        """Go to other weights of the same architecture."""
        load_weights(self.unet, weights)
        self.known.clear()

    def products(self, directions: Weights, partial: Path, what: str) -> np.ndarray:
        """⟨g, v⟩ and ‖g‖² of every training image and timestep; (N, T, V + 1), float32.

        Args:
            directions: by weight name, (V, *shape).
            partial: keeps what was found, until the caller deletes it.
            what: for the progress bar.
        """
        bank = NoiseBank(self.seed, "scan", self.timesteps, self.shape)
        width = len(next(iter(directions.values()))) + 1
        found = resumable(partial, (len(self.encoded), len(self.timesteps), width))
        there = int((~np.isnan(found[:, :, -1])).sum())
        with progress(total=found.shape[0] * found.shape[1], unit="gradient", what=what, done=there) as bar:
            chunk = self.layout.config.fit.chunk
            inner_products(self.unet, self.scheduler, self.encoded, bank, directions, found, bar.update, chunk)
        return found

    def of_queries(self, queries: list[str], noises: int, unit_length: bool) -> Weights:
        """Mean over timesteps of each query's gradient, that of a timestep being a mean over noises.

        Args:
            queries: V of them.
            noises: at each timestep.
            unit_length: scale the gradient of every timestep to length 1, over all weights that count.
        """
        return _stack([self._by_timestep(read_query(self.layout, query), noises, unit_length) for query in queries])

    def preconditioned(self, queries: list[str], curvature: str, damping: float, draws: int | None = None) -> Weights:
        """(F + λ)⁻¹ ∇L(ẑ) / N of each query: an unlearning step by its step size; draws, by default those of one."""
        inverse = load_curvature(self.layout, curvature, damping)
        gradients = [inverse.precondition(self._gradient(query, draws or DRAWS)) for query in queries]
        return {name: vectors / len(self.encoded) for name, vectors in _stack(gradients).items()}

    def datainf(self, queries: list[str], damping: float) -> Weights:
        """DataInf's H⁻¹ ∇L(ẑ) of each query."""
        settings = self.layout.config.fit
        gradients = _stack([self._gradient(query) for query in queries])
        return datainf(
            self.unet, self.scheduler, self.encoded, gradients, settings.draws, settings.chunk, self.seed, damping
        )

    def _gradient(self, query: str, draws: int = DRAWS) -> Weights:
        if (query, draws) not in self.known:
            target = read_query(self.layout, query)
            with attention_for_gradients():  # as the gradients of training images
                gradient = query_gradient(self.unet, self.scheduler, target, self.names, range(draws), self.seed)
            self.known[query, draws] = gradient
        return self.known[query, draws]

    def _by_timestep(self, query: Query, noises: int, unit_length: bool) -> Weights:
        bank = NoiseBank(self.seed, f"query {query.drawn_as}", np.repeat(self.timesteps, noises), self.shape)
        noise = bank.draws()
        weights = {name: weight.requires_grad_(name in self.names) for name, weight in self.unet.named_parameters()}
        wanted = [weights[name] for name in self.names]
        total = [torch.zeros_like(weight) for weight in wanted]
        for i, timestep in enumerate(self.timesteps):
            loss = losses_for_gradients(
                self.unet,
                self.scheduler,
                query.latent.expand(noises, -1, -1, -1),
                query.prompt.expand(noises, -1, -1),
                np.full(noises, timestep),
                noise[i * noises : (i + 1) * noises],
                query.region,
            ).mean()
            gradients = torch.autograd.grad(loss, wanted)
            norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt() if unit_length else 1
            for sum_, gradient in zip(total, gradients, strict=True):
                sum_ += gradient / norm
        self.unet.requires_grad_(False)
        return {name: value / len(self.timesteps) for name, value in zip(self.names, total, strict=True)}


def _stack(gradients: list[Weights]) -> Weights:
    """One gradient per query -> by weight name, (queries, *shape)."""
    return {name: torch.stack([gradient[name] for gradient in gradients]) for name in gradients[0]}
