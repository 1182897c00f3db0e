"""From similarities to a probability over candidates (AbC, arXiv 2306.09345, section 4.3).

``P(z | ẑ) ∝ ReLU(exp((s − s₀)/τ) − λ)`` with s the similarity of a candidate and s₀ the largest one, so that candidates
too far below the best get none. 1/τ and λ minimise the mean ``KL(S ‖ P)`` over queries, S uniform on the exemplars.
With a hard ReLU that is infinite as soon as an exemplar gets nothing: Softplus (β = 100) stands for it in the fit.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

BETA, STEPS, RATE = 100.0, 500, 0.05
START = 20.0, 0.1  # 1/τ and λ


@dataclass(frozen=True)
class Calibration:
    """What turns similarities into probabilities.

    Attributes:
        sharpness: 1/τ.
        cutoff: λ, below 1.
    """

    sharpness: float
    cutoff: float

    def probabilities(self, similarities: np.ndarray) -> np.ndarray:
        """P of one query's candidates; (N,) -> (N,), float64, sum 1."""
        weights = np.exp((similarities - similarities.max()) * self.sharpness) - self.cutoff
        weights = np.maximum(weights, 0)
        return weights / weights.sum()


def divergence(
    similarities: torch.Tensor, exemplars: torch.Tensor, sharpness: torch.Tensor, cutoff: torch.Tensor
) -> torch.Tensor:
    """KL(S ‖ P) of one query with Softplus in place of ReLU, a scalar.

    Args:
        similarities: s, (N,).
        exemplars: which candidates are, (N,), bool.
        sharpness: 1/τ.
        cutoff: λ.
    """
    weights = F.softplus(torch.exp((similarities - similarities.max()) * sharpness) - cutoff, beta=BETA, threshold=1e3)
    return weights.sum().log() - weights[exemplars].log().mean() - exemplars.sum().log()


def calibrate(queries: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Calibration, float]:
    """Fit 1/τ and λ.

    Args:
        queries: of each, similarities (N,) and which candidates are exemplars (N,), bool.

    Returns:
        The calibration and the mean divergence at it.
    """
    tensors = [(torch.from_numpy(s).double(), torch.from_numpy(e)) for s, e in queries]
    # Both by unbounded numbers: 1/τ > 0, 0 < λ < 1.
    free = torch.tensor([np.log(START[0]), np.log(START[1] / (1 - START[1]))], requires_grad=True)
    optimizer = torch.optim.Adam([free], lr=RATE)

    def loss() -> torch.Tensor:
        values = [divergence(s, e, free[0].exp(), free[1].sigmoid()) for s, e in tensors]
        return torch.stack(values).mean()

    best, found = float("inf"), free.detach().clone()
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        if value.item() < best:
            best, found = value.item(), free.detach().clone()
        optimizer.step()
    return Calibration(float(found[0].exp()), float(found[1].sigmoid())), best
