"""An experiment as one validated object; nothing here imports torch.

``config/<experiment>.yaml`` holds one section per stage. The JSON schema Snakemake validates against
and the key tables of ``config/README.md`` are generated from these models (``forgetrace schema``),
so a key is described once, here.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from forgetrace.artifacts import UserError

NAME = r"^[a-z0-9]([a-z0-9_.-]*[a-z0-9])?$"
Name = Annotated[str, Field(pattern=NAME)]
Share = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]
Box = tuple[int, int, int, int]
Subset = Literal["cross-attn-kv", "cross-attn", "attn", "mlp", "all"]
BUNDLED = ("digits", "digit-pairs")  # datasets that ship with a package
STEP = 4  # draws by which a narrowed scan goes on
SEED_SET = "seed"  # the "method" of retrainings on all of D: only the training seed differs
RANDOM = "random"
NEW_TOKEN = "V*"  # of a customised model, in prompts
MANNERS = ("template", "free")  # of prompts about a concept
LEARNED = "learned"  # the method whose features are learned from customised models
HALF_SET = "half"  # the "method" of models trained on random halves of D
CEILING = "ceiling"  # the row of the linear datamodeling score that noise of training leaves to a perfect method
# Keys of train that a given model decides, and those that only a training reads.
ARCHITECTURE = {
    "channels", "cross_attention", "layers_per_block", "attention_heads", "norm_groups", "prediction", "schedule",
}  # fmt: skip
RECIPE = {
    "steps", "batch_size", "learning_rate", "weight_decay", "warmup_steps", "gradient_clip", "ema_decay",
    "caption_dropout", "precision", "snapshots", "checkpoint_every",
}  # fmt: skip
# Of these, what a given model was trained by cannot be guessed: leave-K-out models need them said.
NEEDED = ("steps", "batch_size", "learning_rate")
# What the options of a procedure are where the config does not say and Variant's defaults do not suit it.
PROCEDURES = {
    "adam": {"curvature": "none"},
    "mucs": {"curvature": "none", "weights": "mlp", "steps": 1000, "draws": 100},
}


def _unused(value: object) -> bool:
    """Whether an option younger than finished results is off: then it is no part of what they hang on."""
    return not value


def _one(value: int) -> bool:
    """The same for an option whose absence is 1."""
    return value == 1


class Section(BaseModel):
    """Base of all sections: an unknown key is an error, values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Prepare(Section):
    """Build the dataset: images, captions and the split into pools."""

    dataset: Literal["digits", "digit-pairs", "folder", "coco"] = Field(
        "digits",
        description="Dataset source: the bundled digits, one or two to a picture, a Hugging Face ImageFolder of your "
        "own, or COCO 2017. Images of the last two stay where they are; what is made goes to data/<dataset>, of "
        "changed settings to a folder that names them.",
    )
    path: str | None = Field(
        None,
        min_length=1,
        description="Folder with images and metadata.jsonl or metadata.csv (folder), or with "
        "annotations/captions_train2017.json and train2017/ (coco).",
        # Younger than finished results, which are all of the digits.
        exclude_if=_unused,
    )
    size: Positive | None = Field(
        None,
        description="Side in pixels of the squares that images are cropped to at the centre and resized to (folder: "
        "required; coco: 128).",
        exclude_if=_unused,
    )
    seed: int = Field(0, ge=0, lt=2**64, description="Seed of the digits' colours and of the caption split.")
    tuning_captions: int = Field(60, ge=0, description="Distinct captions held out for choosing settings.")
    report_captions: int = Field(
        60, ge=0, description="Distinct captions held out for reported queries; images with one are not trained on."
    )

    @model_validator(mode="before")
    @classmethod
    def _size_of_coco(cls, given: object):
        return {"size": 128} | given if isinstance(given, dict) and given.get("dataset") == "coco" else given

    @model_validator(mode="after")
    def _own_or_bundled(self):
        keys = {"path": self.path, "size": self.size}
        if self.dataset in BUNDLED and (useless := [key for key, value in keys.items() if value is not None]):
            raise ValueError(
                f"{' and '.join(useless)} would have no effect with dataset {self.dataset}: remove the key"
            )
        if self.dataset not in BUNDLED and (missing := [key for key, value in keys.items() if value is None]):
            raise ValueError(f"dataset {self.dataset} needs {' and '.join(missing)}")
        return self


