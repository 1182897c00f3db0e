"""The unlearning step (AbU, arXiv 2406.09408, eq. 5): raise the query's loss, spare everything else.

The objective ``−L(ẑ, ĉ; θ) + (N/2)(θ − θ0)ᵀ F (θ − θ0)`` has the Newton step

    θ ← θ + (α / N) (F + λ)⁻¹ ∇L(ẑ, ĉ; θ),

repeated ``steps`` times with a fresh gradient. Without curvature it is plain gradient ascent,
``θ ← θ + α ∇L``. Not in the paper: steps may grow, and end as soon as the query's loss has risen by a set factor, since
one α takes some queries nowhere and others beyond all bounds.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from forgetrace.artifacts import UserError
from forgetrace.curvature.contract import Curvature
from forgetrace.diffusion.loss import batched_losses, draw_losses
from forgetrace.diffusion.noise import monte_carlo

BATCH = 128
LOOK_EVERY, LOOK_DRAWS = 2, 32  # steps between looks at the query's loss, where its rise ends them; draws of a look
Weights = dict[str, torch.Tensor]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Course:
    """How many steps there are, and of what.

    Attributes:
        steps: number of steps, at most.
        draws: draws of (t, ε) per gradient; every step draws afresh.
        growth: every step is so many times as long as the one before.
        rise: the steps end when the query's loss is found to be so many times what it was; None: after all.
    """

    steps: int
    draws: int
    growth: float = 1.0
    rise: float | None = None


@dataclass(frozen=True)
class Query:
    """The image to forget, or a region of it.

    Attributes:
        name: for the random numbers and messages.
        latent: ẑ, (C, H, W), float32.
        prompt: token states of ĉ, (tokens, width), float32.
        region: weights of the latent positions its loss is the mean over, (H, W); None of a whole image.
        whole: name of the whole image, whose draws a region shares; None of a whole image.
    """

    name: str
    latent: torch.Tensor
    prompt: torch.Tensor
    region: torch.Tensor | None = None
    whole: str | None = None

    @property
    def drawn_as(self) -> str:
        """What its random numbers are keyed by."""
        return self.whole or self.name


def query_gradient(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    query: Query,
    names: list[str],
    draws: range,
    seed: int,
) -> Weights:
    """∇L(ẑ, ĉ; θ) on the named weights, the mean over draws of (t, ε).

    Args:
        unet: f_θ at the current weights.
        scheduler: its schedule.
        query: the image to forget.
        names: weights to differentiate by.
        draws: numbers of the draws.
        seed: the experiment's seed.
    """
    weights = {name: weight.requires_grad_(name in names) for name, weight in unet.named_parameters()}
    wanted = [weights[name] for name in names]
    total = [torch.zeros_like(weight) for weight in wanted]
    for start in range(draws.start, draws.stop, BATCH):
        numbers = range(start, min(start + BATCH, draws.stop))
        loss = draw_losses(unet, scheduler, *query_draws(scheduler, query, numbers, seed)).sum()
        for sum_, gradient in zip(total, torch.autograd.grad(loss, wanted), strict=True):
            sum_ += gradient
    unet.requires_grad_(False)
    return {name: value / len(draws) for name, value in zip(names, total, strict=True)}


def query_loss(
    unet: UNet2DConditionModel, scheduler: DDPMScheduler, query: Query, seed: int, draws: int = 1000
) -> float:
    """L(ẑ, ĉ; θ), the mean over draws that no step was taken on."""
    return float(batched_losses(unet, scheduler, *query_draws(scheduler, query, range(draws), seed, "check")).mean())


def query_draws(scheduler: DDPMScheduler, query: Query, numbers: range, seed: int, purpose: str = "unlearn"):
    """The query repeated for the numbered draws: latents, token states, timesteps, noise, and its region."""
    length = scheduler.config.num_train_timesteps
    timesteps, noise = monte_carlo(seed, f"{purpose} {query.drawn_as}", numbers, length, tuple(query.latent.shape))
    count = len(numbers)
    repeated = query.latent.expand(count, -1, -1, -1), query.prompt.expand(count, -1, -1)
    return *repeated, timesteps, noise, query.region


def unlearn(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    query: Query,
    curvature: Curvature,
    names: list[str],
    scale: float,
    course: Course,
    seed: int,
) -> Weights:
    """Take the Newton steps, in place.

    Args:
        unet: θ0; holds θ_Q afterwards.
        scheduler: its schedule.
        query: the image to forget.
        curvature: preconditions each gradient.
        names: weights that may change.
        scale: what the first preconditioned gradient is multiplied by: α/N, or α without curvature.
        course: the steps.
        seed: the experiment's seed.

    Returns:
        The changed weights.

    Raises:
        UserError: a weight became NaN or infinite.
    """

    def step(gradient: Weights, number: int) -> None:
        move(unet, curvature.precondition(gradient), scale * course.growth**number, query.name)

    return ascend(unet, scheduler, query, names, course, seed, step)


def ascend(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    query: Query,
    names: list[str],
    course: Course,
    seed: int,
    step: Callable[[Weights, int], None],
) -> Weights:
    """Let ``step`` change the model by the gradient of the query's loss, time and again; the rest as :func:`unlearn`.

    Warns where the steps end before the loss has risen as far as it should.

    Returns:
        The changed weights.
    """

    def loss() -> float:
        return query_loss(unet, scheduler, query, seed, LOOK_DRAWS)

    enough = course.rise and course.rise * loss()
    for i in range(course.steps):
        numbers = range(i * course.draws, (i + 1) * course.draws)
        step(query_gradient(unet, scheduler, query, names, numbers, seed), i)
        if enough and ((i + 1) % LOOK_EVERY == 0 or i + 1 == course.steps) and loss() >= enough:
            break
    else:
        if enough:
            log.warning(
                "Unlearning %s: %d steps did not raise its loss %g times; raise the variant's steps, growth or "
                "step_size.",
                query.name,
                course.steps,
                course.rise,
            )
    return current(unet, names)


def current(unet: UNet2DConditionModel, names: list[str]) -> Weights:
    """A copy of the named weights as they are now."""
    weights = dict(unet.named_parameters())
    return {name: weights[name].detach().clone() for name in names}


def move(unet: UNet2DConditionModel, direction: Weights, scale: float, query: str) -> None:
    """θ ← θ + scale · direction, in place.

    Raises:
        UserError: a weight became NaN or infinite; names the query and the weight.
    """
    weights = dict(unet.named_parameters())
    for name, change in direction.items():
        weights[name].add_(change, alpha=scale)
        if not torch.isfinite(weights[name]).all():
            raise UserError(
                f"Unlearning {query} made {name} NaN or infinite: lower the variant's step_size or raise its damping."
            )
