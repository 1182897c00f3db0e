import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from forgetrace.artifacts import UserError
from forgetrace.encoding.latents import to_latents, to_pixels


@st.composite
def images(draw):
    factor = draw(st.sampled_from([1, 2, 3, 4]))
    shape = (draw(st.integers(1, 3)), factor * draw(st.integers(1, 4)), factor * draw(st.integers(1, 4)), 3)
    return draw(arrays(np.uint8, shape)), factor


@given(images())
def test_the_inverse_is_exact(case):
    pixels, factor = case
    latents = to_latents(pixels, factor)
    n, height, width, _ = pixels.shape
    assert latents.shape == (n, 3 * factor**2, height // factor, width // factor)
    assert latents.dtype == np.float32
    np.testing.assert_array_equal(to_pixels(latents, factor), pixels)


@given(images())
def test_it_is_torchs_pixel_unshuffle(case):
    pixels, factor = case
    values = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    np.testing.assert_array_equal(to_latents(pixels, factor), torch.nn.functional.pixel_unshuffle(values, factor))


def test_the_range_is_minus_one_to_one():
    pixels = np.array([0, 255, 51]).astype(np.uint8).reshape(1, 1, 1, 3)
    np.testing.assert_allclose(to_latents(pixels, 1).ravel(), [-1, 1, -0.6], atol=1e-6)


def test_values_beyond_the_range_are_clipped_and_the_rest_rounded():
    latents = np.array([-7.0, 7.0, 0.5 / 127.5 - 1 + 1e-4], dtype=np.float32).reshape(1, 3, 1, 1)
    assert to_pixels(latents, 1).ravel().tolist() == [0, 255, 1]


def test_images_that_do_not_divide_name_the_key():
    with pytest.raises(UserError, match=r"encode.factor: images of 16x15 do not divide into 2x2 patches"):
        to_latents(np.zeros((1, 16, 15, 3), np.uint8), 2)