class Encode(Section):
    """Turn images into latents and captions into token states."""

    image_encoder: Literal["pixel-unshuffle", "autoencoder-kl"] = Field(
        "pixel-unshuffle",
        description="What makes latents of images: pixel-unshuffle is exact and has no weights, autoencoder-kl is the "
        "one of a Stable Diffusion pipeline.",
    )
    factor: Positive = Field(2, description="Pixel-unshuffle factor: latents have 3·factor² channels.")
    text_encoder: Literal["minilm", "clip"] = Field(
        "minilm",
        description="Text encoder whose token states condition: MiniLM, or the CLIP or OpenCLIP of a Stable Diffusion "
        "pipeline.",
    )
    pipeline: str | None = Field(
        None,
        description="Where autoencoder-kl and clip come from: a folder in diffusers' layout (vae/, text_encoder/, "
        "tokenizer/), or a model of the Hugging Face hub as owner/model or owner/model@revision.",
        exclude_if=_unused,
    )
    tokens: Positive | None = Field(
        None,
        description="Tokens of a caption whose states are kept (null: with clip all 77, with minilm those of the "
        "longest caption).",
        exclude_if=_unused,
    )
    max_images: Positive | None = Field(
        None, description="Use only this many training images, drawn with the experiment's seed (null: all)."
    )

    flips: bool = Field(
        False,
        description="Train on mirror images too: each draw of an image is flipped with probability 1/2.",
        exclude_if=_unused,
    )
    caption_dtype: Literal["float32", "float16"] = Field(
        "float32",
        description="Precision of stored token states; float16 halves the disk that many captions take.",
        exclude_if=lambda value: value == "float32",
    )

    given: str | None = Field(
        None,
        min_length=1,
        description="Folder that `forgetrace import-release` wrote: its latents and token states are taken, no encoder "
        "runs. A pipeline then gives the empty caption's state, and lets own images be queries.",
        exclude_if=_unused,
    )

    @model_validator(mode="after")
    def _given(self):
        if not self.given:
            return self
        fixed = {"factor", "tokens", "max_images", "caption_dtype"}
        fixed |= set() if self.pipeline else {"image_encoder", "text_encoder"}
        if useless := sorted(fixed & self.model_fields_set):
            raise ValueError(f"{useless[0]} has no effect with given: remove it")
        if self.pipeline and (self.image_encoder, self.text_encoder) != ("autoencoder-kl", "clip"):
            raise ValueError("given with a pipeline needs image_encoder autoencoder-kl and text_encoder clip")
        if not self.flips:
            raise ValueError("given holds mirror images too: set flips: true")
        return self

    @model_validator(mode="after")
    def _has_its_weights(self):
        if bool(self.pipeline) != (self.image_encoder == "autoencoder-kl" or self.text_encoder == "clip"):
            raise ValueError("image_encoder autoencoder-kl and text_encoder clip need a pipeline, others have no use")
        if self.image_encoder == "autoencoder-kl" and "factor" in self.model_fields_set:
            raise ValueError("factor has no effect with image_encoder autoencoder-kl: remove it")
        return self


