"""The sections ``fit``, ``unlearn``, ``scan`` and ``score``: from a query to a ranking."""

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from forgetrace.config.base import STEP, Name, Positive, Section, Subset, is_one, unused

# What the options of a procedure are where the config does not say and Variant's defaults do not suit it.
PROCEDURES = {
    "adam": {"curvature": "none"},
    "mucs": {"curvature": "none", "weights": "mlp", "steps": 1000, "draws": 100},
}


class Fit(Section):
    """What a method needs once per model: the Fisher information, diagonal or EK-FAC, as the variants ask for it."""

    draws: Positive = Field(10000, description="Draws of (image, caption, t, ε), one per-example gradient each.")
    chunk: Positive = Field(128, description="Draws that share a pass through the model.")
    given: str | None = Field(
        None,
        min_length=1,
        description="Folder that `forgetrace import-release` wrote: its Fisher information is taken, not estimated.",
        exclude_if=unused,
    )

    @model_validator(mode="after")
    def _given(self):
        if self.given and (useless := sorted({"draws", "chunk"} & self.model_fields_set)):
            raise ValueError(f"{useless[0]} has no effect with given: remove it")
        return self


class Variant(Section):
    """One way to unlearn a query."""

    procedure: Literal["newton", "adam", "mucs"] = Field(
        "newton",
        description="Newton steps (AbU); gradient ascent by Adam (Forward-INF); or training on with the query's loss "
        "raised to an untrained model's (MUCS).",
        # Younger than finished results, which hang on the options of a Newton step.
        exclude_if=lambda procedure: procedure == "newton",
    )
    curvature: Literal["diagonal", "ekfac", "none"] = Field(
        "diagonal",
        description="Fisher that preconditions the step: diagonal (AbU) or EK-FAC (AbU+); none is plain gradient "
        "ascent.",
    )
    weights: Subset = Field("all", description="Weights that may change (mucs: mlp).")
    step_size: float | None = Field(
        None,
        gt=0,
        validate_default=True,
        description="α of the step (α/N)(F+λ)⁻¹∇L; without curvature, α·∇L; with adam and mucs the learning rate "
        "(mucs: a tenth of train.learning_rate, else required).",
    )
    steps: Positive = Field(1, description="Steps, each with a fresh gradient; with mucs at most as many (mucs: 1000).")
    draws: Positive = Field(
        2048,
        description="Draws of (t, ε) for each gradient; with mucs as many of the query and of D (mucs: 100).",
    )
    damping: float = Field(0.1, ge=0, description="λ of each layer as a multiple of its mean Fisher entry.")
    growth: float = Field(
        1.0,
        ge=1,
        description="Every Newton step is so many times as long as the one before.",
        exclude_if=is_one,
    )
    rise: float | None = Field(
        None,
        gt=1,
        description="Newton steps end when the query's loss is so many times what it was, as every second step shows; "
        "without it, after all.",
        exclude_if=unused,
    )

    @model_validator(mode="before")
    @classmethod
    def _of_the_procedure(cls, given: object):
        procedure = given.get("procedure") if isinstance(given, dict) else None
        if procedure not in tuple(PROCEDURES):
            return given  # newton, or for the fields to refuse
        fixed = PROCEDURES[procedure]
        if useless := [
            k for k in ("curvature", "damping", "growth", "rise") if k in given and given[k] != fixed.get(k)
        ]:
            raise ValueError(f"{' and '.join(useless)} would have no effect with procedure {procedure}: remove the key")
        return fixed | given

    @field_validator("step_size")
    @classmethod
    def _has_a_step_size(cls, value: float | None, info: ValidationInfo):
        if value is None and info.data.get("procedure", "mucs") != "mucs":
            raise ValueError("give one, only procedure mucs has a default")
        return value


class Narrowing(Section):
    """A scan with few draws for most images and many for those whose place in the ranking is in doubt."""

    first: int = Field(6, ge=2, description="Draws of (t, ε) every image gets.")
    mean: float = Field(12.4, gt=0, description="Draws per image on average, when the scan of a query ends.")
    most: Positive = Field(
        98, description=f"Draws an image gets at most, in steps of {STEP} after the first; θ0 is scanned with all."
    )
    tops: list[Positive] = Field(
        [20, 200], min_length=1, description="The ranks at which it matters who stands above; every K of retrain."
    )

    @model_validator(mode="after")
    def _grows(self):
        if not self.first <= self.mean <= self.most:
            raise ValueError(f"give first <= mean <= most (here {self.first}, {self.mean:g}, {self.most})")
        if (self.most - self.first) % STEP:
            raise ValueError(f"most - first must be a multiple of {STEP}, the draws of a step")
        return self


