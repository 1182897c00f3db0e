"""Image encoders by name: one that ships with the environment, and any that ``transformers`` loads."""

from typing import TYPE_CHECKING

from forgetrace.encoding.efficientnet import efficientnet_lite0
from forgetrace.encoding.image_encoder import ImageEncoder
from forgetrace.encoding.pretrained import pretrained

if TYPE_CHECKING:
    import torch

SHIPPED = {"efficientnet-lite0": efficientnet_lite0}


def load_encoder(name: str, device: "torch.device | str" = "cpu") -> ImageEncoder:
    """The image encoder a config names.

    Args:
        name: ``efficientnet-lite0``, or as :func:`forgetrace.encoding.pretrained.pretrained` takes it.
        device: where to put it.

    Raises:
        UserError: it is not there, or its weights are not the ones expected.
    """
    return SHIPPED[name](device) if name in SHIPPED else pretrained(name, device)
