"""The TRAK family: whitened inner products of projected gradients, τ = φ(q)ᵀ (ΦᵀΦ + λI)⁻¹ φ(z).

A training image's φ is kept by the ``fit`` stage (:mod:`forgetrace.attribution.gradient_features`), a query's is
computed by the same code at the same timesteps, with its own noises. The methods differ in what is differentiated.

Signs. TRAK and Journey-TRAK differentiate the loss: leaving z out moves the weights by about +H⁻¹∇L(z)/N, which
changes the query's loss by ∇L(q)ᵀH⁻¹∇L(z)/N; τ is positive where that is a rise. D-TRAK and DAS differentiate
something else, so their τ says no such thing: the sign is that of the inner product, as their papers rank by it.
"""

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from forgetrace.artifacts import UserError, read_arrays
from forgetrace.attribution.contract import Features, Together
from forgetrace.attribution.gradient_features import GradientFeatures, TrainingLosses
from forgetrace.config import Config
from forgetrace.diffusion.noise import NoiseBank, spaced_timesteps

if TYPE_CHECKING:
    from forgetrace.attribution.output_gradients import OutputGradients

TIMESTEPS, DIMENSION = 10, 4096
# Without damping the directions in which training images hardly differ, noise all of them, would decide. Like any
# setting it is to be chosen on tuning queries (forgetrace tune).
DAMPING = 0.1


class Trak(Together):
    """TRAK (arXiv 2303.14186) with one model; the gradient of the loss, as AbU and D-TRAK compare with it."""

    summary = "projected gradients of the loss, whitened by those of all training images (TRAK)"
    reads = frozenset({"weights", "timesteps", "noises", "dimension", "damping"})
    output: ClassVar[str] = "loss"
    noises: ClassVar[int] = 10  # per timestep of a query

    @property
    def gradients(self) -> GradientFeatures:
        """φ of the training images."""
        options = self.options
        return GradientFeatures(
            self.layout,
            self.output,
            options.weights or "all",
            options.timesteps or TIMESTEPS,
            options.dimension or DIMENSION,
            self.device,
        )

    def features(self) -> list[Features]:
        """The projected gradients of the training images."""
        return [self.gradients]

    def inputs(self, query: str) -> list[str]:
        """The features, θ0 and the query's tensors."""
        layout = self.layout
        own = [layout.features(needed.name) for needed in self.features()]
        return [*own, *layout.model_files, layout.query(query)["tensors"]]

    def scores_of(self, queries: list[str]) -> dict[str, np.ndarray]:
        """τ of all training images for each query."""
        from forgetrace.attribution.kernel import kernel_scores

        source = self.gradients.source()
        rows = np.stack([self.of_query(source, read_arrays(self.layout.query(query)["tensors"])) for query in queries])
        training = self.gradients.kept()
        damping = DAMPING if self.options.damping is None else self.options.damping
        return dict(zip(queries, kernel_scores(training, rows, damping), strict=True))

    def of_query(self, source: "OutputGradients", arrays: dict[str, np.ndarray]) -> np.ndarray:
        """φ(q), the mean over the training images' timesteps and ``noises`` of each.

        Args:
            source: what computes gradients.
            arrays: the query's tensors.

        Returns:
            (dimension,), float32.
        """
        timesteps = spaced_timesteps(self.gradients.timesteps, self.layout.config.train.timesteps)
        return self.averaged(source, arrays["latent"], arrays, timesteps)

    def averaged(
        self, source: "OutputGradients", latent: np.ndarray, arrays: dict[str, np.ndarray], timesteps: np.ndarray
    ) -> np.ndarray:
        """φ of one latent (C, H, W), with the query's prompt and region, over ``noises`` draws of timesteps (T,)."""
        import torch

        from forgetrace.diffusion.regions import LATENT

        timesteps = np.repeat(timesteps, self.options.noises or self.noises)
        # Not the training images' noises: two gradients of one noise would be alike for that alone.
        bank = NoiseBank(self.layout.config.seed, "query features", timesteps, latent.shape)
        one = torch.from_numpy(latent)[None], torch.from_numpy(arrays["prompt"])[None]
        region = torch.from_numpy(arrays[LATENT]) if LATENT in arrays else None
        return source.mean(*one, timesteps, bank.draws(), region)[0]