class Scan(Section):
    """Loss per training image and timestep."""

    timesteps: Positive = Field(20, description="Evenly spaced timesteps, from 0; not with narrowing.")
    narrowing: Narrowing | None = Field(
        None,
        description="Many draws for images whose place in the ranking is in doubt, few for the rest; without it "
        "all have the same.",
        exclude_if=unused,
    )
    noise: Literal["shared", "per-image", "release"] = Field(
        "shared",
        description="One noise per timestep for all images, one per image and timestep, or that of AbU's published "
        "scores, one per image, caption and timestep (docs/published-artifacts.md).",
    )
    batch_size: Positive = Field(250, description="UNet evaluations at once; does not change the result.")
    shards: Positive = Field(
        1,
        description="Jobs that share a scan, each with a part of the images; does not change the result. Not with "
        "narrowing.",
        exclude_if=is_one,
    )

    @model_validator(mode="after")
    def _one_of(self):
        if self.narrowing and "timesteps" in self.model_fields_set:
            raise ValueError("timesteps has no effect with narrowing: remove it")
        if self.narrowing and self.noise == "release":
            raise ValueError("noise release is that of evenly spaced timesteps: not with narrowing, remove one")
        if self.narrowing and self.shards > 1:
            raise ValueError(
                "shards cannot split a narrowed scan, whose every round looks at all images: remove shards or narrowing"
            )
        return self

    def of_base(self) -> dict:
        """The settings θ0's scan hangs on: of narrowing, only how many draws there can be."""
        settings = self.model_dump(mode="json", exclude={"narrowing", "batch_size", "shards"})
        return settings | ({"most": self.narrowing.most} if self.narrowing else {})


class Method(Section):
    """A row of the result tables: an attributor of the registry with its options."""

    attributor: str | None = Field(None, description="Registered attributor; by default the method's own name.")
    variant: str | None = Field(
        None, description="Unlearning variant it uses; by default the method's name (unlearning, output-shift)."
    )
    score: Literal["difference", "skew"] = Field(
        "difference", description="How a loss before and after becomes a score (unlearning only)."
    )
    flips: Literal["max", "mean"] | None = Field(
        None,
        description="Of an image and its mirror image, the larger score (max, the default) or the mean (unlearning, "
        "with encode.flips).",
        exclude_if=unused,
    )
    weights: Subset | None = Field(
        None, description="Weights whose gradients count (gradient methods; by default all).", exclude_if=unused
    )
    timesteps: Positive | None = Field(
        None,
        description="Evenly spaced timesteps a training image's gradients, or shifts of its prediction, average over.",
        exclude_if=unused,
    )
    noises: Positive | None = Field(
        None,
        description="Noises per timestep for the gradients of a query, or that unet-features averages over (4).",
        exclude_if=unused,
    )
    draws: Positive | None = Field(
        None,
        description="Draws of (t, ε) for the gradient of a query (influence; by default those of an unlearning step).",
        exclude_if=unused,
    )
    dimension: Positive | None = Field(
        None, description="Dimension gradients are projected to (TRAK family).", exclude_if=unused
    )
    damping: float | None = Field(
        None, ge=0, description="λ relative to the mean of what it is added to.", exclude_if=lambda value: value is None
    )
    curvature: Literal["diagonal", "ekfac"] | None = Field(
        None, description="Fisher whose inverse weighs the gradients (influence only).", exclude_if=unused
    )
    unit_length: bool = Field(
        False,
        description="Scale the gradient of a training image to length 1 at every timestep (influence, datainf).",
        exclude_if=unused,
    )
    methods: list[str] | None = Field(
        None, description="Other methods whose standardised scores are added up (ensemble only).", exclude_if=unused
    )
    encoder: str | None = Field(
        None,
        description="Image encoder: efficientnet-lite0, or a model of transformers as owner/model, "
        "owner/model@revision or a folder.",
        exclude_if=unused,
    )
    timestep: int | None = Field(
        None,
        ge=0,
        description="The one timestep a method looks at (unet-features: by default 25 of 1000).",
        exclude_if=lambda value: value is None,
    )


class Score(Section):
    """Which methods rank the training images."""

    methods: dict[Name, Method] = Field(description="Methods by name.", min_length=1)
