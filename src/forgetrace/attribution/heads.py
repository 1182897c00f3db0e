"""Two linear heads on frozen features (AbC, arXiv 2306.09345, section 4.2): h of training images, h̃ of others.

h̃ is that of generated images. Both start as the identity with zero bias, so that before any step similarities are
cosines of the encoder's features.
Outputs have length 1. A batch is one pair (exemplar, generated image) per customised model; the loss is the symmetric
NT-Xent: with s_ij the similarity of generated image i and exemplar j,

    −½ mean_i log softmax_j(s_ij / ν)[i] − ½ mean_j log softmax_i(s_ij / ν)[j].
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from forgetrace.config import Learn
from forgetrace.randomness import generator

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


class Heads(nn.Module):
    """h and h̃."""

    def __init__(self, width: int):
        """Args: width of the encoder's features."""
        super().__init__()
        self.training_image, self.generated = (_identity(width) for _ in range(2))

    def of_training_images(self, features: torch.Tensor) -> torch.Tensor:
        """(n, width) -> (n, width), rows of length 1."""
        return F.normalize(self.training_image(features), dim=1)

    def of_generated(self, features: torch.Tensor) -> torch.Tensor:
        """(n, width) -> (n, width), rows of length 1."""
        return F.normalize(self.generated(features), dim=1)

    @torch.no_grad()
    def similarities(self, generated: torch.Tensor, candidates: torch.Tensor) -> np.ndarray:
        """(q, width) and (N, width) -> (q, N), float64."""
        return (self.of_generated(generated) @ self.of_training_images(candidates).T).double().numpy()


def _identity(width: int) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, width, width)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(width))
        layer.bias.zero_()
    return layer


def contrastive_loss(generated: torch.Tensor, exemplars: torch.Tensor, temperature: float) -> torch.Tensor:
    """Symmetric NT-Xent of B pairs of unit vectors, (B, width) each."""
    similarities = generated @ exemplars.T / temperature
    own = torch.arange(len(similarities))
    return (F.cross_entropy(similarities, own) + F.cross_entropy(similarities.T, own)) / 2


def learning(heads: Heads, pairs: Pairs, settings: Learn, seed: int):
    """Train the heads, in place; yields the number of finished steps after each ``every`` of them, 0 first.

    Args:
        heads: to train.
        pairs: of each model, features of its exemplars (n, width) and of its generated images (m, width).
        settings: the recipe.
        seed: of the pairs of every step.
    """
    optimizer = torch.optim.AdamW(heads.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    yield 0
    for step in range(settings.steps):
        random = generator(seed, "contrastive pairs", step)
        exemplars = torch.stack([own[int(random.integers(len(own)))] for own, _ in pairs])
        generated = torch.stack([own[int(random.integers(len(own)))] for _, own in pairs])
        loss = contrastive_loss(
            heads.of_generated(generated), heads.of_training_images(exemplars), settings.temperature
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % settings.every == 0:
            yield step + 1