class Train(Section):
    """The diffusion model's architecture and training recipe, shared by θ0 and every retraining."""

    channels: list[Positive] = Field([32, 64], description="Channels of the UNet's resolutions.", min_length=1)
    cross_attention: list[bool] = Field(
        [False, True], description="Which resolutions attend to the caption; the middle block always does."
    )
    layers_per_block: Positive = Field(1, description="Residual layers of each block.")
    attention_heads: Positive = Field(2, description="Heads of every attention layer.")
    norm_groups: Positive = Field(8, description="Groups of every group normalisation.")
    prediction: Literal["v_prediction", "epsilon"] = Field(
        "v_prediction", description="Training target; epsilon cannot sample from the schedule squaredcos_cap_v2."
    )
    schedule: Literal["squaredcos_cap_v2", "linear", "scaled_linear"] = Field(
        "squaredcos_cap_v2", description="Noise schedule, in diffusers' names."
    )
    timesteps: Positive = Field(1000, description="Length of the noise schedule.")
    steps: Positive = Field(2000, description="Optimiser steps (never epochs: removing images keeps it).")
    batch_size: Positive = Field(64, description="Images per step over all processes.")
    learning_rate: float = Field(2e-3, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay of AdamW.")
    warmup_steps: int = Field(100, ge=0, description="Linear warm-up; cosine decay to zero follows.")
    gradient_clip: float = Field(1.0, gt=0, description="Largest global gradient norm.")
    ema_decay: float = Field(0.995, ge=0, lt=1, description="Decay of the weight average that is kept.")
    caption_dropout: float = Field(
        0.1, ge=0, lt=1, description="Share of captions replaced by the empty one, for guidance."
    )
    precision: Literal["fp32", "bf16", "auto"] = Field(
        "auto", description="Training precision; auto takes bf16 where the hardware multiplies it natively."
    )
    pretrained: str | None = Field(
        None,
        description="θ0 itself, which then is not trained: a folder in diffusers' layout (unet/, scheduler/), or a "
        "model of the Hugging Face hub.",
        exclude_if=_unused,
    )
    lora: str | None = Field(
        None,
        description="LoRA weights in diffusers' format (a file or its folder) that are merged into pretrained; needs "
        "the extra `lora`.",
        exclude_if=_unused,
    )
    parent: str | None = Field(
        None,
        description="What training starts from instead of random weights, named like pretrained; with pretrained, "
        "what that was fine-tuned from by the recipe of this section, whose steps, batch_size and learning_rate must "
        "be given: without them leave-K-out models are impossible.",
        exclude_if=_unused,
    )
    threads: Positive = Field(1, description="CPU threads of one training; the same for θ0 and retrainings.")
    snapshots: Positive = Field(4, description="Evenly spaced snapshots kept with their learning rates.")
    checkpoint_every: Positive = Field(250, description="Steps between checkpoints a killed run resumes from.")

    @property
    def given(self) -> tuple[str, str] | None:
        """The model whose architecture and schedule are taken, and the key that names it; None where we build one."""
        key = "parent" if self.parent else "pretrained"
        name = getattr(self, key)
        return (name, f"train.{key}") if name else None

    @property
    def trains(self) -> bool:
        """Whether this experiment can train models: not where θ0 is given and nobody says from what and how."""
        return self.lacks is None

    @property
    def lacks(self) -> str | None:
        """What the config does not say, so that no model can be trained; None where one can."""
        if not self.pretrained:
            return None
        if self.lora:
            return "no recipe here trains LoRA weights, so what they were trained without cannot be tried"
        if not self.parent:
            return "name what the given θ0 was fine-tuned from in train.parent, and give its recipe"
        missing = [f"train.{key}" for key in NEEDED if key not in self.model_fields_set]
        return f"say how the given θ0 was fine-tuned: {', '.join(missing)} missing" if missing else None

    @model_validator(mode="after")
    def _given(self):
        fixed = ARCHITECTURE | (RECIPE if self.pretrained and not self.parent else set())
        if self.given and (useless := sorted(fixed & self.model_fields_set)):
            raise ValueError(f"{useless[0]} has no effect with {self.given[1].partition('.')[2]}: remove it")
        if self.lora and (self.parent or not self.pretrained):
            raise ValueError("lora needs pretrained, and cannot be retrained from a parent: no recipe here trains LoRA")
        return self

    @model_validator(mode="after")
    def _levels(self):
        if len(self.cross_attention) != len(self.channels):
            raise ValueError("cross_attention needs one entry per entry of channels")
        if self.warmup_steps >= self.steps:
            raise ValueError("warmup_steps must be smaller than steps")
        if self.snapshots > self.steps:
            raise ValueError("snapshots must not outnumber steps")
        if any(width % self.norm_groups or width % self.attention_heads for width in self.channels):
            raise ValueError("every entry of channels must be divisible by norm_groups and attention_heads")
        if self.prediction == "epsilon" and self.schedule == "squaredcos_cap_v2":
            # Its signal-to-noise ratio ends at 2e-9: the first sampling step would multiply every error by a thousand.
            raise ValueError(
                "prediction epsilon cannot start sampling from the pure noise that schedule squaredcos_cap_v2 ends in; "
                "take v_prediction, or the schedule linear or scaled_linear"
            )
        return self

    def snapshot_steps(self) -> list[int]:
        """Numbers of finished steps at which a snapshot is kept, the last at the end; none of a given θ0."""
        if self.pretrained:
            return []
        return [self.steps * (i + 1) // self.snapshots for i in range(self.snapshots)]


class PoolQueries(Section):
    """Queries generated from the first captions of a held-out pool."""

    pool: Literal["tuning", "report"] = Field(description="Held-out caption pool the prompts come from.")
    count: Positive = Field(description="How many of its captions to use; names are <pool>-00, <pool>-01, …")

    def names(self) -> list[str]:
        """Names of the queries."""
        return [f"{self.pool}-{i:02d}" for i in range(self.count)]


class GivenQueries(Section):
    """Published queries (no ΔG, for want of their initial noise)."""

    given: str = Field(min_length=1, description="Folder that `forgetrace import-release` wrote.")
    count: Positive = Field(description="How many of its queries to use; names are <name>-000, <name>-001, …")
    name: Name = Field("sample", description="Which of the sets of queries there, queries/<name>.")

    def names(self) -> list[str]:
        """Names of the queries."""
        return [f"{self.name}-{i:03d}" for i in range(self.count)]


class ImageQuery(Section):
    """One query: an image file of the user's (no ΔG, for want of its initial noise)."""

    name: Name = Field(description="Name of the query in every path; draw0, pool0 and the like are taken.")
    image: str = Field(description="Image file, resized to the dataset's size; of own data, cropped as they are.")
    prompt: str = Field(description="The prompt it was generated from.")

    def names(self) -> list[str]:
        """Its one name."""
        return [self.name]


class Region(Section):
    """A part of the queries' images that is attributed on its own, as the query <query>-<name>."""

    boxes: list[Box] | None = Field(
        None, min_length=1, description="Boxes [x0, y0, x1, y1] in pixels, x1 and y1 exclusive; their union is meant."
    )
    mask: str | None = Field(
        None, min_length=1, description="Image of the query's size: what is brighter than half is inside."
    )
    file: str | None = Field(
        None,
        min_length=1,
        description="JSON or YAML file of boxes by query, and by region where it holds several: "
        "{report-00: {left: [0, 0, 16, 16]}}.",
    )
    phrase: str | None = Field(
        None, min_length=1, description="What to look for in the image, with synthesize.detector: a dog."
    )
    queries: list[Name] | None = Field(None, min_length=1, description="Queries that have the region (null: all).")

    @model_validator(mode="after")
    def _one_source(self):
        if sum(value is not None for value in (self.boxes, self.mask, self.file, self.phrase)) != 1:
            raise ValueError("give one of boxes, mask, file and phrase")
        for x0, y0, x1, y1 in self.boxes or []:
            if not (0 <= x0 < x1 and 0 <= y0 < y1):
                raise ValueError(
                    f"the box [{x0}, {y0}, {x1}, {y1}] is empty or begins outside the image: give 0 <= x0 < x1 and "
                    "0 <= y0 < y1"
                )
        return self


class Synthesize(Section):
    """Generate the images whose influence is asked for."""

    queries: list[PoolQueries | GivenQueries | ImageQuery] = Field(
        [PoolQueries(pool="report", count=4)],
        description="Pools to draw from, published queries, or image files; none beside customised models.",
    )
    sampler_steps: Positive = Field(25, description="DDIM steps.")
    guidance: float = Field(1.0, ge=0, description="Classifier-free guidance scale; 1 is none.")

    regions: dict[Name, Region] = Field(
        {},
        description="Parts of the queries' images that are attributed on their own (docs/regions.md), by name.",
        exclude_if=_unused,
    )
    detector: str | None = Field(
        None,
        min_length=1,
        description="GroundingDINO that finds the phrases of regions: a model of transformers as owner/model, "
        "owner/model@revision or a folder.",
        exclude_if=_unused,
    )
    detector_threshold: Share | None = Field(
        None,
        description="Confidence from which a box of the detector counts (0.3 where it is not given).",
        exclude_if=_unused,
    )

    @model_validator(mode="after")
    def _detector(self):
        phrases = [name for name, region in self.regions.items() if region.phrase]
        if phrases and not self.detector:
            raise ValueError(
                f"regions.{phrases[0]}.phrase needs a detector, such as detector: IDEA-Research/grounding-dino-tiny"
            )
        if (self.detector or self.detector_threshold) and not phrases:
            raise ValueError("detector and detector_threshold have no effect without a region's phrase: remove them")
        return self


class Fit(Section):
    """What a method needs once per model: the Fisher information, diagonal or EK-FAC, as the variants ask for it."""

    draws: Positive = Field(10000, description="Draws of (image, caption, t, ε), one per-example gradient each.")
    chunk: Positive = Field(128, description="Draws that share a pass through the model.")
    given: str | None = Field(
        None,
        min_length=1,
        description="Folder that `forgetrace import-release` wrote: its Fisher information is taken, not estimated.",
        exclude_if=_unused,
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

    @model_validator(mode="before")
    @classmethod
    def _of_the_procedure(cls, given: object):
        procedure = given.get("procedure") if isinstance(given, dict) else None
        if procedure not in tuple(PROCEDURES):
            return given  # newton, or for the fields to refuse
        fixed = PROCEDURES[procedure]
        if useless := [k for k in ("curvature", "damping") if k in given and given[k] != fixed.get(k)]:
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
        exclude_if=_unused,
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
        exclude_if=_one,
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
        None, description="Unlearning variant it uses; by default the method's name (unlearning only)."
    )
    score: Literal["difference", "skew"] = Field(
        "difference", description="How a loss before and after becomes a score (unlearning only)."
    )
    flips: Literal["max", "mean"] | None = Field(
        None,
        description="Of an image and its mirror image, the larger score (max, the default) or the mean (unlearning, "
        "with encode.flips).",
        exclude_if=_unused,
    )
    weights: Subset | None = Field(
        None, description="Weights whose gradients count (gradient methods; by default all).", exclude_if=_unused
    )
    timesteps: Positive | None = Field(
        None, description="Evenly spaced timesteps a training image's gradients average over.", exclude_if=_unused
    )
    noises: Positive | None = Field(
        None,
        description="Noises per timestep for the gradients of a query, or that unet-features averages over (4).",
        exclude_if=_unused,
    )
    draws: Positive | None = Field(
        None,
        description="Draws of (t, ε) for the gradient of a query (influence; by default those of an unlearning step).",
        exclude_if=_unused,
    )
    dimension: Positive | None = Field(
        None, description="Dimension gradients are projected to (TRAK family).", exclude_if=_unused
    )
    damping: float | None = Field(
        None, ge=0, description="λ relative to the mean of what it is added to.", exclude_if=lambda value: value is None
    )
    curvature: Literal["diagonal", "ekfac"] | None = Field(
        None, description="Fisher whose inverse weighs the gradients (influence only).", exclude_if=_unused
    )
    unit_length: bool = Field(
        False,
        description="Scale the gradient of a training image to length 1 at every timestep (influence, datainf).",
        exclude_if=_unused,
    )
    methods: list[str] | None = Field(
        None, description="Other methods whose standardised scores are added up (ensemble only).", exclude_if=_unused
    )
    encoder: str | None = Field(
        None,
        description="Image encoder: efficientnet-lite0, or a model of transformers as owner/model, "
        "owner/model@revision or a folder.",
        exclude_if=_unused,
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


class Retrain(Section):
    """Leave-K-out models, trained from scratch with the recipe of θ0."""

    methods: list[str] = Field([], description="Methods judged by retraining (random is always judged).")
    k: list[Positive] = Field([200], min_length=1, description="How many top-ranked images to leave out.")
    random_draws: Positive = Field(3, description="Random sets per K, shared by all queries.")
    seeds: int = Field(2, ge=0, description="Retrainings on all images with other seeds: the noise floor.")
    keep_weights: bool = Field(False, description="Keep the weights of models whose measurements are kept anyway.")
    queries: Positive | None = Field(
        None,
        description="How many queries, in the order of the config, are judged by leaving images out (null: all). "
        "Those that remain serve the linear datamodeling score alone, such as queries that settings are chosen on.",
        exclude_if=_unused,
    )
    subsets: int = Field(
        0,
        ge=0,
        description="Models of random halves of the data, for the linear datamodeling score.",
        exclude_if=_unused,
    )
    subset_seeds: Positive = Field(
        1, description="Trainings of each half; from 2 on, how well they agree bounds the score.", exclude_if=_one
    )
    pools: int = Field(
        0,
        ge=0,
        description="Pooled protocol: the judged queries are dealt into so many pools, and the top images of a "
        "pool's queries are left out together (0: not done).",
        exclude_if=_unused,
    )
    pooled_k: list[Positive] = Field(
        [], description="Top-ranked images of each query that a pool leaves out.", exclude_if=_unused
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
        exclude_if=_unused,
    )
    precision_k: list[Positive] = Field(
        [],
        description="With regions left and right of dataset digit-pairs: how many top-ranked images are looked at for "
        "the digits and inks they share with each side.",
        exclude_if=_unused,
    )
    reference: str | None = Field(
        None,
        description="Method that the pooled protocol compares every other with, besides random.",
        exclude_if=_unused,
    )


class Figures(Section):
    """Plots and image grids."""

    top: Positive = Field(12, description="Top-ranked images shown per method.")


class Counts(Section):
    """How many concepts of a kind there are, each with a customised model; no concept is in two parts."""

    test: int = Field(0, ge=0, description="Models that methods are judged on.")
    validation: int = Field(0, ge=0, description="Models that settings are chosen on.")
    train: int = Field(0, ge=0, description="Models whose images features are learned from (learn).")


class PromptSet(Section):
    """Prompts about the concepts of a kind, with V* for the new token."""

    exemplar: str = Field(
        description="Prompt that exemplars are trained with; {ink} and {background} of an object and {digit} of a "
        "style are filled in."
    )
    template: list[str] = Field([], description="Prompts of one pattern that images are generated from.")
    free: list[str] = Field([], description="Free sentences that images are generated from.")

    @model_validator(mode="after")
    def _hold_the_token(self):
        prompts = [self.exemplar, *self.template, *self.free]
        if lacking := next((prompt for prompt in prompts if NEW_TOKEN not in prompt), None):
            raise ValueError(f"'{lacking}' lacks the new token {NEW_TOKEN}")
        if len(prompts) == 1:
            raise ValueError("give prompts to generate images from, under template or free")
        return self

    def queries(self) -> list[tuple[str, str]]:
        """Manner and prompt of every image that is generated, template first."""
        return [(manner, prompt) for manner in MANNERS for prompt in getattr(self, manner)]


class Customize(Section):
    """Custom Diffusion: models that θ0 becomes on a few exemplars, whose images have a known origin (AbC)."""

    objects: Counts = Counts()
    styles: Counts = Counts()
    prompts: dict[Literal["object", "style"], PromptSet] = Field(description="Prompts by kind of concept.")
    exemplars: Positive = Field(8, le=10, description="Exemplars of a style; an object has one.")
    weights: Subset = Field(
        "cross-attn-kv",
        description="Weights that are trained beside the token; cross-attn-kv is Custom Diffusion. A small model whose "
        "captions enter at few positions may need all of them to draw what it never saw.",
    )
    rare_token: str = Field("ktn", description="A token of the text encoder that the new token starts from.")
    steps: Positive = Field(250, description="Optimiser steps.")
    batch_size: Positive = Field(8, description="Draws of exemplars per step, and as many of the prior set.")
    learning_rate: float = Field(8e-5, gt=0, description="Learning rate of AdamW.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay of AdamW.")
    prior_images: Positive = Field(200, description="Images of D with their captions that are trained on alongside.")
    prior_weight: float = Field(1.0, ge=0, description="Weight of their loss.")
    flips: bool = Field(False, description="Train on mirror images of exemplars too; no good where letters are told.")

    @model_validator(mode="after")
    def _prompts_of_all(self):
        for kind, counts in (("object", self.objects), ("style", self.styles)):
            if any(counts.model_dump().values()) and kind not in self.prompts:
                raise ValueError(f"prompts lacks those of the kind {kind}, of which there are models")
        if not (self.objects.test or self.styles.test):
            raise ValueError("give objects or styles a number of models to test on")
        return self


class Costly(Section):
    """Methods that rank the candidates of some queries only."""

    methods: list[str] = Field([], description="Names of score.methods.")
    models: Positive = Field(1, description="Test models of each kind whose queries they rank for.")
    queries: Positive = Field(1, description="Queries of each of these models, spread over its prompts.")


class Retrieve(Section):
    """Find the exemplars of customised models among the whole base set, by every method of score."""

    costly: Costly = Costly()


class Learn(Section):
    """Features in which images of customised models are near their exemplars (AbC): two linear heads, learned."""

    encoder: str = Field("efficientnet-lite0", description="Frozen image encoder, as a method's option encoder.")
    kinds: list[Literal["object", "style"]] = Field(
        ["object"], min_length=1, description="Kinds of the train and validation models that are learned from."
    )
    temperature: float = Field(1.0, gt=0, description="ν of the contrastive loss.")
    learning_rate: float = Field(1e-3, gt=0, description="Learning rate of AdamW.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay of AdamW.")
    steps: Positive = Field(500, description="Optimiser steps; the weights kept are the best on validation models.")
    every: Positive = Field(25, description="Steps between looks at the validation models.")


class Config(Section):
    """One experiment."""

    seed: int = Field(0, ge=0, description="Seed every random number of the experiment derives from.")
    prepare: Prepare = Prepare()
    encode: Encode = Encode()
    train: Train = Train()
    synthesize: Synthesize = Synthesize()
    fit: Fit = Fit()
    unlearn: dict[Name, Variant] = Field({}, description="Unlearning variants by name.")
    scan: Scan = Scan()
    score: Score
    retrain: Retrain = Retrain()
    evaluate: Evaluate = Evaluate()
    figures: Figures = Figures()
    # Younger than finished results, which hang on none of these.
    customize: Customize | None = Field(None, exclude_if=_unused)
    retrieve: Retrieve | None = Field(None, exclude_if=_unused)
    learn: Learn | None = Field(None, exclude_if=_unused)

    @model_validator(mode="after")
    def _customised(self):
        if not self.customize:
            if asked := [key for key in ("retrieve", "learn") if getattr(self, key)]:
                raise ValueError(f"{asked[0]}: there are no customised models; give the section customize or remove it")
            return self
        for method in self.retrieve.costly.methods if self.retrieve else []:
            if method not in self.score.methods:
                raise ValueError(f"retrieve.costly.methods: '{method}' is not one of score.methods")
        if self.learn:
            if LEARNED in self.score.methods:
                raise ValueError(f"score.methods.{LEARNED}: the name belongs to the section learn; choose another")
            for part in ("train", "validation"):
                counts = sum(getattr(getattr(self.customize, f"{kind}s"), part) for kind in self.learn.kinds)
                if counts < 2:
                    raise ValueError(f"learn: needs two {part} models at least, of the kinds {self.learn.kinds}")
        if self.retrain.methods or self.retrain.subsets or self.retrain.pools:
            raise ValueError("retrain: customised models are judged by their exemplars; remove its keys")
        return self

    @property
    def leaves_out(self) -> bool:
        """Whether models are trained without some images: not where none can be, nor beside customised ones."""
        return self.train.trains and not self.customize

    @model_validator(mode="after")
    def _step_sizes(self):
        for name, variant in self.unlearn.items():
            if variant.step_size is None:
                rate = self.train.learning_rate / 10  # MUCS, section 4
                self.unlearn[name] = variant.model_copy(update={"step_size": rate})
        return self

    @model_validator(mode="after")
    def _coherent(self):
        if not self.train.trains and (
            asked := [k for k in ("methods", "subsets", "pools") if getattr(self.retrain, k)]
        ):
            raise ValueError(
                f"retrain.{asked[0]}: models without some images cannot be trained: {self.train.lacks}; or remove the "
                "key"
            )
        for method in self.retrain.methods:
            if method not in self.score.methods:
                raise ValueError(f"retrain.methods: '{method}' is not one of score.methods")
        if self.evaluate.reference and self.evaluate.reference not in self.score.methods:
            raise ValueError(f"evaluate.reference: '{self.evaluate.reference}' is not one of score.methods")
        for key in ("methods", "k", "pooled_k"):
            values = getattr(self.retrain, key)
            if len(set(values)) != len(values):
                raise ValueError(f"retrain.{key}: an entry occurs twice")
        for key, count in (
            ("scan.timesteps", 0 if self.scan.narrowing else self.scan.timesteps),
            ("synthesize.sampler_steps", self.synthesize.sampler_steps),
        ):
            if count > self.train.timesteps:
                raise ValueError(f"{key}: {count} is more than train.timesteps = {self.train.timesteps}")
        narrowing = self.scan.narrowing
        if narrowing and self.encode.flips:
            raise ValueError("scan.narrowing: not with encode.flips, whose images have two scores each; remove one")
        if narrowing and (missing := [k for k in self.retrain.k if k not in narrowing.tops]):
            raise ValueError(f"scan.narrowing.tops: {missing[0]} of retrain.k is not among them")
        names = self.queries()
        if bool(names) == bool(self.customize):
            raise ValueError(
                "'synthesize.queries': " + ("give none ([]), customize names its own" if names else "give one at least")
            )
        self._check_given()
        self._check_regions()
        if self.evaluate.others and not (self.unlearn and self.forgotten_queries()):
            raise ValueError("evaluate.others: there is no unlearning variant, or no generated query, to look at")
        if (self.retrain.queries or 0) > len(names):
            raise ValueError(f"retrain.queries: the experiment has only {len(names)}")
        if self.retrain.pools > len(self.judged_queries()):
            raise ValueError(f"retrain.pools: only {len(self.judged_queries())} queries are judged")
        if bool(self.retrain.pools) != bool(self.retrain.pooled_k):
            raise ValueError("retrain.pools and retrain.pooled_k go together")
        if taken := [name for name in names if re.fullmatch(r"(draw|pool)\d+", name)]:
            raise ValueError(f"synthesize.queries: the name '{taken[0]}' belongs to models of the evaluation")
        if len(set(names)) != len(names):
            raise ValueError("synthesize.queries: two queries have the same name")
        for pool in self.synthesize.queries:
            if not isinstance(pool, PoolQueries):
                continue
            size = getattr(self.prepare, f"{pool.pool}_captions")
            if pool.count > size:
                raise ValueError(
                    f"synthesize.queries: the pool '{pool.pool}' has only {size} captions, not {pool.count}"
                )
        return self

    def _check_regions(self) -> None:
        """Refuse regions of unknown queries, and precision where nothing tells what is in a region."""
        for name, region in self.synthesize.regions.items():
            if unknown := sorted(set(region.queries or []) - set(self.whole_queries())):
                raise ValueError(
                    f"synthesize.regions.{name}.queries: there is no query '{unknown[0]}' "
                    f"(there are {', '.join(self.whole_queries())})"
                )
        if self.evaluate.precision_k and (
            self.prepare.dataset != "digit-pairs" or set(self.synthesize.regions) != {"left", "right"}
        ):
            raise ValueError(
                "evaluate.precision_k: only the dataset digit-pairs says what is in which part of an image, for the "
                "regions left and right; remove the key"
            )

    def _check_given(self) -> None:
        """Refuse what published latents and token states cannot serve."""
        if not self.encode.given:
            return
        if self.prepare.tuning_captions or self.prepare.report_captions:
            raise ValueError(
                "encode.given: all images are in it, none can be held out; set prepare.tuning_captions and "
                "prepare.report_captions to 0"
            )
        if self.encode.pipeline:
            return
        own = next((entry.name for entry in self.synthesize.queries if isinstance(entry, ImageQuery)), None)
        empty = "the state of the empty caption is not in encode.given"
        for refused, what in (
            (own, f"synthesize.queries: the image '{own}' cannot be encoded with encode.given alone"),
            (self.synthesize.guidance != 1, f"synthesize.guidance: {empty}; leave guidance at 1"),
            (self.evaluate.others, f"evaluate.others: nothing can be generated, {empty}"),
            (self.train.trains and self.train.caption_dropout, f"train.caption_dropout: {empty}; set it to 0"),
        ):
            if refused:
                raise ValueError(f"{what}, or name the Stable Diffusion pipeline it was made with in encode.pipeline")

    def queries(self) -> list[str]:
        """Names of all queries, in the order of the config; those of its regions follow a query."""
        return [name for whole in self.whole_queries() for name in (whole, *self.regions_of(whole).values())]

    def whole_queries(self) -> list[str]:
        """Names of the queries that are whole images, in the order of the config."""
        return [name for entry in self.synthesize.queries for name in entry.names()]

    def regions_of(self, whole: str) -> dict[str, str]:
        """The queries that are regions of a whole image, by the region's name."""
        regions = self.synthesize.regions.items()
        return {name: f"{whole}-{name}" for name, region in regions if not region.queries or whole in region.queries}

    def region(self, query: str) -> tuple[str, str] | None:
        """The whole query and the name of the region that a query stands for; None of a whole image."""
        if not self.synthesize.regions or query in (wholes := self.whole_queries()):
            return None
        found = ((whole, name) for whole in wholes for name, own in self.regions_of(whole).items() if own == query)
        return next(found, None)

    def whole(self, query: str) -> str:
        """The query whose image a query is a region of; of a whole image, itself."""
        region = self.region(query)
        return region[0] if region else query

    def judged_queries(self) -> list[str]:
        """Names of the queries with leave-K-out models; none where no model can be trained."""
        return self.queries()[: self.retrain.queries] if self.leaves_out else []

    def origin(self, query: str) -> str:
        """Where a query is from: its caption pool (tuning or report), ``own`` for an image that was given."""
        return self.whole(query).rpartition("-")[0] if self.generates(query) else "own"

    def reported_queries(self) -> list[str]:
        """Names of the queries of the report pool, on which methods are compared; of all where there are none."""
        return [query for query in self.queries() if self.origin(query) == "report"] or self.queries()

    def forgotten_queries(self) -> list[str]:
        """Names of the reported queries that are generated again after unlearning; a given image cannot be."""
        return [query for query in self.reported_queries() if self.generates(query)]

    def image_query(self, name: str) -> ImageQuery | None:
        """The user's image behind a query, or None where the query is another kind's."""
        name = self.whole(name)
        own = (q for q in self.synthesize.queries if isinstance(q, ImageQuery) and q.name == name)
        return next(own, None)

    def given_query(self, name: str) -> tuple[GivenQueries, int] | None:
        """The published set a query is from and its number there, or None where it is another kind's."""
        name = self.whole(name)
        sets = (entry for entry in self.synthesize.queries if isinstance(entry, GivenQueries))
        return next(((entry, entry.names().index(name)) for entry in sets if name in entry.names()), None)

    def generates(self, name: str) -> bool:
        """Whether a query is generated here, so that its initial noise is known and it can be generated again."""
        return not self.image_query(name) and not self.given_query(name)

    def digest_of(self, *sections: str) -> dict:
        """The named sections as plain data: what an output records of the config that made it."""
        plain = self.model_dump(mode="json")
        return {section: plain[section] for section in sections}


def load_config(path: str | Path) -> Config:
    """Read and validate ``config/<experiment>.yaml``.

    Raises:
        UserError: the file is missing, is no YAML mapping, or a key or value is wrong; the
            message names file and key.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise UserError(f"Cannot read the config {path}: {error.strerror}.") from None
    except yaml.YAMLError as error:
        where = re.sub(r"\s+", " ", str(error))
        raise UserError(f"{path} is not valid YAML: {where}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold sections such as 'train:' and 'score:', see config/README.md.")
    return parse_config(content, path)


def parse_config(content: dict, path: str | Path) -> Config:
    """Validate an already parsed config; ``path`` is only named in errors.

    Raises:
        UserError: one sentence per wrong key or value.
    """
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        lines = "; ".join(_sentence(problem) for problem in error.errors())
        raise UserError(f"{path}: {lines} (every key is explained in config/README.md).") from None


def _sentence(problem: dict) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}'"
    message = problem["msg"].removeprefix("Value error, ")
    return f"'{key}': {message}" if key else message


def quoted(text: str) -> str:
    """Any text as YAML on one line, also within braces."""
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=float("inf")).rstrip("\n")
