import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from forgetrace.datasets.decoding import decoded, squared

# Four flat quarters: red and green above, blue and yellow below; JPEG keeps flat areas.
QUARTERS = np.array([[[230, 20, 20], [20, 200, 20]], [[20, 20, 230], [220, 220, 20]]], dtype=np.uint8)
UPRIGHT = Image.fromarray(QUARTERS.repeat(32, 0).repeat(48, 1))
# What undoes each EXIF orientation: how the upright picture has to be stored.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def corners(image: Image.Image) -> np.ndarray:
    """Colours in the middles of the four quarters."""
    width, height = image.size
    pixels = np.asarray(image).astype(int)
    return pixels[height // 4 :: height // 2, width // 4 :: width // 2][:2, :2]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_images_are_turned_upright(kind, orientation):
    stored = UPRIGHT if orientation == 1 else UPRIGHT.transpose(STORED[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decoded(saved(stored, kind, exif=exif))
    assert image.size == UPRIGHT.size
    np.testing.assert_allclose(corners(image), QUARTERS, atol=12)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGB", "BMP"),
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("YCbCr", "JPEG"),
        ("RGBA", "WEBP"),
    ],
)
def test_colours_of_any_mode_become_rgb(mode, kind):
    image = decoded(saved(UPRIGHT.convert(mode, palette=Image.Palette.ADAPTIVE), kind))
    assert image.mode == "RGB"
    np.testing.assert_allclose(corners(image), QUARTERS, atol=12)


@pytest.mark.parametrize(("mode", "kind"), [("L", "PNG"), ("L", "JPEG"), ("LA", "PNG"), ("1", "PNG")])
def test_gray_is_the_same_in_all_channels(mode, kind):
    gray = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8).repeat(32, 0).repeat(48, 1))
    expected = np.array([[0, 255], [255, 0]])[..., None].repeat(3, 2)
    np.testing.assert_allclose(corners(decoded(saved(gray.convert(mode), kind))), expected, atol=3)


@pytest.mark.parametrize(
    ("mode", "order", "kind"), [("I;16", "<u2", "PNG"), ("I;16", "<u2", "TIFF"), ("I;16B", ">u2", "TIFF")]
)
def test_16_bits_of_gray_become_8(mode, order, kind):
    values = (np.arange(256, dtype=np.uint16) * 257).astype(order)
    content = saved(Image.frombytes(mode, (256, 1), values.tobytes()), kind)
    np.testing.assert_array_equal(np.asarray(decoded(content))[0, :, 0], np.arange(256))


def test_16_bits_of_gray_are_white_where_the_transparent_value_is():
    values = np.array([[1000, 257 * 100]], dtype="<u2")
    content = saved(Image.frombytes("I;16", (2, 1), values.tobytes()), "PNG", transparency=1000)
    np.testing.assert_array_equal(np.asarray(decoded(content))[0, :, 0], [255, 100])


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_are_refused(mode):
    with pytest.raises(ValueError, match="32-bit gray has no fixed white"):
        decoded(saved(Image.new(mode, (4, 4)), "TIFF"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(mode):
    """Half red (or dark), half transparent with black behind."""
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[:, :4] = (200, 0, 0, 255)
    image = Image.fromarray(pixels)
    options = {}
    if mode == "P":
        image = Image.fromarray(np.repeat([[0, 1]], 8, 0).repeat(4, 1).astype(np.uint8), "P")
        image.putpalette([200, 0, 0, 0, 0, 0])
        options = {"transparency": 1}
    found = np.asarray(decoded(saved(image if mode == "P" else image.convert(mode), "PNG", **options)))
    assert (found[:, 4:] == 255).all()
    assert (found[:, :4] < 210).all()


def test_half_transparent_is_half_white():
    found = np.asarray(decoded(saved(Image.new("RGBA", (2, 2), (0, 100, 200, 128)), "PNG")))
    np.testing.assert_allclose(found[0, 0], np.array([0, 100, 200]) * 128 / 255 + 127, atol=1)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF"])
def test_a_part_of_an_image_is_none(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = saved(noise, kind)
    with pytest.raises(Exception):  # noqa: B017, PT011 - of any kind, as it says
        decoded(content[: len(content) // 2])


@given(st.binary(max_size=200))
def test_what_is_no_image_is_refused(content):
    with pytest.raises(Exception):  # noqa: B017, PT011
        decoded(content)


@pytest.mark.parametrize(("width", "height", "left", "top"), [(7, 4, 1, 0), (4, 7, 0, 1), (4, 4, 0, 0), (9, 4, 2, 0)])
def test_the_square_is_at_the_centre(width, height, left, top):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    np.testing.assert_array_equal(squared(Image.fromarray(pixels), 4), pixels[top : top + 4, left : left + 4])


def test_reductions_average():
    """A fine chequerboard becomes gray instead of a pattern, and a ramp stays one."""
    board = np.indices((64, 64)).sum(0) % 2 * 255
    small = squared(Image.fromarray(board.astype(np.uint8)).convert("RGB"), 8)
    assert np.abs(small.astype(int) - 127).max() <= 3
    ramp = np.broadcast_to(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], (64, 64, 3))
    row = squared(Image.fromarray(np.ascontiguousarray(ramp)), 8)[4, :, 0].astype(float)
    np.testing.assert_allclose(row[1:-1], ramp[0, :, 0].reshape(8, 8).mean(1)[1:-1], atol=1.5)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_any_image_gives_the_size(width, height, size):
    found = squared(Image.new("RGB", (width, height), (10, 20, 30)), size)
    assert found.shape == (size, size, 3)
    assert found.dtype == np.uint8
    assert (found == (10, 20, 30)).all()
