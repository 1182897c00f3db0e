"""The section ``train``."""

from typing import Literal

from pydantic import Field, model_validator

from forgetrace.config.base import Positive, Section, unused

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
        "auto",
        description="Training precision; auto takes that of the θ0 that is there, else bf16 where the hardware "
        "multiplies it natively.",
    )
    pretrained: str | None = Field(
        None,
        description="θ0 itself, which then is not trained: a folder in diffusers' layout (unet/, scheduler/), or a "
        "model of the Hugging Face hub.",
        exclude_if=unused,
    )
    lora: str | None = Field(
        None,
        description="LoRA weights in diffusers' format (a file or its folder) that are merged into pretrained; needs "
        "the extra `lora`.",
        exclude_if=unused,
    )
    parent: str | None = Field(
        None,
        description="What training starts from instead of random weights, named like pretrained; with pretrained, "
        "what that was fine-tuned from by the recipe of this section, whose steps, batch_size and learning_rate must "
        "be given: without them leave-K-out models are impossible.",
        exclude_if=unused,
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
