"""The bytes of any image file to a square of 8-bit RGB."""

import io

import numpy as np
from PIL import Image, ImageOps


def decoded(content: bytes, ground: str = "white") -> Image.Image:
    """An image file's first picture in mode RGB: upright as its EXIF says, on a ground where it is transparent.

    Raises:
        Exception: of any kind, as Pillow's readers have it, where the bytes are no image or only a part of one.
    """
    with Image.open(io.BytesIO(content)) as file:
        image = ImageOps.exif_transpose(file)
    if image.mode in ("I", "F"):
        raise ValueError("32-bit gray has no fixed white: save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):  # Pillow's own conversion cuts off what is above 255
        values, transparent = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
        if transparent is not None:
            image.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, ground), image)
    return image.convert("RGB")


def squared(image: Image.Image, size: int) -> np.ndarray:
    """The largest square at the centre, resized; Lanczos as Pillow does it, whose window widens for reductions.

    Returns:
        Shape (size, size, 3), uint8.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    crop = image.crop((left, top, left + side, top + side))
    return np.asarray(crop.resize((size, size), Image.Resampling.LANCZOS))
