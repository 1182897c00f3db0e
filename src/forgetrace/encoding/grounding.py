"""Boxes of what a phrase names in an image, by GroundingDINO (arXiv 2303.05499) through ``transformers``.

A folder as ``save_pretrained`` writes model and processor, or a model of the Hugging Face hub such as
``IDEA-Research/grounding-dino-tiny``.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from forgetrace.artifacts import UserError
from forgetrace.encoding.hub import local_copy

if TYPE_CHECKING:
    import torch

PATTERNS = ["*.json", "*.txt"]
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in order of preference


def detect(image: np.ndarray, phrase: str, model: str, threshold: float, device: "torch.device") -> list[list[int]]:
    """Boxes x0, y0, x1, y1 in whole pixels, x1 and y1 exclusive, clipped to the image.

    Args:
        image: (height, width, 3), uint8.
        phrase: what to look for.
        model: a folder, or a model of the hub as ``owner/model`` or ``owner/model@revision``.
        threshold: confidence from which a box counts, for the box as for the words.
        device: where to compute.

    Raises:
        UserError: the model's files are not there or damaged, or it is of another kind.
    """
    import torch
    from PIL import Image
    from transformers import AutoProcessor, GroundingDinoForObjectDetection

    folder = _folder(model)
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        network = GroundingDinoForObjectDetection.from_pretrained(folder, local_files_only=True).eval()
    except Exception as error:  # every layer of the library has its own
        reason = str(error).split("\n")[0]
        raise UserError(f"synthesize.detector: {model} cannot be loaded as a GroundingDINO ({reason}).") from None
    # The model wants lower case and a full stop behind each phrase.
    inputs = processor(images=Image.fromarray(image), text=f"{phrase.lower().rstrip('. ')}.", return_tensors="pt")
    with torch.no_grad():
        outputs = network.to(device)(**inputs.to(device))
    height, width = image.shape[:2]
    found = processor.post_process_grounded_object_detection(
        outputs, inputs["input_ids"], threshold=threshold, text_threshold=threshold, target_sizes=[(height, width)]
    )[0]["boxes"]
    return whole_pixels(found.cpu().numpy(), height, width)


def whole_pixels(boxes: np.ndarray, height: int, width: int) -> list[list[int]]:
    """Boxes (n, 4) rounded outwards and clipped; those without a pixel inside the image are left out."""
    low, high = np.floor(boxes[:, :2]).astype(int), np.ceil(boxes[:, 2:]).astype(int)
    clipped = np.concatenate([low.clip(0), high.clip(max=(width, height))], axis=1).tolist()
    return [box for box in clipped if box[0] < box[2] and box[1] < box[3]]


def _folder(model: str) -> Path:
    def lacking(folder: Path) -> str | None:
        if not (folder / "config.json").is_file():
            return "config.json"
        return None if any((folder / name).is_file() for name in WEIGHTS) else "weights"

    choices = [[*PATTERNS, name] for name in WEIGHTS]
    return local_copy(model, choices, lacking, "detector", "give boxes, a mask or a file instead of a phrase")
