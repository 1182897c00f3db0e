"""The noise of AbU's published scores, for scans that are to be compared with them (``scan.noise: release``).

There the 2N latents come in batches of 80. Batch b seeds a generator with b and draws the noise of all its images,
captions and timesteps at once, images outermost, then captions, then timesteps. So the noise of a latent hangs on its
row, but neither on what is scanned beside it nor on the experiment's seed: to scan a row, its batch is drawn whole.

A generator of CUDA draws other numbers than one of a CPU from the same seed, and PyTorch shares a large draw out among
as many threads as the GPU can run at once: GPUs of another size draw other numbers. The noise is that of the published
scores on the kind of device they were computed on.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from forgetrace.artifacts import UserError
from forgetrace.encoding.store import Encoded

IMAGES = 80  # of a published batch


def device_kind(device: torch.device) -> str:
    """What tells devices apart that draw different numbers from one seed: ``cpu``, ``cuda-108x2048`` for an A100."""
    if device.type != "cuda":
        return device.type
    found = torch.cuda.get_device_properties(device)
    return f"cuda-{found.multi_processor_count}x{found.max_threads_per_multi_processor}"


@dataclass(frozen=True)
class ReleaseNoise:
    """Timesteps with noise, one for each latent, caption and timestep.

    Attributes:
        timesteps: (T,), int64.
        latent_shape: (C, H, W).
        rows: latents in all, mirror images among them.
        captions: of each image.
        device: where it is drawn.
    """

    timesteps: np.ndarray
    latent_shape: tuple[int, int, int]
    rows: int
    captions: int
    device: torch.device
    _drawn: dict[int, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of_images(cls, encoded: Encoded, timesteps: np.ndarray, device: torch.device) -> "ReleaseNoise":
        """The noise for encoded images.

        Raises:
            UserError: they have different numbers of captions, for which there is no such noise.
        """
        counts = np.unique(encoded.counts(np.arange(len(encoded))))
        if len(counts) > 1:
            raise UserError(
                f"scan.noise: release is for images with as many captions each, these have {counts[0]} to "
                f"{counts[-1]}: choose per-image or shared."
            )
        return cls(timesteps, tuple(encoded.latents.shape[1:]), len(encoded.latents), int(counts[0]), device)

    @property
    def drawn_on(self) -> tuple[str, ...]:
        """The kind of device, which the noise hangs on."""
        return (device_kind(self.device),)

    def of(self, rows: np.ndarray, draws: np.ndarray, number: int) -> torch.Tensor:
        """Noise of w draws for each of n latents with its numbered caption.

        Args:
            rows: (n,).
            draws: numbers of timesteps, (n, w).
            number: of the caption, from 0.

        Returns:
            (n · w, C, H, W), latents outermost, float32, on the device.
        """
        noise = torch.empty((*draws.shape, *self.latent_shape), device=self.device)
        batches = np.unique(rows // IMAGES).tolist()
        for other in self._drawn.keys() - set(batches):
            del self._drawn[other]  # the next captions are of the same rows, for COCO 33 MB a batch
        for batch in batches:
            own = np.flatnonzero(rows // IMAGES == batch)
            places, chosen = (torch.from_numpy(values) for values in (rows[own] - batch * IMAGES, draws[own]))
            noise[torch.from_numpy(own)] = self._batch(batch)[places[:, None], number, chosen]
        return noise.flatten(0, 1)

    def _batch(self, batch: int) -> torch.Tensor:
        """The noise of a whole published batch, (images, captions, T, C, H, W)."""
        if batch not in self._drawn:
            images = min(IMAGES, self.rows - batch * IMAGES)
            count = images * self.captions * len(self.timesteps)
            stream = torch.Generator(self.device).manual_seed(batch)
            drawn = torch.randn((count, *self.latent_shape), generator=stream, device=self.device)
            self._drawn[batch] = drawn.unflatten(0, (images, self.captions, len(self.timesteps)))
        return self._drawn[batch]
