"""What the sections of a config have in common: kinds of values, names that mean something, the base class."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

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
PLAIN = "plain"  # manner of prompts about something else, a control
LEARNED = "learned"  # the method whose features are learned from customised models
HALF_SET = "half"  # the "method" of models trained on random halves of D
CEILING = "ceiling"  # the row of the linear datamodeling score that noise of training leaves to a perfect method


def unused(value: object) -> bool:
    """Whether an option younger than finished results is off: then it is no part of what they hang on."""
    return not value


def is_one(value: int) -> bool:
    """The same for an option whose absence is 1."""
    return value == 1


def check_prompts(shown: list[str], queries: list[tuple[str, str]]) -> None:
    """Check that prompts about a concept hold the new token, and no others do.

    Args:
        shown: prompts of exemplars.
        queries: manner and prompt of the images.

    Raises:
        ValueError: a prompt lacks the token or holds it, or no image is about the concept.
    """
    about = [prompt for manner, prompt in queries if manner != PLAIN]
    if lacking := next((prompt for prompt in [*shown, *about] if NEW_TOKEN not in prompt), None):
        raise ValueError(f"'{lacking}' lacks the new token {NEW_TOKEN}")
    if holding := next((prompt for manner, prompt in queries if manner == PLAIN and NEW_TOKEN in prompt), None):
        raise ValueError(f"'{holding}' holds the new token {NEW_TOKEN}, and prompts of the manner {PLAIN} do without")
    if not about:
        raise ValueError("give prompts with V* to generate images from, of the manners template or free")


class Section(BaseModel):
    """Base of all sections: an unknown key is an error, values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
