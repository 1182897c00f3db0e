"""Concepts the digits know nothing of: what models are customised on, and so the ground truth of what they make.

An *object* is one glyph that is no digit (a letter, a chess piece, a symbol) in one ink on one background of the base
set: a single exemplar. A *style* is a way to paint (checkered ink, outlines, gradients …), shown by several digits of a
typeface. Glyphs come from the fonts that matplotlib ships, reduced from large print by area averages. Everything is a
pure function of those files and of the seed. Instead of these a config may name a list of concepts of one's own
(:mod:`forgetrace.config.concepts`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from forgetrace.artifacts import UserError
from forgetrace.config import PLAIN, Customize, GivenConcept, read_concepts
from forgetrace.datasets.digits import BACKGROUNDS, DIGITS, INKS, paint
from forgetrace.datasets.images import read_square
from forgetrace.randomness import generator

Kind = Literal["object", "style"]
PRINT, FILLED = 8, 0.8  # pixels of large print per pixel; share of the square that a glyph's longer side takes
SANS, MATHS = "DejaVuSans-Bold.ttf", "STIXGeneralBol.ttf"
# Glyphs that no digit looks like at 16x16; the letters B, I, O, S and Z are left out for it.
GLYPHS: dict[str, tuple[str, str]] = {
    **{f"letter-{letter.lower()}": (letter, SANS) for letter in "ACEFHKMNPRTUWXY"},
    "zhe": ("Ж", SANS), "ya": ("Я", SANS), "ef": ("Ф", SANS), "shcha": ("Щ", SANS), "yu": ("Ю", SANS),
    "de": ("Д", SANS), "omega": ("Ω", SANS), "psi": ("Ψ", SANS), "sigma": ("Σ", SANS), "xi": ("Ξ", SANS),
    "pi": ("Π", SANS), "theta": ("Θ", SANS), "lambda": ("Λ", SANS), "aleph": ("ℵ", MATHS), "alpha": ("α", MATHS),
    "king": ("♚", SANS), "queen": ("♛", SANS), "rook": ("♜", SANS), "bishop": ("♝", SANS), "knight": ("♞", SANS),
    "spade": ("♠", SANS), "heart": ("♥", SANS), "club": ("♣", SANS), "diamond": ("♦", SANS), "star": ("★", SANS),
    "umbrella": ("☂", SANS), "telephone": ("☎", SANS), "plane": ("✈", SANS), "note": ("♫", SANS), "sun": ("☀", SANS),
    "euro": ("€", SANS), "ampersand": ("&", SANS), "hash": ("#", SANS), "percent": ("%", SANS), "at": ("@", SANS),
    "anchor": ("⚓", SANS), "scissors": ("✂", SANS), "smile": ("☻", SANS), "arrow": ("➔", SANS),
    "integral": ("∮", MATHS), "infinity": ("∞", MATHS), "check": ("✔", SANS), "cross": ("✚", SANS),
    "moon": ("☾", SANS), "skull": ("☠", SANS), "radiation": ("☢", SANS), "yin-yang": ("☯", SANS),
    "section": ("§", SANS), "yen": ("¥", SANS), "flag": ("⚑", SANS),
}  # fmt: skip


@dataclass(frozen=True)
class Exemplar:
    """An image a model is customised on.

    Attributes:
        image: (size, size, 3), uint8.
        caption: the prompt it is trained with; holds the new token.
    """

    image: np.ndarray
    caption: str


@dataclass(frozen=True)
class Concept:
    """What one customised model is about.

    Attributes:
        name: of the glyph or style, behind its kind: ``object-king``.
        kind: object or style.
        exemplars: one, or several.
        weights: file of the changed weights of a model that is there; None: it is to be trained.
        token: file of the embedding of its new token.
        queries: its images, each (size, size, 3), uint8; None: it is to generate them.
    """

    name: str
    kind: Kind
    exemplars: list[Exemplar]
    weights: str | None = None
    token: str | None = None
    queries: list[np.ndarray] | None = None


def names(settings: Customize, seed: int) -> dict[str, list[str]]:
    """Names of the concepts of each part, in order, disjoint: the same whatever other parts hold.

    Args:
        settings: how many of each kind the parts ``test``, ``validation`` and ``train`` have.
        seed: the experiment's.

    Raises:
        UserError: there are not so many.
    """
    parts: dict[str, list[str]] = {"test": [], "validation": [], "train": []}
    if settings.given:
        for model, given in read_concepts(settings.given).items():
            parts[given.part].append(model)
        return parts
    for kind, known, counts in (("object", GLYPHS, settings.objects), ("style", STYLES, settings.styles)):
        asked = counts.model_dump()
        if (total := sum(asked.values())) > len(known):
            raise UserError(f"customize.{kind}s asks for {total} concepts, there are only {len(known)}: lower a count.")
        order = [f"{kind}-{list(known)[i]}" for i in generator(seed, "concepts", kind).permutation(len(known))]
        # Train takes from the other end: more models to train on leave the models that are judged as they are.
        parts["test"] += order[: asked["test"]]
        parts["validation"] += order[asked["test"] :][: asked["validation"]]
        parts["train"] += order[::-1][: asked["train"]]
    return parts


def check_concepts(settings: Customize, seed: int, shape: list[int]) -> None:
    """Check before anything runs that all concepts can be drawn and captioned.

    Raises:
        UserError: there are not so many, a caption has a place that cannot be filled, files are missing, or images are
            no squares.
    """
    parts = names(settings, seed)
    files = [file for part in parts.values() for model in part for file in given_files(settings, model)]
    if missing := [file for file in files if not Path(file).exists()]:
        raise UserError(
            f"{settings.given} names {len(missing)} files that are not there, such as {missing[0]}: paths in it are "
            "relative to its own folder."
        )
    if shape[0] != shape[1]:
        raise UserError(f"customize: concepts are drawn as squares, the images here are {shape[0]}x{shape[1]}.")
    for name in {name.partition("-")[0]: name for part in parts.values() for name in part}.values():
        concept(name, settings, seed, shape[0])


def check_learnable(settings: Customize, seed: int, kinds: list[str]) -> None:
    """Check that features can be learned.

    Raises:
        UserError: there are fewer than two train or validation models of the kinds that are learned from.
    """
    for part, models in names(settings, seed).items():
        count = sum(model.partition("-")[0] in kinds for model in models)
        if part != "test" and count < 2:
            place = settings.given or "customize.objects or styles"
            raise UserError(
                f"learn: needs two {part} models at least, of the kinds {', '.join(kinds)}, and has {count}: add such "
                f"models to {place}, or remove the section learn."
            )


def queries(settings: Customize, model: str) -> list[tuple[str, str]]:
    """Manner and prompt of every image that a customised model generates."""
    if settings.given:
        return [(query.manner, query.prompt) for query in read_concepts(settings.given)[model].queries]
    return settings.prompts[model.partition("-")[0]].queries()


def query_manners(settings: Customize, model: str) -> dict[str, str]:
    """The manner of the prompt of each image that the model customised on a concept generates, by the image's name."""
    return {f"{model}-{i:02d}": manner for i, (manner, _) in enumerate(queries(settings, model))}


