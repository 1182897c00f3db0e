import hashlib

import numpy as np
import pytest

from forgetrace.artifacts import UserError
from forgetrace.datasets import digit_pairs
from forgetrace.datasets.digits import BACKGROUNDS, INKS, handwriting


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    return handwriting()


@pytest.fixture(scope="module")
def pairs() -> list:
    return list(digit_pairs.examples(0))


def test_every_image_and_caption_is_the_same_on_every_machine(pairs):
    content = hashlib.sha256()
    for example in pairs:
        content.update(f"{example.id} {example.caption}\n".encode() + example.image.tobytes())
    assert content.hexdigest() == "3e589847d8ef0da527961d45b556083a9eadc66f4014659ac7a841263dfc52a5"


def test_shapes_ids_and_words(pairs):
    assert [example.id for example in pairs] == [f"pair-{i:04d}" for i in range(5000)]
    assert {(example.image.shape, example.image.dtype.name) for example in pairs} == {((16, 32, 3), "uint8")}
    said = [digit_pairs.facts(example.caption) for example in pairs]
    for key, count in (("digit", 10), ("ink", 2)):
        assert len({one[f"left_{key}"] for one in said}) == len({one[f"right_{key}"] for one in said}) == count


def test_captions_agree_with_the_pictures(pairs, digits):
    """Each half holds the handwriting of some digit of its name, painted in the named ink on white."""
    coverage, labels = digits
    by_label = {name: coverage[labels == label] for label, name in enumerate(digit_pairs.DIGITS)}
    for example in pairs[::97]:
        said = digit_pairs.facts(example.caption)
        ground = np.array(BACKGROUNDS["white"], dtype=float)
        for side, (x0, y0, x1, y1) in digit_pairs.SIDES.items():
            ink = np.array(INKS[said[f"{side}_ink"]], dtype=float)
            painted = by_label[said[f"{side}_digit"]][..., None] * (ink - ground) + ground
            half = example.image[y0:y1, x0:x1]
            assert np.abs(painted - half).max(axis=(1, 2, 3)).min() <= 0.5, (example.id, side)


def test_every_digit_stands_once_on_each_side(pairs, digits):
    _, labels = digits
    names = np.array(digit_pairs.DIGITS)[labels]
    for side in digit_pairs.SIDES:
        said = [digit_pairs.facts(example.caption)[f"{side}_digit"] for example in pairs]
        assert sorted(said) == sorted(names)


def test_another_seed_pairs_other_digits(pairs):
    other = next(iter(digit_pairs.examples(1)))
    assert not np.array_equal(other.image, pairs[0].image)


def test_a_caption_of_another_dataset_is_refused():
    with pytest.raises(UserError, match="does not name two digits"):
        digit_pairs.facts("a bold red seven upright on a white background")
