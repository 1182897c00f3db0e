"""The section ``synthesize``: which queries, and which parts of their images."""

from typing import Literal

from pydantic import Field, model_validator

from forgetrace.config.base import Box, Name, Positive, Section, Share, unused


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
        exclude_if=unused,
    )
    detector: str | None = Field(
        None,
        min_length=1,
        description="GroundingDINO that finds the phrases of regions: a model of transformers as owner/model, "
        "owner/model@revision or a folder.",
        exclude_if=unused,
    )
    detector_threshold: Share | None = Field(
        None,
        description="Confidence from which a box of the detector counts (0.3 where it is not given).",
        exclude_if=unused,
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