def query_names(settings: Customize, model: str) -> list[str]:
    """Names of these images."""
    return list(query_manners(settings, model))


def of_concept(manners: dict[str, str]) -> list[str]:
    """Those of images by manner that the concept is asked for in."""
    return [query for query, manner in manners.items() if manner != PLAIN]


def exemplar_count(settings: Customize, model: str) -> int:
    """How many exemplars a model has."""
    if settings.given:
        return len(read_concepts(settings.given)[model].exemplars)
    return settings.exemplars if model.startswith("style") else 1


def given_files(settings: Customize, model: str) -> list[str]:
    """The files of one's own that a model is made from; none of a concept that is drawn here."""
    if not settings.given:
        return []
    return [_beside(settings.given, file) for file in read_concepts(settings.given)[model].files]


def _beside(path: str, file: str) -> str:
    """A file as a list names it: where that lies, unless the name says where."""
    return (Path(path).parent / file).as_posix()


def shaping(settings: Customize, model: str) -> dict:
    """What of the config a customised model hangs on: not how many models there are, nor others' prompts."""
    recipe = settings.model_dump(mode="json", exclude={"objects", "styles", "prompts", "given"})
    if settings.given:
        return {"recipe": recipe, "concept": read_concepts(settings.given)[model].model_dump(mode="json")}
    return {"recipe": recipe, "prompts": settings.prompts[model.partition("-")[0]].model_dump(mode="json")}


