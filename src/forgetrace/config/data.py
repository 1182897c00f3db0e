"""The sections ``prepare`` and ``encode``."""

from typing import Literal

from pydantic import Field, model_validator

from forgetrace.config.base import BUNDLED, Positive, Section, unused


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
        exclude_if=unused,
    )
    size: Positive | None = Field(
        None,
        description="Side in pixels of the squares that images are cropped to at the centre and resized to (folder: "
        "required; coco: 128).",
        exclude_if=unused,
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
        exclude_if=unused,
    )
    tokens: Positive | None = Field(
        None,
        description="Tokens of a caption whose states are kept (null: with clip all 77, with minilm those of the "
        "longest caption).",
        exclude_if=unused,
    )
    max_images: Positive | None = Field(
        None, description="Use only this many training images, drawn with the experiment's seed (null: all)."
    )

    flips: bool = Field(
        False,
        description="Train on mirror images too: each draw of an image is flipped with probability 1/2.",
        exclude_if=unused,
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
        exclude_if=unused,
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
        if self.tokens and self.tokens > (most := {"minilm": 512, "clip": 77}[self.text_encoder]):
            raise ValueError(f"tokens: {self.text_encoder} takes at most {most}, not {self.tokens}")
        return self
