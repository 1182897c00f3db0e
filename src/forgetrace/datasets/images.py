"""A training image as every stage sees it: this module alone reads them.

Images of one's own are decoded, cropped and resized whenever they are read, so that no copy of them is kept.

That a file is still the one that was prepared is told by the SHA-256 of its bytes, which have to be read anyway:
hashing takes a few hundredths of the time that decoding takes. Size and date would cost less still, but a copy of the
data on another disk or machine has other dates and the same content, and an edit may keep both.
"""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from forgetrace.artifacts import UserError, read_image
from forgetrace.datasets.decoding import decoded, squared
from forgetrace.datasets.prepare import read_metadata
from forgetrace.datasets.registry import OWN
from forgetrace.layout import Layout


def read_own(path: str, ground: str = "white") -> Image.Image:
    """Any image file in mode RGB, upright, on a ground where it is transparent.

    Raises:
        UserError: it is missing or no image.
    """
    try:
        return decoded(Path(path).read_bytes(), ground)
    except Exception as error:  # Pillow's readers raise nearly anything
        reason = f" ({error})" if isinstance(error, ValueError) else ""
        raise UserError(f"{path} is missing or no image that can be read{reason}.") from error


def read_square(path: str, size: int) -> np.ndarray:
    """Any image file as an image of one's own is read, shape (size, size, 3), uint8; errors as :func:`read_own`."""
    return squared(read_own(path), size)


def images_folder(layout: Layout) -> str:
    """The folder that the ``file_name`` of training images is relative to."""
    settings = layout.config.prepare
    return str(OWN[settings.dataset].images_in(settings.path)) if settings.dataset in OWN else layout.data


class TrainingImages:
    """Reads images of an experiment's dataset by their ``file_name``."""

    def __init__(self, layout: Layout):
        settings = layout.config.prepare
        self._own, self._size = settings.dataset in OWN, settings.size
        self._folder = images_folder(layout)
        rows = read_metadata(layout.metadata) if self._own else []
        self._sha256 = {row["file_name"]: row.get("sha256") for row in rows}
        self._prepare_again = f"delete {layout.data_manifest} and run again to"

    def __call__(self, file_name: str) -> np.ndarray:
        """Pixels of one image, shape (height, width, 3), uint8.

        Raises:
            UserError: it is missing, cannot be read, or is not what was prepared.
        """
        path = f"{self._folder}/{file_name}"
        if self._own:
            return self._read_own(path, self._sha256.get(file_name))
        try:
            return read_image(path)
        except UserError:
            raise UserError(f"{path} is missing or damaged: {self._prepare_again} rebuild the dataset.") from None

    def _read_own(self, path: str, sha256: str | None) -> np.ndarray:
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
        else:
            # None only while `forgetrace plan` looks, which hashes nothing.
            if sha256 is None or sha256 == hashlib.sha256(content).hexdigest():
                try:
                    return squared(decoded(content), self._size)
                except Exception as error:  # Pillow's readers raise nearly anything
                    raise UserError(f"{path} cannot be read as an image ({type(error).__name__}).") from None
            problem = "is not the image that was prepared"
        raise UserError(f"{path} {problem}: put it back, or {self._prepare_again} prepare what is there now.")
