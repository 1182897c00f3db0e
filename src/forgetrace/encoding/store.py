"""The encoded training set as later stages see it.

An image may have several captions, and a mirror image beside it where training flips. A *view* is one of its captions
with one of its orientations; a training draw takes any of them, and so does everything that stands for one.
"""

from dataclasses import dataclass

import numpy as np
import torch

from forgetrace.artifacts import UserError, on_disk, read_array, read_json, read_table, sha256_of
from forgetrace.layout import Layout
from forgetrace.randomness import generator


@dataclass(frozen=True)
class Encoded:
    """Training images in index order.

    Attributes:
        image_ids: N stable ids.
        latents: memory-mapped array (N, C, H, W), float32; (2N, C, H, W) with mirror images, behind all the others.
        captions: token states (distinct captions + 1, tokens, width), memory-mapped, float32 or float16; the last is
            the empty caption.
        caption_rows: rows of ``captions``, those of the first image, of the second, …; shape (M,), int64.
        starts: where the captions of each image start in ``caption_rows``, (N + 1,), int64; None where each has one.
    """

    image_ids: list[str]
    latents: np.ndarray
    captions: torch.Tensor
    caption_rows: torch.Tensor
    starts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def empty_row(self) -> int:
        """Row of the empty caption."""
        return len(self.captions) - 1

    @property
    def orientations(self) -> int:
        """2 with mirror images, else 1."""
        return len(self.latents) // len(self)

    @property
    def has_views(self) -> bool:
        """Whether there is anything to choose."""
        return self.starts is not None or self.orientations > 1

    def batch(self, rows: np.ndarray) -> torch.Tensor:
        """The given rows of the latents, read from disk; (n, C, H, W), float32, on the CPU."""
        return torch.from_numpy(np.ascontiguousarray(self.latents[rows]))

    def states(self, rows: torch.Tensor) -> torch.Tensor:
        """The given rows of the captions, read from disk; (n, tokens, width), float32, on the CPU."""
        return self.captions[rows].float()

    def counts(self, images: np.ndarray) -> np.ndarray:
        """How many captions images have, (n,), int64."""
        return np.ones(len(images), dtype=np.int64) if self.starts is None else np.diff(self.starts)[images]

    def caption(self, images: np.ndarray, number: np.ndarray | int = 0) -> torch.Tensor:
        """Row of the numbered caption of each image, (n,), int64."""
        firsts = images if self.starts is None else self.starts[images]
        return self.caption_rows[torch.from_numpy(np.asarray(firsts + number))]

    def views(self, images: np.ndarray, picks: np.ndarray | None = None) -> tuple[np.ndarray, torch.Tensor]:
        """Rows of latents and captions of one view of each image.

        Args:
            images: (n,).
            picks: in [0, 1), (n, 2), choose caption and orientation uniformly; None where there are no views.
        """
        if picks is None:
            return images, self.caption(images)
        numbers = (picks[:, 0] * self.counts(images)).astype(np.int64)
        mirrored = (picks[:, 1] * self.orientations).astype(np.int64)
        return images + mirrored * len(self), self.caption(images, numbers)

    def examples(self, images: np.ndarray, picks: np.ndarray | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and token states of one view of each image, as :meth:`views` chooses it."""
        latents, captions = self.views(images, picks)
        return self.batch(latents), self.states(captions)

    def picks(self, seed: int, purpose: str, names: list) -> np.ndarray | None:
        """Random numbers for :meth:`views`, each a function of seed, purpose and its own name; None without views."""
        if not self.has_views:
            return None
        return np.array([generator(seed, purpose, "view", name).random(2) for name in names]).reshape(-1, 2)


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
    rows, starts = index["caption_row"].to_numpy(np.int64, copy=True), None
    if "caption_rows" in index:
        starts = np.concatenate([[0], index["caption_rows"].map(len).cumsum()])
        rows = np.concatenate(index["caption_rows"].to_list()).astype(np.int64)
    return Encoded(
        image_ids=index["image_id"].tolist(),
        latents=read_array(layout.latents, mmap=True),
        captions=on_disk(read_array(layout.captions, mmap=True)),
        caption_rows=torch.from_numpy(rows),
        starts=starts,
    )
