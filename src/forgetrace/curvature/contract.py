"""What a curvature is to the step that uses it: a map from gradients to preconditioned gradients."""

from collections.abc import Mapping
from typing import Protocol

import torch


class Curvature(Protocol):
    """An (approximate) inverse Fisher information on named weights."""

    def precondition(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """(F + λ)⁻¹ g by weight name, shapes and dtypes of the gradients."""
        ...


class Identity:
    """No curvature: plain gradient ascent."""

    def precondition(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The gradients themselves."""
        return dict(gradients)
