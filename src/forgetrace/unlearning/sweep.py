"""``forgetrace sweep``: the step size of a variant, chosen without looking at any counterfactual.

The chosen α is the largest for which the mean loss of a fixed sample of other training images rises by
at most a stated share, on average over queries drawn from the tuning pool. It is bracketed by factors
of four and then bisected on log α.
"""

import functools
from collections.abc import Callable

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


def sweep(layout: Layout, variant: str, queries: int, share: float, device: str = "auto") -> tuple[float, pd.DataFrame]:
    """Choose a variant's step size on tuning queries.

    Args:
        layout: an experiment whose ``train`` and ``fit`` stages are done.
        variant: one of the config's unlearning variants; its step size is where the search starts.
        queries: how many of the tuning pool's captions to use.
        share: largest mean relative rise of the others' loss.
        device: where to compute.

    Returns:
        α to two significant digits, rounded down, and the table of what was tried: step_size, query,
        query_before, query_after, others_before, others_after.

    Raises:
        UserError: no step size satisfies the bound, the pool has too few captions, or the variant stops by itself.
    """
    if layout.config.unlearn[variant].procedure == "mucs":
        raise UserError(
            f"--variant {variant}: how far mucs goes is set by its bound and not by its step size, leave step_size out."
        )
    pool = layout.config.prepare.tuning_captions
    if queries > pool:
        raise UserError(f"--queries {queries}: the tuning pool has only {pool} captions.")
    trials = _Trials(layout, layout.config.unlearn[variant], variant, queries, pick_device(device))
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
    """Losses after unlearning each tuning query with a given step size."""

    def __init__(self, layout: Layout, settings: Variant, variant: str, queries: int, device: torch.device):
        self.layout, self.settings, self.rows = layout, settings, []
        self.encoded, self.scheduler = load_encoded(layout), load_scheduler(layout)
        self.unet = load_unet(layout, device)
        self.seed = layout.config.seed
        self.curvature = load_curvature(layout, settings.curvature, settings.damping)
        self.queries = [self._query(f"tuning-{i:02d}") for i in range(queries)]
        self.others_before = others_loss(self.unet, self.scheduler, self.encoded, self.seed)
        self.before = {query.name: self._query_loss(query) for query in self.queries}
        # The direction of a single Newton step does not depend on its size: one gradient serves all trials.
        single = settings.procedure == "newton" and settings.steps == 1
        self.directions = {query.name: self._direction(query) for query in self.queries} if single else {}

    def rise(self, step_size: float) -> float:
        """Mean relative rise of the others' loss over the tuning queries; infinite where a step fails."""
        rises = []
        for query in self.queries:
            load_weights(self.unet, self.layout.weights)
            try:
                self._unlearn(query, step_size)
            except UserError:
                return float("inf")
            after = others_loss(self.unet, self.scheduler, self.encoded, self.seed)
            rises.append(after / self.others_before - 1)
            row = {"step_size": step_size, "query": query.name, "query_before": self.before[query.name]}
            row |= {"query_after": self._query_loss(query), "others_before": self.others_before}
            self.rows.append(row | {"others_after": after})
        mean = sum(rises) / len(rises)
        return mean if mean == mean else float("inf")

    def _unlearn(self, query: Query, step_size: float) -> None:
        settings = self.settings.model_copy(update={"step_size": step_size})
        if direction := self.directions.get(query.name):
            move(self.unet, direction, step_scale(settings, len(self.encoded)), query.name)
        else:
            config = self.layout.config
            carry_out(config, settings, self.unet, self.scheduler, self.encoded, query, self.curvature)

    def _direction(self, query: Query) -> dict[str, torch.Tensor]:
        names = select([name for name, _ in self.unet.named_parameters()], self.settings.weights)
        gradient = query_gradient(self.unet, self.scheduler, query, names, range(self.settings.draws), self.seed)
        return self.curvature.precondition(gradient)

    def _query(self, name: str) -> Query:
        _, arrays = generate_query(self.layout, self.unet, name)
        return Query(name, torch.from_numpy(arrays["latent"]), torch.from_numpy(arrays["prompt"]))

    def _query_loss(self, query: Query) -> float:
        return query_loss(self.unet, self.scheduler, query, self.seed)
