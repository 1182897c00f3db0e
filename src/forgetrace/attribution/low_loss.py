"""A control that no query has a say in: the images the model knows best, by their own loss.

What a model was trained on for long, or alone, has a low loss; where exemplars of a customised model are to be found,
that gives them away without a look at the generated image. A method that claims to trace an image has to be better than
this, and a score that divides by the loss (``skew``) has it inside.
"""

import numpy as np

from forgetrace.artifacts import read_arrays
from forgetrace.attribution.contract import Attributor


class LowLoss(Attributor):
    """Minus the loss of each training image under the attributed model."""

    summary = "low loss of a training image under the model, the same for every query: a control"

    def inputs(self, query: str) -> list[str]:
        """The scan of θ0."""
        return [self.layout.base_scan]

    def shaped_by(self) -> dict:
        """Whether images have a mirrored orientation too."""
        return {"flips": True} if self.layout.config.encode.flips else {}

    def scores(self, query: str) -> np.ndarray:
        """Minus the mean over draws; of an image and its mirror image the mean, as they were trained on alike."""
        losses = read_arrays(self.layout.base_scan)["losses"].mean(axis=1, dtype=float)
        return -(losses.reshape(2, -1).mean(axis=0) if self.layout.config.encode.flips else losses)
