"""What every dataset source gives to the ``prepare`` stage."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Example:
    """One captioned image that the source makes.

    Attributes:
        id: stable, unique, safe as a file name.
        image: shape (height, width, 3), uint8, sRGB.
        caption: one caption, or several for the same image.
    """

    id: str
    image: np.ndarray
    caption: str | list[str]


@dataclass(frozen=True)
class Reference:
    """One captioned image that stays where it is.

    Attributes:
        id: stable, unique.
        file_name: below the images' folder, with forward slashes.
        caption: one caption, or several for the same image.
        place: where it is listed, for messages, such as ``line 7``.
        order: what messages are sorted by.
        sha256: of the file's bytes, once it has been looked at.
    """

    id: str
    file_name: str
    caption: str | list[str]
    place: str
    order: int
    sha256: str | None = None


class Problem(NamedTuple):
    """Why one entry of a list cannot be used; problems are told all at once, by their order in the list."""

    order: int
    text: str


class Listing(NamedTuple):
    """What a file says of images that stay where they are.

    Attributes:
        file: that file.
        references: what can be used, in the file's order.
        problems: what cannot.
    """

    file: str
    references: list[Reference]
    problems: list[Problem]


def captions_of(text: str | list[str]) -> list[str]:
    """The captions of an image that has one or several."""
    return [text] if isinstance(text, str) else text


def one_or_list(captions: list[str]) -> str | list[str]:
    """The inverse of :func:`captions_of`."""
    return captions[0] if len(captions) == 1 else captions
