"""What the TRAK family keeps of every training image: projected gradients, and losses at the same (t, ε).

Snakemake asks for names and inputs while it builds the DAG: torch is imported where something is computed.
"""

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from forgetrace.artifacts import UserError, fingerprint, write_json
from forgetrace.attribution.contract import Features
from forgetrace.attribution.resumable import resumable
from forgetrace.diffusion.noise import NoiseBank, spaced_timesteps
from forgetrace.layout import Layout
from forgetrace.progress import progress

if TYPE_CHECKING:
    from forgetrace.attribution.output_gradients import OutputGradients
    from forgetrace.encoding.store import Encoded


BLOCK = 2**12  # rows looked at at once


class OverTimesteps(Features):
    """A row of numbers per training image, from noised versions of it at evenly spaced timesteps.

    All images share one noise per timestep, so that rows differ by the images alone. A killed fit continues with the
    images that are missing.
    """

    def __init__(self, layout: Layout, name: str, width: int, timesteps: int, device: str = "auto"):
        """Args: layout; name; width of a row; timesteps, how many; device as for an attributor."""
        self.layout, self.name, self.width, self.timesteps, self.device = layout, name, width, timesteps, device

    def inputs(self) -> list[str]:
        """θ0 and the encoded training images."""
        return [*self.layout.model_files, *self.layout.encoded]

    def settings(self) -> dict:
        """The seed; all else is in the name."""
        return {"seed": self.layout.config.seed, "features": self.name}

    def fit(self) -> None:
        """Write ``layout.features(name)``, (N, width), float32, and its record.

        Raises:
            UserError: an input is missing or damaged, or a result not finite.
        """
        from forgetrace.encoding.store import load_encoded

        layout, encoded = self.layout, load_encoded(self.layout)
        made_by = self.made_by()
        partial = Path(layout.checkpoints("features")) / f"{fingerprint(made_by)}.npy"
        values = resumable(partial, (len(encoded), self.width))
        timesteps = spaced_timesteps(self.timesteps, layout.config.train.timesteps)
        self.fill(values, encoded, NoiseBank(layout.config.seed, "features", timesteps, encoded.latents.shape[1:]))
        if not all(np.isfinite(values[start : start + BLOCK]).all() for start in range(0, len(values), BLOCK)):
            raise UserError(
                f"The gradients or losses of {layout.weights} are NaN or infinite: its training went wrong; "
                "lower train.learning_rate and train again."
            )
        values.flush()
        path = Path(layout.features(self.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(path)
        write_json(layout.features_record(self.name), made_by)

    @abstractmethod
    def fill(self, values: np.ndarray, encoded: "Encoded", bank: NoiseBank) -> None:
        """Fill in the rows with a NaN, in place."""


class GradientFeatures(OverTimesteps):
    """φ(z) = P · mean over timesteps of the gradients of an output function at z and its caption."""

    def __init__(self, layout: Layout, output: str, weights: str, timesteps: int, dimension: int, device: str = "auto"):
        """Args: output, weights, dimension as for OutputGradients; timesteps to average over."""
        super().__init__(layout, f"{output}-{weights}-t{timesteps}-d{dimension}", dimension, timesteps, device)
        self.output, self.weights = output, weights

    def source(self) -> "OutputGradients":
        """What computes such features, of a training image or of anything else."""
        from forgetrace.attribution.output_gradients import OutputGradients

        return OutputGradients(self.layout, self.output, self.weights, self.width, self.device)

    def fill(self, values: np.ndarray, encoded: "Encoded", bank: NoiseBank) -> None:
        """The missing φ, as many images at a time as make up the config's ``fit.chunk`` gradients."""
        source, noise = self.source(), bank.draws()
        missing = np.flatnonzero(np.isnan(values).any(axis=1))
        block = max(1, self.layout.config.fit.chunk // self.timesteps)
        done = len(values) - len(missing)
        with progress(total=len(values), unit="image", what=self.name, done=done) as bar:
            for start in range(0, len(missing), block):
                rows = missing[start : start + block]
                values[rows] = self._of(source, encoded, rows, bank, noise)
                bar.update(len(rows))

    @staticmethod
    def _of(
        source: "OutputGradients", encoded: "Encoded", rows: np.ndarray, bank: NoiseBank, noise: np.ndarray
    ) -> np.ndarray:
        """φ of some images; where they have several views, one at each timestep."""
        if not encoded.has_views:
            return source.mean(*encoded.examples(rows), bank.timesteps, noise)
        total = 0.0
        for draw in range(len(noise)):
            picks = encoded.picks(bank.seed, bank.purpose, [(encoded.image_ids[row], draw) for row in rows])
            one = slice(draw, draw + 1)
            total = total + source.mean(*encoded.examples(rows, picks), bank.timesteps[one], noise[one])
        return total / len(noise)


class TrainingLosses(OverTimesteps):
    """The loss of each training image at the timesteps and noises of its gradients."""

    def __init__(self, layout: Layout, timesteps: int, device: str = "auto"):
        """Args: timesteps, how many."""
        super().__init__(layout, f"losses-t{timesteps}", timesteps, timesteps, device)

    def fill(self, values: np.ndarray, encoded: "Encoded", bank: NoiseBank) -> None:
        """The missing losses; see :func:`forgetrace.attribution.scan.scan_losses`."""
        from forgetrace.attribution.scan import scan_losses
        from forgetrace.diffusion.device import pick_device
        from forgetrace.diffusion.inference import for_inference
        from forgetrace.diffusion.model import load_scheduler, load_unet

        unet, scheduler = load_unet(self.layout, pick_device(self.device)), load_scheduler(self.layout)
        with progress(total=values.size, unit="loss", what=self.name, done=(~np.isnan(values)).sum()) as bar:
            batch = self.layout.config.scan.batch_size
            scan_losses(for_inference(unet), scheduler, encoded, bank, values, batch, done=bar.update)
