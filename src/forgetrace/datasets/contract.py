"""What every dataset source gives to the ``prepare`` stage."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Example:
    """One captioned image.

    Attributes:
        id: stable, unique, safe as a file name.
        image: shape (height, width, 3), uint8, sRGB.
        caption: one caption, or several for the same image.
    """

    id: str
    image: np.ndarray
    caption: str | list[str]
