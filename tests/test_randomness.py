import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from forgetrace.randomness import generator

NAMES = st.lists(st.one_of(st.integers(), st.text(max_size=8)), max_size=3)


@given(st.integers(0, 2**40), NAMES)
def test_a_stream_is_a_function_of_its_name(seed, name):
    expected = generator(seed, *name).integers(2**62, size=4)
    generator(seed + 1, *name).random(10)
    assert np.array_equal(generator(np.int64(seed), *name).integers(2**62, size=4), expected)
    assert not np.array_equal(generator(seed + 1, *name).integers(2**62, size=4), expected)
    assert not np.array_equal(generator(seed, *name, "more").integers(2**62, size=4), expected)


def test_parts_of_a_name_are_kept_apart():
    streams = [("ab", "c"), ("a", "bc"), ("abc",), ("ab', 'c",), ()]
    assert len({int(generator(0, *name).integers(2**62)) for name in streams}) == len(streams)


def test_golden_values():
    """Every result of the project follows from these numbers: they may not change unnoticed."""
    assert generator(0, "train", 7).integers(1000, size=5).tolist() == [580, 614, 380, 259, 4]
