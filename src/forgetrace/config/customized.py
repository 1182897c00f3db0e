"""The sections ``customize``, ``retrieve`` and ``learn``: models whose exemplars are known."""

from typing import Literal

from pydantic import Field, model_validator

from forgetrace.config.base import MANNERS, PLAIN, Positive, Section, Subset, check_prompts, unused


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
    plain: list[str] = Field(
        [],
        description="Prompts without V*, to see whether exemplars are found where nobody asked for the concept.",
        exclude_if=unused,
    )

    @model_validator(mode="after")
    def _hold_the_token(self):
        check_prompts([self.exemplar], self.queries())
        return self

    def queries(self) -> list[tuple[str, str]]:
        """Manner and prompt of every image that is generated, template first."""
        return [(manner, prompt) for manner in (*MANNERS, PLAIN) for prompt in getattr(self, manner)]


class Customize(Section):
    """Custom Diffusion: models that θ0 becomes on a few exemplars, whose images have a known origin (AbC)."""

    objects: Counts = Counts()
    styles: Counts = Counts()
    prompts: dict[Literal["object", "style"], PromptSet] = Field({}, description="Prompts by kind of concept.")
    given: str | None = Field(
        None,
        min_length=1,
        description="List of concepts of one's own instead of objects, styles and prompts, a JSON file "
        "(docs/customized.md); of models that are there too.",
        exclude_if=unused,
    )
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
        if self.given:
            if useless := sorted({"objects", "styles", "prompts", "exemplars"} & self.model_fields_set):
                raise ValueError(f"{useless[0]} has no effect with given: remove it")
            return self
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
    queries: Positive = Field(
        1, description="Queries of each of these models, spread over its prompts; beside them all of plain prompts."
    )


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
