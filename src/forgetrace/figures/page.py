"""A page measured in inches from its top left corner, for grids of images and short texts."""

import textwrap
from unicodedata import east_asian_width

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from forgetrace.figures.style import FAINT, INK, MUTED, PAPER

# 0.8 inches are 128 pixels at the figures' resolution: pixels of a 16x16 image become 8x8 squares.
TILE = 0.8
LETTER = 0.66  # width of a letter of bold print, over its size
SECOND = "\ue000"  # stands for the other half of a wide letter while a text is broken into lines; in no text itself


class Page:
    """A figure onto which images and texts are placed by position.

    Attributes:
        figure: the matplotlib figure.
        width: in inches.
        height: in inches.
    """

    def __init__(self, width: float, height: float) -> None:
        # Whole pixels, so that tiles placed on whole pixels stay sharp.
        self.width, self.height = _whole_pixels(width), _whole_pixels(height)
        self.figure = Figure(figsize=(self.width, self.height), facecolor=PAPER)
        # One invisible coordinate system in inches carries everything.
        self._axes = self.figure.add_axes((0, 0, 1, 1))
        self._axes.set(xlim=(0, self.width), ylim=(self.height, 0), autoscale_on=False)
        self._axes.set_axis_off()

    def image(self, x: float, y: float, size: float, pixels: np.ndarray) -> None:
        """Place an image, nearest-neighbour upscaled, without a border.

        Args:
            x: left edge in inches.
            y: top edge in inches.
            size: longer edge in inches.
            pixels: shape (height, width, 3), uint8.
        """
        height, width = np.array(pixels.shape[:2]) * size / max(pixels.shape[:2])
        left, top = _whole_pixels(x), _whole_pixels(y)
        extent = (left, left + width, top + height, top)
        self._axes.imshow(pixels, extent=extent, interpolation="nearest", aspect="auto")

    def border(self, x: float, y: float, size: float, colour: str) -> None:
        """Mark the square image that is placed there; drawn below images, whatever comes first."""
        left, top, width = _whole_pixels(x), _whole_pixels(y), 0.03
        square = Rectangle((left - width, top - width), size + 2 * width, size + 2 * width, facecolor=colour, zorder=-1)
        self._axes.add_patch(square)

    def outline(self, x: float, y: float, pixel: float, inside: np.ndarray, colour: str) -> None:
        """Draw the border of a part of an image placed at (x, y).

        Args:
            x: left edge of the image in inches.
            y: top edge of the image in inches.
            pixel: side of a pixel of it in inches.
            inside: the part, shape (height, width), bool.
            colour: of the line, which runs just inside the part.
        """
        left, top, inset = _whole_pixels(x), _whole_pixels(y), 0.02
        padded = np.pad(inside, 1)
        for row, column in np.argwhere(inside):
            x0, y0 = left + column * pixel, top + row * pixel
            x1, y1 = x0 + pixel, y0 + pixel
            neighbours = padded[row, column + 1], padded[row + 2, column + 1], padded[row + 1, column]
            edges = [
                ([x0, x1], [y0 + inset] * 2),
                ([x0, x1], [y1 - inset] * 2),
                ([x0 + inset] * 2, [y0, y1]),
                ([x1 - inset] * 2, [y0, y1]),
            ]
            for edge, there in zip(edges, (*neighbours, padded[row + 1, column + 2]), strict=True):
                if not there:
                    self._axes.plot(*edge, color=colour, linewidth=2.0, solid_capstyle="projecting")

    def blank(self, x: float, y: float, size: float, text: str) -> None:
        """Place a grey square with a text where there is no image to show."""
        self.image(x, y, size, np.full((1, 1, 3), 222, dtype=np.uint8))
        self.text(x + size / 2, y + size / 2, text, size=6.5, colour=MUTED, align="center", middle=True)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 8.0,
        colour: str = INK,
        align: str = "left",
        weight: str = "normal",
        middle: bool = False,
    ) -> None:
        """Place a text whose top (or middle) is at y inches.

        Args:
            x: left edge, centre or right edge in inches, by ``align``.
            y: top edge in inches, or the middle where ``middle`` is set.
            text: may hold several lines.
            size: in points.
            colour: of the letters.
            align: ``left``, ``center`` or ``right``.
            weight: ``normal`` or ``bold``.
            middle: whether y is the middle of the text.
        """
        self._axes.text(
            x,
            y,
            text.replace("$", r"\$"),  # a prompt is no formula
            size=size,
            color=colour,
            ha=align,
            va="center" if middle else "top",
            weight=weight,
            linespacing=1.25,
        )

    def rule(self, x0: float, x1: float, y: float, colour: str = FAINT, width: float = 1.0) -> None:
        """Draw a horizontal line from x0 to x1 inches at y inches; ``width`` in points."""
        self._axes.plot([x0, x1], [y, y], color=colour, linewidth=width, solid_capstyle="butt")


def lines(text: str, inches: float, size: float, most: int | None = None) -> list[str]:
    """A text broken into lines that fit a width; with ``most`` lines it ends in an ellipsis where it is longer.

    Letters are taken to be as wide as those of bold print, East Asian ones as two; ``size`` in points.
    """
    letters = max(3, int(72 * inches / (LETTER * size)))
    counted = "".join(letter + SECOND * (east_asian_width(letter) in "WF") for letter in text)
    return [line.replace(SECOND, "") for line in textwrap.wrap(counted, letters, max_lines=most, placeholder=" …")]


def _whole_pixels(inches: float) -> float:
    return round(inches * mpl.rcParams["figure.dpi"]) / mpl.rcParams["figure.dpi"]