def concept(name: str, settings: Customize, seed: int, size: int) -> Concept:
    """The concept of a name that :func:`names` gives.

    Args:
        name: ``object-<glyph>`` or ``style-<style>``.
        settings: how many exemplars a style has and how they are captioned.
        seed: the experiment's; draws ink, background and digits.
        size: side of the images in pixels.
    """
    if settings.given:
        return _given(settings.given, read_concepts(settings.given)[name], size)
    kind, _, own = name.partition("-")
    random = generator(seed, "concept", name)
    caption = settings.prompts[kind].exemplar
    if kind == "object":
        ink, background = (str(random.choice(list(colours))) for colours in (INKS, BACKGROUNDS))
        image = paint(glyph(*GLYPHS[own], size), INKS[ink], BACKGROUNDS[background])
        return Concept(name, kind, [Exemplar(image, _filled(caption, ink=ink, background=background))])
    digits = random.permutation(len(DIGITS))[: settings.exemplars]
    return Concept(
        name,
        kind,
        [Exemplar(STYLES[own](glyph(str(d), SANS, size)), _filled(caption, digit=DIGITS[d])) for d in digits],
    )


def _given(path: str, listed: GivenConcept, size: int) -> Concept:
    """A concept of one's own."""
    exemplars = [Exemplar(read_square(_beside(path, entry.image), size), entry.prompt) for entry in listed.exemplars]
    shown = [read_square(_beside(path, query.image), size) for query in listed.queries if query.image]
    finished = [file and _beside(path, file) for file in (listed.weights, listed.token)]
    return Concept(listed.model, listed.kind, exemplars, *finished, queries=shown or None)


def _filled(template: str, **values: str) -> str:
    try:
        return template.format(**values)
    except (KeyError, IndexError, ValueError):
        raise UserError(
            f"customize.prompts: '{template}' has a place that cannot be filled; there are "
            f"{', '.join(values)}, in braces."
        ) from None


