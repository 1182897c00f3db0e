import numpy as np
import pytest
import torch

from forgetrace.attribution.heads import Heads, contrastive_loss, learning
from forgetrace.config import Learn


def test_before_any_step_similarities_are_cosines_of_the_features():
    random = np.random.default_rng(0)
    generated, candidates = random.standard_normal((3, 8)), random.standard_normal((5, 8))
    expected = generated @ candidates.T / np.outer(*(np.linalg.norm(x, axis=1) for x in (generated, candidates)))
    heads = Heads(8)
    found = heads.similarities(torch.tensor(generated).float(), torch.tensor(candidates).float())
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert all((layer.bias == 0).all() for layer in (heads.training_image, heads.generated))


def test_the_loss_by_hand():
    generated, exemplars = torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    s = np.array([[1.0, 0.6], [0.0, 0.8]]) / 0.5
    rows = np.mean([np.log(np.exp(s[i]).sum()) - s[i, i] for i in range(2)])
    columns = np.mean([np.log(np.exp(s[:, i]).sum()) - s[i, i] for i in range(2)])
    assert contrastive_loss(generated, exemplars, 0.5).item() == pytest.approx((rows + columns) / 2, rel=1e-6)


def test_learning_finds_the_direction_that_pairs_share():
    """Generated images are exemplars with loud noise in half of their features: the heads learn to leave it out."""
    random = np.random.default_rng(0)

    def model():
        own = random.standard_normal((1, 6))
        exemplars = np.concatenate([own, 3 * random.standard_normal((1, 6))], axis=1)
        generated = np.concatenate([np.repeat(own, 8, 0), 3 * random.standard_normal((8, 6))], axis=1)
        return tuple(torch.tensor(x).float() for x in (exemplars, generated))

    pairs, unseen = [model() for _ in range(12)], [model() for _ in range(12)]
    heads = Heads(12)
    candidates = torch.cat([exemplars for exemplars, _ in unseen])

    def found() -> float:
        return np.mean(
            [(heads.similarities(g, candidates).argmax(axis=1) == i).mean() for i, (_, g) in enumerate(unseen)]
        )

    settings, steps = Learn(steps=300, every=100, learning_rate=1e-2, temperature=0.2), []
    before = found()
    for step in learning(heads, pairs, settings, 0):
        steps.append(step)
    assert steps == [0, 100, 200, 300]
    assert found() > before + 0.2
