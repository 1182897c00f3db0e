"""``forgetrace sweep``: the step size of a variant, chosen without looking at any counterfactual.

The chosen α is the largest for which the mean loss of a fixed sample of other training images rises by
at most a stated share, on average over queries that nothing is reported of: those of the tuning pool, or in an
experiment of customised models images of its validation models. It is bracketed by factors of four and then bisected
on log α.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch

from forgetrace.artifacts import UserError
from forgetrace.config import Variant
from forgetrace.diffusion.device import pick_device
from forgetrace.diffusion.model import load_scheduler, load_unet, load_weights
from forgetrace.diffusion.subsets import select
from forgetrace.diffusion.synthesis import generate_query
from forgetrace.encoding.store import load_encoded
from forgetrace.layout import Layout
from forgetrace.unlearning.sample import others_loss
from forgetrace.unlearning.step import Query, move, query_gradient, query_loss
from forgetrace.unlearning.variants import carry_out, load_curvature, step_scale

BISECTIONS = 5
FACTOR = 4.0
LARGEST, SMALLEST = 1e3, 1e-12


@dataclass(frozen=True)
class Subject:
    """An image to forget, and the model that made it.

    Attributes:
        layout: the experiment in which that model is θ0.
        query: the image.
    """

    layout: Layout
    query: Query


def tuning_subjects(layout: Layout, count: int, device: str = "auto") -> list[Subject]:
    """Images that θ0 makes of so many captions of the tuning pool.

    Raises:
        UserError: the pool has too few captions.
    """
    pool = layout.config.prepare.tuning_captions
    if count > pool:
        raise UserError(f"--queries {count}: the tuning pool has only {pool} captions.")
    unet, subjects = load_unet(layout, pick_device(device)), []
    for name in (f"tuning-{i:02d}" for i in range(count)):
        _, arrays = generate_query(layout, unet, name)
        query = Query(name, torch.from_numpy(arrays["latent"]), torch.from_numpy(arrays["prompt"]))
        subjects.append(Subject(layout, query))
    return subjects


def sweep(
    layout: Layout, variant: str, subjects: list[Subject], share: float, device: str = "auto"
) -> tuple[float, pd.DataFrame]:
    """Choose a variant's step size.

    Args:
        layout: an experiment whose ``train`` and ``fit`` stages are done.
        variant: one of the config's unlearning variants; its step size is where the search starts.
        subjects: what to unlearn; nothing may be reported of them.
        share: largest mean relative rise of the others' loss.
        device: where to compute.

    Returns:
        α to two significant digits, rounded down, and the table of what was tried: step_size, query,
        query_before, query_after, others_before, others_after.

    Raises:
        UserError: no step size satisfies the bound, or the variant stops by itself.
    """
    if layout.config.unlearn[variant].procedure == "mucs":
        raise UserError(
            f"--variant {variant}: how far mucs goes is set by its bound and not by its step size, leave step_size out."
        )
    if layout.config.unlearn[variant].rise:
        raise UserError(
            f"--variant {variant}: how far it goes is set by its rise and not by its step size; "
            "`forgetrace tune --option rise` chooses one, or leave rise out."
        )
    trials = _Trials(layout.config.unlearn[variant], subjects, pick_device(device))
    chosen = largest_within(trials.rise, share, layout.config.unlearn[variant].step_size)
    return chosen, pd.DataFrame(trials.rows)


def largest_within(rise: Callable[[float], float], share: float, start: float) -> float:
    """The largest α with ``rise(α) <= share``, for a rise that grows with α; no α is asked for twice.

    Returns:
        α to two significant digits, rounded down.

    Raises:
        UserError: no α between 1e-12 and 1e3 brackets the share.
    """
    rise = functools.cache(rise)
    low = high = start
    while rise(low) > share:
        high, low = low, low / FACTOR
        if low < SMALLEST:
            raise UserError("Even the smallest step raises the loss of other images by more than the share.")
    while high == low or rise(high) <= share:
        low, high = high, high * FACTOR
        if high > LARGEST:
            raise UserError("Even the largest step does not raise the loss of other images by the share.")
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if rise(middle) <= share else (low, middle)
    return floor_digits(low)


def floor_digits(value: float) -> float:
    """Round a positive number down to two significant digits."""
    digits, exponent = f"{value:.12e}".split("e")
    return float(f"{int(float(digits) * 10) / 10}e{exponent}")


class _Trials:
    """Losses after unlearning each subject with a given step size."""

    def __init__(self, settings: Variant, subjects: list[Subject], device: torch.device):
        self.settings, self.rows = settings, []
        layouts = {subject.layout.weights: subject.layout for subject in subjects}
        models = {weights: _Model(layout, settings, device) for weights, layout in layouts.items()}
        others = {weights: model.others_loss() for weights, model in models.items()}
        self.subjects = [(models[subject.layout.weights], subject.query) for subject in subjects]
        self.before = [
            (models[subject.layout.weights].query_loss(subject.query), others[subject.layout.weights])
            for subject in subjects
        ]
        # The direction of a single Newton step does not depend on its size: one gradient serves all trials.
        single = settings.procedure == "newton" and settings.steps == 1
        self.directions = [model.direction(query) if single else None for model, query in self.subjects]

    def rise(self, step_size: float) -> float:
        """Mean relative rise of the others' loss over the subjects; infinite where a step fails."""
        settings, rises = self.settings.model_copy(update={"step_size": step_size}), []
        for (model, query), (query_before, others_before), direction in zip(
            self.subjects, self.before, self.directions, strict=True
        ):
            try:
                model.unlearn(settings, query, direction)
            except UserError:
                return float("inf")
            row = {"step_size": step_size, "query": query.name, "query_before": query_before}
            row |= {"query_after": model.query_loss(query), "others_before": others_before}
            self.rows.append(row | {"others_after": model.others_loss()})
            rises.append(self.rows[-1]["others_after"] / others_before - 1)
        mean = sum(rises) / len(rises)
        return mean if mean == mean else float("inf")


class _Model:
    """The θ0 of one experiment, which every trial starts from."""

    def __init__(self, layout: Layout, settings: Variant, device: torch.device):
        self.layout, self.config, self.settings = layout, layout.config, settings
        self.encoded, self.scheduler = load_encoded(layout), load_scheduler(layout)
        self.unet = load_unet(layout, device)
        self.curvature = load_curvature(layout, settings.curvature, settings.damping)

    def unlearn(self, settings: Variant, query: Query, direction: dict[str, torch.Tensor] | None) -> None:
        """Make the model forget; along a known direction where there is one."""
        load_weights(self.unet, self.layout.weights)
        if direction:
            move(self.unet, direction, step_scale(settings, len(self.encoded)), query.name)
        else:
            carry_out(self.config, settings, self.unet, self.scheduler, self.encoded, query, self.curvature)

    def direction(self, query: Query) -> dict[str, torch.Tensor]:
        """F⁻¹ ∇L of the query."""
        names = select([name for name, _ in self.unet.named_parameters()], self.settings.weights)
        draws = range(self.settings.draws)
        return self.curvature.precondition(
            query_gradient(self.unet, self.scheduler, query, names, draws, self.config.seed)
        )

    def query_loss(self, query: Query) -> float:
        return query_loss(self.unet, self.scheduler, query, self.config.seed)

    def others_loss(self) -> float:
        return others_loss(self.unet, self.scheduler, self.encoded, self.config.seed)
