"""Similarity of the attributed model's own features (IntroStyle, arXiv 2412.14432).

The paper takes an image's style to be the Gaussian of each channel of one up block at a nearly clean timestep, and
compares two images by the 2-Wasserstein distance of these Gaussians, which for diagonal covariances is
``√(‖μ₁ − μ₂‖² + ‖σ₁ − σ₂‖²)``. The score is its negative. Neither image nor query gets a caption: images are compared,
and the empty caption is one the model was trained on (``train.caption_dropout``).
"""

import numpy as np

from forgetrace.artifacts import UserError, on_disk, read_array, read_arrays
from forgetrace.attribution.similarity import Comparable, FeatureSimilarity
from forgetrace.config import Config
from forgetrace.diffusion.noise import NoiseBank
from forgetrace.layout import Layout

TIMESTEP, OF = 25, 1000  # the paper's, scaled to schedules of another length
NOISES = 4


class ChannelStatistics(Comparable):
    """Means and standard deviations of the channels of the middle up block, averaged over noises."""

    def __init__(self, layout: Layout, timestep: int, noises: int, device: str = "auto"):
        """Args: timestep to noise to, noises to average the block's output over."""
        super().__init__(layout, f"unet-t{timestep}-noises{noises}", device)
        self.timestep, self.noises = timestep, noises

    def inputs(self) -> list[str]:
        """θ0 and the encoded data."""
        return [*self.layout.model_files, *self.layout.encoded]

    def settings(self) -> dict:
        """The timestep and the noises."""
        return {"timestep": self.timestep, "noises": self.noises, "seed": self.layout.config.seed}

    def of_training_images(self) -> np.ndarray:
        """(N, 2c), float32, c channels of the block."""
        from forgetrace.encoding.store import load_encoded

        encoded = load_encoded(self.layout)
        return self._statistics(encoded.latents[: len(encoded)])  # mirror images have nearly the same statistics

    def query_input(self, query: str) -> str:
        """Its latent, among other tensors."""
        return self.layout.query(query)["tensors"]

    def of_queries(self, queries: list[str]) -> np.ndarray:
        """(n, 2c), float32."""
        return self._statistics(np.stack([read_arrays(self.query_input(query))["latent"] for query in queries]))

    def _statistics(self, latents: np.ndarray) -> np.ndarray:
        """(n, C, H, W), memory-mapped or not -> (n, 2c), float32."""
        import torch

        from forgetrace.diffusion.activations import channel_statistics, middle_up_block
        from forgetrace.diffusion.device import pick_device
        from forgetrace.diffusion.inference import for_inference
        from forgetrace.diffusion.model import load_scheduler, load_unet

        unet = for_inference(load_unet(self.layout, pick_device(self.device)))
        timesteps = np.full(self.noises, self.timestep, dtype=np.int64)
        # One purpose for images and queries: the same latent must get the same features.
        bank = NoiseBank(self.layout.config.seed, "unet-features", timesteps, tuple(latents.shape[1:]))
        empty = torch.from_numpy(np.array(read_array(self.layout.captions, mmap=True)[-1], dtype=np.float32))
        return channel_statistics(
            unet, load_scheduler(self.layout), on_disk(latents), empty, bank, middle_up_block(unet)
        )


class UNetFeatures(FeatureSimilarity):
    """Distance of the statistics of an image and a query inside the attributed model."""

    summary = "negative distance of channel means and deviations in the attributed UNet (IntroStyle)"
    reads = frozenset({"timestep", "noises"})

    @classmethod
    def check(cls, config: Config, method: str) -> None:
        """The timestep must be one of the schedule, and the empty caption's token states known."""
        if config.encode.given and not config.encode.pipeline:
            raise UserError(
                f"score.methods.{method} asks θ0 with the empty caption, whose state is not in encode.given: name the "
                "Stable Diffusion pipeline it was made with in encode.pipeline, or remove the method."
            )
        timestep = config.score.methods[method].timestep
        if timestep is not None and timestep >= config.train.timesteps:
            raise UserError(
                f"score.methods.{method}.timestep: {timestep} is not less than train.timesteps = "
                f"{config.train.timesteps}."
            )

    def compared(self) -> ChannelStatistics:
        """Statistics at the timestep."""
        default = TIMESTEP * self.layout.config.train.timesteps // OF
        timestep = default if self.options.timestep is None else self.options.timestep
        return ChannelStatistics(self.layout, timestep, self.options.noises or NOISES, self.device)

    @staticmethod
    def similarity(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
        """Minus the 2-Wasserstein distance; (N, 2c) and (2c,) -> (N,)."""
        return -np.linalg.norm(rows - query, axis=1)
