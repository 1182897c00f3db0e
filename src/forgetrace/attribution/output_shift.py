"""Attribution by what else changes when the query is unlearned: how far predictions on a training image move.

``τ(z) = E ‖f(z_t, t, c; θ_Q) − f(z_t, t, c; θ0)‖² / (C·H·W)`` over t and ε, where θ_Q has unlearned the query as
for AbU (arXiv 2406.09408, eq. 5).

AbU's own score is the rise of the loss ``‖target − f‖²``. To first order that is an inner product of the move of the
prediction with the residual ``target − f``, most of which is noise that no model can predict: it has either sign, and
what is left of it after averaging over draws hides the signal. The squared move has no such term. Diffusion
Attribution Score (arXiv 2410.18639) compares outputs instead of losses for that reason, with projected gradients; here
the direction is the whole model's unlearning step and the move is measured, not linearised. As long as a step is small
the move is proportional to it, and so the ranking hardly hangs on the step size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from forgetrace.attribution.contract import Together
from forgetrace.attribution.unlearning import ByUnlearning

if TYPE_CHECKING:
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel

TIMESTEPS = 10
HELD = 2**30  # bytes of models at once


class OutputShift(ByUnlearning, Together):
    """Mean squared change of the prediction on each training image."""

    summary = "how far the prediction on a training image moves when the model unlearns the query"
    reads = frozenset({"variant", "timesteps"})

    def inputs(self, query: str) -> list[str]:
        """θ0, the encoded data and the unlearned weights."""
        layout = self.layout
        return [*layout.model_files, *layout.encoded, layout.unlearned(self.variant, query)["weights"]]

    def scores_of(self, queries: list[str]) -> dict[str, np.ndarray]:
        """Scores of several queries in one pass, in which θ0 is asked once; of as many as fit into memory."""
        from forgetrace.diffusion.device import pick_device
        from forgetrace.diffusion.inference import for_inference
        from forgetrace.diffusion.model import load_unet

        unet = load_unet(self.layout, pick_device(self.device))
        count = max(1, HELD // sum(weight.nbytes for weight in unet.parameters()))
        unet, folder = for_inference(unet), Path(self.layout.checkpoints("score"))
        scores, partials = {}, []
        for start in range(0, len(queries), count):
            block = queries[start : start + count]
            partials.append(folder / f"{self.key(block)}.npy")
            scores |= self._of_block(unet, block, partials[-1])
        for partial in partials:  # not before the last: a killed job goes through all of them
            partial.unlink()
        return scores

    def _of_block(self, unet: UNet2DConditionModel, queries: list[str], partial: Path) -> dict[str, np.ndarray]:
        """Scores of the queries whose models are held together; ``partial`` keeps what is found, and stays."""
        from forgetrace.attribution.resumable import resumable
        from forgetrace.attribution.scan import scan_losses
        from forgetrace.diffusion.inference import for_inference
        from forgetrace.diffusion.model import load_scheduler, load_unet
        from forgetrace.diffusion.noise import NoiseBank, spaced_timesteps
        from forgetrace.encoding.store import load_encoded
        from forgetrace.progress import progress

        layout, device = self.layout, unet.device
        encoded, scheduler = load_encoded(layout), load_scheduler(layout)
        changed = [layout.unlearned(self.variant, query)["weights"] for query in queries]
        moved = [for_inference(load_unet(layout, device, changed=weights)) for weights in changed]
        timesteps = spaced_timesteps(self.options.timesteps or TIMESTEPS, scheduler.config.num_train_timesteps)
        bank = NoiseBank(layout.config.seed, "scan", timesteps, tuple(encoded.latents.shape[1:]))
        found = resumable(partial, (len(encoded.latents), len(timesteps), len(queries)))
        there = int((~np.isnan(found[:, :, -1])).sum())
        with progress(total=found[:, :, -1].size, unit="draw", what=self.method, done=there) as bar:
            batch, measure = layout.config.scan.batch_size, functools.partial(shifts, moved)
            scan_losses(unet, scheduler, encoded, bank, found, batch, done=bar.update, measure=measure)
        means = found.mean(axis=1, dtype=float)
        if layout.config.encode.flips:
            means = means.reshape(2, len(encoded), -1).mean(axis=0)
        return dict(zip(queries, means.T, strict=True))


def shifts(
    moved: Sequence[UNet2DConditionModel],
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    *example: torch.Tensor,
) -> torch.Tensor:
    """Mean squared distance of each model's prediction from the first one's, (B, models), float32.

    Args:
        moved: models that are compared.
        unet: the model they are compared with.
        scheduler: the training schedule.
        example: latents, captions, timesteps and noise as for :func:`forgetrace.diffusion.loss.example_losses`.
    """
    import torch

    from forgetrace.diffusion.loss import example_means, predicted

    before, _ = predicted(unet, scheduler, *example)
    after = (predicted(model, scheduler, *example)[0] for model in moved)
    return torch.stack([example_means((prediction - before).square()) for prediction in after], dim=1)
