"""A list of concepts of one's own (``customize.given``), a JSON file: exemplars, prompts, and maybe finished models."""

import functools
import json
from pathlib import Path
from typing import Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from forgetrace.artifacts import UserError
from forgetrace.config.base import Name, Section, check_prompts

SHOWN = "docs/customized.md shows what such a list is"


class GivenImage(Section):
    """An exemplar and the prompt it is trained with."""

    image: str
    prompt: str


class GivenQuery(Section):
    """A prompt, and of a finished model maybe the image it made of it."""

    manner: Literal["template", "free", "plain"] = "free"
    prompt: str
    image: str | None = None


class GivenConcept(Section):
    """A concept; with ``weights`` and ``token`` the model is there and is not trained."""

    name: Name
    kind: Literal["object", "style"]
    part: Literal["test", "validation", "train"] = "test"
    exemplars: list[GivenImage] = Field(min_length=1)
    queries: list[GivenQuery] = Field(min_length=1)
    weights: str | None = None
    token: str | None = None

    @model_validator(mode="after")
    def _coherent(self):
        if bool(self.weights) != bool(self.token):
            raise ValueError("weights and token go together: give both of a finished model, or neither")
        images = [query.image for query in self.queries if query.image]
        if images and not self.weights:
            raise ValueError("queries with an image need the weights of the model that made it")
        if images and len(images) != len(self.queries):
            raise ValueError("give an image of every query, or of none")
        shown = [entry.prompt for entry in self.exemplars]
        check_prompts(shown, [(query.manner, query.prompt) for query in self.queries])
        return self

    @property
    def model(self) -> str:
        """Name of the customised model."""
        return f"{self.kind}-{self.name}"

    @property
    def files(self) -> list[str]:
        """All files of the concept, as the list names them."""
        images = [entry.image for entry in [*self.exemplars, *self.queries] if entry.image]
        return [*images, *(path for path in (self.weights, self.token) if path)]


def read_concepts(path: str) -> dict[str, GivenConcept]:
    """The listed concepts by model.

    Raises:
        UserError: the list is missing or wrong, or two concepts have one name.
    """
    try:
        return _read(path, Path(path).stat().st_mtime_ns)
    except FileNotFoundError:
        raise UserError(f"customize.given: there is no {path}; {SHOWN}.") from None
    except OSError as error:
        raise UserError(f"customize.given: {path} cannot be read ({error.strerror}); {SHOWN}.") from None


@functools.lru_cache(maxsize=4)
def _read(path: str, modified: int) -> dict[str, GivenConcept]:
    try:
        listed = TypeAdapter(list[GivenConcept]).validate_python(json.loads(Path(path).read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}." for part in first["loc"]).rstrip(".")
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}{place and f', entry {place}'}: {message}; {SHOWN}.") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON file ({error}).") from None
    concepts = {concept.model: concept for concept in listed}
    if len(concepts) != len(listed) or not listed:
        raise UserError(f"{path} must list concepts, each of another kind and name.")
    if not any(concept.part == "test" for concept in listed):
        raise UserError(f"{path} has no concept of the part test, so nothing would be judged.")
    return concepts
