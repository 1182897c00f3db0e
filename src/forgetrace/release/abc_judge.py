"""How well published features find the exemplars of published customised models (AbC, section 5).

A query's candidates are the background images and the exemplars of its own model. Where similarities are equal,
background images stand before exemplars, so that no feature gains by not telling images apart.
"""

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from forgetrace.attribution.calibration import Calibration
from forgetrace.attribution.heads import Heads
from forgetrace.evaluation.retrieval import mean_over_models, metrics
from forgetrace.progress import progress
from forgetrace.release.abc import CaseFeatures, Features

PER_QUERY = ["model", "prompts", "query", "metric", "value"]
SUMMARY = ["prompts", "metric", "n_models", "n_queries", "mean", "ci_low", "ci_high"]
MASS = "exemplar_mass"  # the calibrated probability that a query gives to its exemplars together
RESAMPLES = 10_000


@torch.no_grad()
def judge(
    background: Features,
    cases: CaseFeatures,
    heads: Heads | None = None,
    calibration: Calibration | None = None,
    device: torch.device | str = "cpu",
) -> pd.DataFrame:
    """Every metric of every query: the columns ``PER_QUERY``.

    Args:
        background: N images.
        cases: customised models with their queries.
        heads: h and h̃, laid over the features; by default neither.
        calibration: adds the metric ``exemplar_mass``.
        device: where to compare; the background's features must fit there twice.
    """
    of_images, of_queries = (heads.to(device).of_training_images, heads.of_generated) if heads else (_unit, _unit)
    known, exemplars = (of_images(features.values.to(device)) for features in (background, cases.exemplars))
    rows = []
    with progress(total=sum(len(q.files) for q in cases.queries.values()), unit="query", what="judging") as bar:
        for prompts, queries in cases.queries.items():
            models = np.array(cases.models[prompts])
            for model, (start, end) in enumerate(cases.spans):
                own = np.flatnonzero(models == model)
                asked = of_queries(queries.values[own].to(device))
                elsewhere, found = (asked @ images.T for images in (known, exemplars[start:end]))
                for place, others, near in zip(own, elsewhere, found, strict=True):
                    values = metrics(exemplar_ranks(near, others))
                    if calibration:
                        similarities = torch.cat([near, others]).double().cpu().numpy()
                        values[MASS] = calibration.probabilities(similarities)[: end - start].sum()
                    rows += [(model, prompts, queries.files[place], name, value) for name, value in values.items()]
                bar.update(len(own))
    return pd.DataFrame(rows, columns=PER_QUERY)


def exemplar_ranks(exemplars: torch.Tensor, background: torch.Tensor) -> np.ndarray:
    """Ranks (from 1) of n exemplars among all candidates, from the similarities (n,) and (N,) of a query."""
    own = exemplars.sort(descending=True).values
    before = torch.stack([(background >= similarity).sum() for similarity in own])
    return (before + torch.arange(1, len(own) + 1, device=own.device)).cpu().numpy()


def summarised(values: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Means over models by kind of prompt, with 95% intervals that resample models: the columns ``SUMMARY``."""
    rows = []
    for (prompts, metric), own in values.groupby(["prompts", "metric"], sort=False):
        rows.append((prompts, metric, *mean_over_models(own, RESAMPLES, seed)))
    return pd.DataFrame(rows, columns=SUMMARY)


def _unit(features: torch.Tensor) -> torch.Tensor:
    return F.normalize(features, dim=1)
