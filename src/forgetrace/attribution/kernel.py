"""The scores of the TRAK family from features: what is left is linear algebra, in float64.

    τ = φ(q)ᵀ (ΦᵀΦ + λI)⁻¹ φ(z),    λ = damping · mean diag(ΦᵀΦ)

(TRAK, arXiv 2303.14186, with the λ of D-TRAK, 2311.00500), Φ the features (N, d) of the training images. λ is
relative, so that one damping serves features of any scale. With fewer images than dimensions the inverse is taken
of N x N:

    (ΦᵀΦ + λI)⁻¹ Φᵀ = Φᵀ (ΦΦᵀ + λI)⁻¹.
"""

from collections.abc import Iterator

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.linalg.blas import dsyrk

from forgetrace.artifacts import UserError

HELD = 2**25  # numbers of Φ in float64 at once


def kernel_scores(training: np.ndarray, queries: np.ndarray, damping: float) -> np.ndarray:
    """τ of every query and training image.

    Args:
        training: Φ, (N, d), any float; may be memory-mapped.
        queries: φ(q), (Q, d).
        damping: λ in multiples of the mean of ΦᵀΦ's diagonal.

    Returns:
        (Q, N), float64.

    Raises:
        UserError: without damping, where ΦᵀΦ (or ΦΦᵀ) has no inverse.
    """
    images, dimension = training.shape
    queries = queries.astype(np.float64)
    dual = images < dimension
    gram = np.zeros((min(training.shape),) * 2, order="F")
    for part in _parts(training.T if dual else training):
        # In place, and one triangle alone: of 32,768 dimensions a product beside the sum would take 8.6 GB more. The
        # transpose of a part is in the order of memory that is not copied.
        dsyrk(1.0, part.T, 1.0, gram, lower=1, overwrite_c=1)
    gram[np.diag_indices_from(gram)] += damping * np.trace(gram) / dimension
    try:
        factor = cho_factor(gram, lower=True, overwrite_a=True)
    except np.linalg.LinAlgError:
        raise UserError(
            "The gradients of the training images are linearly dependent: set the method's damping above 0."
        ) from None
    if dual:
        return cho_solve(factor, _products(queries, training).T).T
    return _products(cho_solve(factor, queries.T).T, training)


def residuals(losses: np.ndarray) -> np.ndarray:
    """DAS's error term: r_t = √MSE_t, divided by its length over timesteps, averaged; (N, K) -> (N,), float64."""
    roots = np.sqrt(losses.astype(np.float64))
    return (roots / np.linalg.norm(roots, axis=1, keepdims=True)).mean(axis=1)


def _products(rows: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Inner products with all of Φ, (Q, d) and (N, d) -> (Q, N)."""
    return np.hstack([rows @ part.T for part in _parts(training)])


def _parts(matrix: np.ndarray) -> Iterator[np.ndarray]:
    """Some rows of a matrix after the other, in float64."""
    count = max(1, HELD // matrix.shape[1])
    for start in range(0, len(matrix), count):
        yield np.asarray(matrix[start : start + count], dtype=np.float64)
