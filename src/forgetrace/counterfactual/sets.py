"""Which images a retraining leaves out."""

from typing import TYPE_CHECKING

import numpy as np

from forgetrace.artifacts import UserError
from forgetrace.attribution.ranking import read_ranking
from forgetrace.config import HALF_SET, RANDOM, SEED_SET
from forgetrace.layout import Layout, training_name
from forgetrace.randomness import generator

if TYPE_CHECKING:
    from forgetrace.diffusion.training import Training
    from forgetrace.encoding.store import Encoded


def training_of(layout: Layout, encoded: "Encoded", method: str, k: int, member: str) -> "Training":
    """The retraining named (method, k, member).

    Args:
        layout: the experiment.
        encoded: D.
        method: a scored method, ``random``, ``seed`` (nothing removed, another training seed) or ``half``.
        k: images to leave out (0 for seed and half).
        member: the query whose top k are removed, or ``pool<i>`` for those of all queries of a pool; ``draw<i>`` for
            random sets, seeds and halves; ``draw<i>-seed<j>`` for a half trained once more.

    Raises:
        UserError: k leaves nothing to train on, or the ranking does not fit the data.
    """
    # Imported here because evaluation needs the halves and no torch.
    from forgetrace.diffusion.training import Training

    name, seed = training_name(method, k, member), layout.config.seed
    removed = np.zeros(len(encoded), dtype=bool)
    if method == SEED_SET:
        # Seeds of retrainings are derived, so that no draw repeats θ0's.
        return Training(name, int(generator(seed, "retrain", member).integers(2**31)), removed)
    if method == HALF_SET:
        draw, _, again = member.partition("-")
        seed = int(generator(seed, "retrain half", again).integers(2**31)) if again else seed
        return Training(name, seed, ~half(layout, len(encoded), draw))
    if (method, k, member) in layout.pooled_models():
        for query in layout.pool(member):
            removed |= top(layout, encoded.image_ids, method, k, query)
        if removed.all():
            raise UserError(f"retrain.pooled_k: {k} images of each query are all there are; choose a smaller K.")
        return Training(name, seed, removed)
    if k >= len(encoded):
        raise UserError(f"retrain.k: {k} images cannot be left out of {len(encoded)}; choose a smaller K.")
    if method == RANDOM:
        removed[generator(seed, "leave out", k, member).permutation(len(encoded))[:k]] = True
    else:
        removed = top(layout, encoded.image_ids, method, k, member)
    return Training(name, seed, removed)


def half(layout: Layout, images: int, draw: str) -> np.ndarray:
    """The random half of D that the models ``draw<i>`` and ``draw<i>-seed<j>`` train on, rounded up, (N,), bool."""
    kept = np.ones(images, dtype=bool)
    kept[generator(layout.config.seed, HALF_SET, draw).permutation(images)[: images // 2]] = False
    return kept


def top(layout: Layout, image_ids: list[str], method: str, k: int, query: str) -> np.ndarray:
    """A method's k most influential images for a query, (N,), bool, in the order of ``image_ids``."""
    return read_ranking(layout, method, query, image_ids)["rank"].to_numpy() <= k