class DTrak(Trak):
    """D-TRAK (arXiv 2311.00500): TRAK with the output function mean(f_θ²)."""

    summary = "TRAK with the mean square of the model's output in place of the loss (D-TRAK)"
    output = "square"


class JourneyTrak(Trak):
    """Journey-TRAK (arXiv 2312.06205) at one step of the query's sampling.

    The query's image is replaced by what the model made out of it at that step, x̂₀(z_t), noised afresh at the same
    t (400 of 1,000 in AbU's comparison). Training images' features are those of TRAK.
    """

    summary = "TRAK with the query as the model made it out at one step of its sampling (Journey-TRAK)"
    reads = Trak.reads | {"timestep"}
    noises = 20

    @classmethod
    def check(cls, config: Config, method: str) -> None:
        """The timestep must be one of the schedule, and every query one that was sampled here."""
        length, own = config.train.timesteps, [name for name in config.queries() if not config.generates(name)]
        timestep = config.score.methods[method].timestep
        if timestep is not None and timestep >= length:
            raise UserError(f"score.methods.{method}.timestep must be below train.timesteps ({length}).")
        if own:
            raise UserError(
                f"score.methods.{method}: the query '{own[0]}' is an image file, yours or published, whose sampling "
                "nobody knows; remove the method or such queries."
            )

    def inputs(self, query: str) -> list[str]:
        """Those of TRAK, and the captions: guidance asks for the empty one."""
        return [*super().inputs(query), self.layout.captions]

    def of_query(self, source: "OutputGradients", arrays: dict[str, np.ndarray]) -> np.ndarray:
        """φ of x̂₀ at the sampler's step nearest to ``timestep``, the mean over ``noises``."""
        from forgetrace.diffusion.synthesis import journey

        wanted = self.options.timestep
        if wanted is None:
            wanted = self.layout.config.train.timesteps * 2 // 5
        if "initial_noise" not in arrays:
            raise UserError(
                f"score.methods.{self.method}: the images of a given model were made elsewhere, and nobody knows their "
                "sampling: remove the method."
            )
        steps = journey(self.layout, source.unet, arrays["initial_noise"], arrays["prompt"])
        timestep, estimate, _ = min(steps, key=lambda step: abs(step[0] - wanted))
        return self.averaged(source, estimate[0].cpu().numpy(), arrays, np.array([timestep]))


class Das(Trak):
    """DAS (arXiv 2410.18639), its accelerated form: gradients and errors normalised, then averaged over timesteps.

    τ = φ(q)ᵀ (ΦᵀΦ + λI)⁻¹ φ(z) · r(z), φ of mean(f_θ) and r the normalised root of z's squared error. The paper's
    score is the square of this; a square cannot tell a pull towards the query from one away from it, and the squares
    of a subset's images could not cancel in their sum (LDS): it is left out here. So are the leverage term
    1 / (1 − h), close to 1 for one image of thousands, and the preselection of candidates.
    """

    summary = "TRAK with the model's mean output, gradients of unit length, weighed by the training error (DAS)"
    output = "mean"

    @property
    def losses(self) -> TrainingLosses:
        """The squared errors behind r(z)."""
        return TrainingLosses(self.layout, self.gradients.timesteps, self.device)

    def features(self) -> list[Features]:
        """The projected gradients and the losses of the training images."""
        return [self.gradients, self.losses]

    def scores_of(self, queries: list[str]) -> dict[str, np.ndarray]:
        """τ of all training images for each query."""
        from forgetrace.attribution.kernel import residuals

        errors = residuals(self.losses.kept())
        return {query: scores * errors for query, scores in super().scores_of(queries).items()}
