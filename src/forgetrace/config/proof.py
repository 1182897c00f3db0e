"""The sections ``retrain``, ``evaluate`` and ``figures``: whether a ranking is true."""

from typing import Annotated, Literal

from pydantic import Field

from forgetrace.config.base import Positive, Section, is_one, unused


class Retrain(Section):
    """Leave-K-out models, trained from scratch with the recipe of θ0."""

    methods: list[str] = Field([], description="Methods judged by retraining (random is always judged).")
    k: list[Positive] = Field([200], min_length=1, description="How many top-ranked images to leave out.")
    random_draws: Positive = Field(3, description="Random sets per K, shared by all queries.")
    seeds: int = Field(2, ge=0, description="Retrainings on all images with other seeds: the noise floor.")
    keep_weights: bool = Field(
        False,
        description="Keep the weights of models whose measurements are kept anyway; set later, or with "
        "weights deleted, it trains them again.",
    )
    stack: Positive = Field(
        1,
        description="Models trained as one, each as it would be alone but for rounding: worth it on a GPU, which a "
        "single small model leaves idle. From 2 on, one job makes all random "
        "halves, one all pools, and one all models of a judged method.",
        exclude_if=is_one,
    )
    queries: Positive | Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="Queries judged by leaving images out: how many, in the order of the config, or a list of their "
        "names (null: all). Those that remain serve the linear datamodeling score alone, such as queries that settings "
        "are chosen on.",
        exclude_if=unused,
    )
    subsets: int = Field(
        0,
        ge=0,
        description="Models of random halves of the data, for the linear datamodeling score.",
        exclude_if=unused,
    )
    subset_seeds: Positive = Field(
        1, description="Trainings of each half; from 2 on, how well they agree bounds the score.", exclude_if=is_one
    )
    pools: int = Field(
        0,
        ge=0,
        description="Pooled protocol: the judged queries are dealt into so many pools, and the top images of a "
        "pool's queries are left out together (0: not done).",
        exclude_if=unused,
    )
    pooled_k: list[Positive] = Field(
        [], description="Top-ranked images of each query that a pool leaves out.", exclude_if=unused
    )


class Evaluate(Section):
    """What the leave-K-out models say."""

    timestep_stride: Positive = Field(5, description="Stride of the timesteps that ΔL averages over.")
    draws: Positive = Field(2, description="Noise draws per timestep for ΔL.")
    encoder: Literal["efficientnet-lite0"] = Field(
        "efficientnet-lite0", description="Image encoder of the similarity column."
    )
    bootstrap: Positive = Field(10000, description="Bootstrap resamples of every interval.")
    others: int = Field(
        0,
        ge=0,
        description="Images of other prompts that are generated again with a query unlearned, to see whether "
        "forgetting it spares them (AbU: 99; 0: not done).",
        exclude_if=unused,
    )
    precision_k: list[Positive] = Field(
        [],
        description="With regions left and right of dataset digit-pairs: how many top-ranked images are looked at for "
        "the digits and inks they share with each side.",
        exclude_if=unused,
    )
    reference: str | None = Field(
        None,
        description="Method that the pooled protocol compares every other with, besides random.",
        exclude_if=unused,
    )


class Figures(Section):
    """Plots and image grids."""

    top: Positive = Field(12, description="Top-ranked images shown per method.")