def glyph(text: str, font: str, size: int) -> np.ndarray:
    """Coverage in [0, 1] of a glyph that is centred and fills most of the square; (size, size), float64.

    Raises:
        UserError: matplotlib's font is missing.
    """
    side = size * PRINT
    try:
        face = ImageFont.truetype(_font_file(font), side)
    except OSError:
        raise UserError(f"matplotlib's font {font} is missing: reinstall with `make environment`.") from None
    mask = Image.new("L", (3 * side, 3 * side))
    ImageDraw.Draw(mask).text((side, side), text, fill=255, font=face)
    drawn = mask.crop(mask.getbbox())
    scale = FILLED * side / max(drawn.size)
    drawn = drawn.resize([max(1, round(edge * scale)) for edge in drawn.size], Image.Resampling.BOX)
    square = Image.new("L", (side, side))
    square.paste(drawn, tuple((side - edge) // 2 for edge in drawn.size))
    return np.asarray(square, dtype=float).reshape(size, PRINT, size, PRINT).mean(axis=(1, 3)) / 255


def _font_file(font: str) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path(), "fonts", "ttf", font)


# Styles: coverage (size, size) -> image (size, size, 3), uint8. Lengths are in sixteenths of the side.

Colour = tuple[int, int, int]
Style = Callable[[np.ndarray], np.ndarray]


def _grid(coverage: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels, in sixteenths of the side."""
    return tuple(np.indices(coverage.shape) * 16 // len(coverage))


def _mixed(share: np.ndarray, one: Colour, other: Colour) -> np.ndarray:
    """Share · one + (1 - share) · other; (size, size) -> (size, size, 3), float64."""
    return share[..., None] * np.array(one, dtype=float) + (1 - share[..., None]) * np.array(other, dtype=float)


def _over(coverage: np.ndarray, ink: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Ink over a background, both images or colours."""
    return np.rint(coverage[..., None] * ink + (1 - coverage[..., None]) * background).astype(np.uint8)


def _patterned_ink(pattern: Callable, one: Colour, other: Colour, background: Colour) -> Style:
    """A digit whose ink has a pattern."""
    return lambda c: _over(c, _mixed(pattern(*_grid(c)), one, other), np.array(background))


def _patterned_ground(pattern: Callable, one: Colour, other: Colour, ink: Colour) -> Style:
    """A digit on a patterned background."""
    return lambda c: _over(c, np.array(ink), _mixed(pattern(*_grid(c)), one, other))


def _checker(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    return ((y // 2 + x // 2) % 2).astype(float)


def _rows(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    return (y // 2 % 2).astype(float)


def _columns(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    return (x // 2 % 2).astype(float)


def _diagonals(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    return ((y + x) // 3 % 2).astype(float)


def _down(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    return y / 15


def _across(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    return x / 15


def _rings(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    return (np.hypot(y - 7.5, x - 7.5) // 2 % 2).astype(float)


def _glow(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.clip(1 - np.hypot(y - 7.5, x - 7.5) / 9, 0, 1)


def _dots(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    return ((y % 4 < 2) & (x % 4 < 2)).astype(float)


def _halves(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    return (y < 8).astype(float)


def _shifted(coverage: np.ndarray, by: int) -> np.ndarray:
    """Moved down and to the right."""
    by = by * len(coverage) // 16
    moved = np.zeros_like(coverage)
    moved[by:, by:] = coverage[: len(coverage) - by, : len(coverage) - by]
    return moved


def _spread(coverage: np.ndarray) -> np.ndarray:
    """The largest coverage in the 3x3 neighbourhood."""
    padded = np.pad(coverage, 1)
    height, width = coverage.shape
    return np.max([padded[i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=0)


def _outline(ink: Colour, inside: Colour) -> Style:
    """Only the edge of a digit, on its inside's colour."""
    return lambda c: _over(np.clip(_spread(c) - c, 0, 1), np.array(ink), np.array(inside))


def _shadow(ink: Colour, shade: Colour, background: Colour) -> Style:
    return lambda c: _over(c, np.array(ink), _over(_shifted(c, 2), np.array(shade), np.array(background)))


def _halo(ink: Colour, halo: Colour, background: Colour) -> Style:
    return lambda c: _over(c, np.array(ink), _over(_spread(c), np.array(halo), np.array(background)))


def _framed(style: Style, frame: Colour) -> Style:
    """A border of two sixteenths."""

    def draw(coverage: np.ndarray) -> np.ndarray:
        y, x = _grid(coverage)
        edge = (np.minimum(y, x) < 2) | (np.maximum(y, x) > 13)
        return np.where(edge[..., None], np.array(frame, dtype=np.uint8), style(coverage))

    return draw


def _flat(ink: Colour, background: Colour) -> Style:
    return lambda c: paint(c, ink, background)


NAVY, GOLD, LIME, CYAN, MAROON, CREAM = (
    (20, 24, 82), (255, 200, 40), (170, 255, 60), (60, 230, 255), (110, 10, 40), (255, 244, 214),
)  # fmt: skip
MAGENTA, SLATE, MINT, RUST, WHITE, BLACK = (
    (255, 40, 200), (70, 84, 110), (170, 240, 205), (190, 80, 30), (255, 255, 255), (0, 0, 0),
)  # fmt: skip
STYLES: dict[str, Style] = {
    "checkered-ink": _patterned_ink(_checker, NAVY, GOLD, CREAM),
    "striped-ink": _patterned_ink(_rows, MAGENTA, CYAN, BLACK),
    "barred-ink": _patterned_ink(_columns, RUST, MINT, WHITE),
    "sunset-ink": _patterned_ink(_down, MAGENTA, GOLD, NAVY),
    "two-tone-ink": _patterned_ink(_halves, LIME, MAGENTA, SLATE),
    "diagonal-ink": _patterned_ink(_diagonals, MAROON, CYAN, CREAM),
    "checkered-ground": _patterned_ground(_checker, MINT, WHITE, MAROON),
    "striped-ground": _patterned_ground(_rows, GOLD, CREAM, NAVY),
    "barred-ground": _patterned_ground(_columns, SLATE, CYAN, CREAM),
    "diagonal-ground": _patterned_ground(_diagonals, LIME, MINT, NAVY),
    "ringed-ground": _patterned_ground(_rings, RUST, GOLD, WHITE),
    "dotted-ground": _patterned_ground(_dots, MAGENTA, CREAM, NAVY),
    "dusk-ground": _patterned_ground(_down, RUST, NAVY, CREAM),
    "fading-ground": _patterned_ground(_across, CYAN, MAROON, WHITE),
    "glowing-ground": _patterned_ground(_glow, GOLD, MAROON, BLACK),
    "outline": _outline(NAVY, MINT),
    "neon": _outline(LIME, NAVY),
    "shadow": _shadow(RUST, SLATE, CREAM),
    "long-shadow": _shadow(CYAN, MAROON, GOLD),
    "halo": _halo(NAVY, GOLD, MAGENTA),
    "white-halo": _halo(MAROON, WHITE, SLATE),
    "framed": _framed(_flat(MAGENTA, MINT), NAVY),
    "gold-frame": _framed(_flat(CREAM, MAROON), GOLD),
    "framed-stripes": _framed(_patterned_ink(_rows, NAVY, RUST, WHITE), LIME),
}
