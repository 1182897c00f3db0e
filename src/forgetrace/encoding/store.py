"""The encoded training set as later stages see it."""

from dataclasses import dataclass

import numpy as np
import torch

from forgetrace.artifacts import UserError, read_array, read_json, read_table, sha256_of
from forgetrace.layout import Layout


@dataclass(frozen=True)
class Encoded:
    """Training images in index order.

    Attributes:
        image_ids: N stable ids.
        latents: memory-mapped array (N, C, H, W), float32.
        captions: token states (distinct captions + 1, tokens, width), float32, memory-mapped; the last is the empty
            caption.
        caption_rows: row of ``captions`` of each image, shape (N,), int64.
    """

    image_ids: list[str]
    latents: np.ndarray
    captions: torch.Tensor
    caption_rows: torch.Tensor

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def empty_row(self) -> int:
        """Row of the empty caption."""
        return len(self.captions) - 1

    def batch(self, rows: np.ndarray) -> torch.Tensor:
        """Latents of the given images, read from disk; (n, C, H, W), float32, on the CPU."""
        return torch.from_numpy(np.ascontiguousarray(self.latents[rows]))


def load_encoded(layout: Layout) -> Encoded:
    """Open the encoded data after comparing every file with the manifest's hashes.

    Raises:
        UserError: a file is missing, damaged or from another encoding.
    """
    recorded = read_json(layout.encode_manifest).get("sha256", {})
    for role, path in {"latents": layout.latents, "captions": layout.captions, "index": layout.index}.items():
        try:
            intact = sha256_of(path) == recorded.get(role)
        except UserError:
            intact = False
        if not intact:
            raise UserError(
                f"{path} is missing or not what the encode stage wrote: delete {layout.encode_manifest} and run again."
            )
    index = read_table(layout.index)
    return Encoded(
        image_ids=index["image_id"].tolist(),
        latents=read_array(layout.latents, mmap=True),
        captions=torch.from_numpy(read_array(layout.captions, mmap=True)),
        caption_rows=torch.from_numpy(index["caption_row"].to_numpy(np.int64, copy=True)),
    )
