"""Image encoders of ``transformers``, by their name on the Hugging Face hub or from a folder.

CLIP (arXiv 2103.00020) gives its projected image embedding, the vector it compares with captions. DINO
(arXiv 2104.14294), DINOv2 (arXiv 2304.07193) and other vision transformers give the last hidden state of the class
token, after the final layer norm. Images are prepared as the model's own ``preprocessor_config.json`` says, most often
resized and cropped at the centre; by Pillow, so that torchvision is not needed and changes nothing where it is there.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from forgetrace.artifacts import UserError, read_json, sha256_of
from forgetrace.encoding.hub import local_copy
from forgetrace.encoding.image_encoder import ImageEncoder

if TYPE_CHECKING:
    import torch

CONFIGS = ["config.json", "preprocessor_config.json"]
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # in order of preference, that of transformers
PROJECTED = ("clip", "clip_vision_model")
CLASS_TOKEN = ("vit", "deit", "dinov2", "dinov2_with_registers")


def pretrained(name: str, device: "torch.device | str" = "cpu") -> ImageEncoder:
    """A vision transformer of ``transformers``, frozen, in fp32.

    Args:
        name: a folder, or a model of the hub as ``owner/model`` or ``owner/model@revision``.
        device: where to put it.

    Raises:
        UserError: the model is not there and cannot be downloaded, is damaged, or of a kind without these features.
    """
    folder = model_folder(name)
    files = {path.name: sha256_of(path) for path in [*(folder / config for config in CONFIGS), *_weights(folder)]}
    kind = read_json(folder / CONFIGS[0]).get("model_type")
    if kind not in PROJECTED + CLASS_TOKEN:
        raise UserError(
            f"The image encoder {folder} is of the kind '{kind}', whose features forgetrace does not know: "
            f"choose a model of the kind {', '.join(PROJECTED + CLASS_TOKEN)}."
        )
    processor, model = _load(folder, kind)
    model.float().eval().requires_grad_(False).to(device)

    def prepare(images: np.ndarray) -> np.ndarray:
        return processor([Image.fromarray(image) for image in images], return_tensors="np")["pixel_values"]

    def network(pixels: "torch.Tensor") -> "torch.Tensor":
        output = model(pixel_values=pixels)
        return output.image_embeds if kind in PROJECTED else output.last_hidden_state[:, 0]

    return ImageEncoder(prepare, network, files, device)


def _load(folder: Path, kind: str) -> tuple[Callable, "torch.nn.Module"]:
    """The model and the preparation of its images."""
    from transformers import AutoImageProcessor, AutoModel, CLIPVisionModelWithProjection

    architecture = CLIPVisionModelWithProjection if kind in PROJECTED else AutoModel
    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        model, report = architecture.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except Exception as error:  # a damaged file makes its reader raise nearly anything
        reason = str(error).split("\n")[0]
        raise UserError(f"The image encoder {folder} cannot be read ({reason}): save or download it again.") from error
    # Layers that nothing was loaded into hold random numbers; the pooler is not used here.
    if lacking := sorted(weight for weight in report["missing_keys"] if "pooler" not in weight):
        raise UserError(f"The weights in {folder} lack {lacking[0]}: save or download the image encoder again.")
    return processor, model


def model_folder(name: str) -> Path:
    """The folder of a model: the one named, else the hub's cache, else a download into it.

    Raises:
        UserError: there is no such model, or no network to fetch it over.
    """
    choices = [[*CONFIGS, weights] for weights in WEIGHTS]
    instead = (
        f"put {', '.join(CONFIGS)} and model.safetensors into a folder and name that in the method's option 'encoder'"
    )
    return local_copy(name, choices, _lacking, "image encoder", instead)


def _lacking(folder: Path) -> str | None:
    """A file that a model needs and the folder does not have."""
    absent = (config for config in CONFIGS if not (folder / config).is_file())
    return next(absent, None if _weights(folder) else "model.safetensors")


def _weights(folder: Path) -> list[Path]:
    """The weight files ``transformers`` will read, one or several."""
    return next((found for pattern in WEIGHTS if (found := sorted(folder.glob(pattern)))), [])
