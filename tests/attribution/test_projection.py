import numpy as np
import pytest
import torch

from forgetrace.attribution import projection
from forgetrace.attribution.projection import project
from forgetrace.randomness import generator

SHAPES = {"linear": (6, 5), "convolution": (4, 3, 2, 2), "bias": (7,), "scalar": ()}
DIMENSION, SEED = 16, 3


def stream(gradients: dict[str, torch.Tensor], chunk: int = 100):
    """Gradients (B, *shape) by name, as per_example_gradients yields them."""
    for name, values in gradients.items():
        for start in range(0, len(values), chunk):
            yield name, slice(start, start + chunk), values[start : start + chunk]


def some_gradients(count: int, seed: int = 0, shapes=SHAPES) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, *shape, generator=source) for name, shape in shapes.items()}


def by_hand(name: str, shape: tuple[int, ...], dimension: int, seed: int) -> np.ndarray:
    """The columns of P that belong to one weight, (dimension, size), number by number."""
    size = int(np.prod(shape))
    random = generator(seed, "projection", name)
    shifts = random.integers(dimension, size=-(-size // dimension))
    bits = [(byte >> (7 - place)) & 1 for byte in random.bytes(-(-size // 8)) for place in range(8)]
    matrix = np.zeros((dimension, size))
    for i in range(size):
        matrix[(i + shifts[i // dimension]) % dimension, i] = 2 * bits[i] - 1
    return matrix


@pytest.mark.parametrize("dimension", [1, 16, 200])
@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_the_projection_is_its_matrix(dimension, chunk):
    gradients = some_gradients(3)
    expected = np.zeros((3, dimension))
    for name, values in gradients.items():
        # Convolutions channels last.
        numbers = values.permute(0, 1, 3, 4, 2) if values.ndim == 5 else values
        expected += numbers.reshape(3, -1).double().numpy() @ by_hand(name, values.shape[1:], dimension, SEED).T
    found = project(stream(gradients, chunk), 3, dimension, SEED)
    assert found.shape == (3, dimension)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_chunks_batches_threads_and_layout_in_memory_change_no_bit():
    shapes = {**SHAPES, "large": (60, 50)}
    gradients = some_gradients(9, shapes=shapes)
    whole = project(stream(gradients), 9, DIMENSION, SEED)
    strided = {
        name: torch.movedim(values, 0, -1).contiguous().movedim(-1, 0) if values.ndim > 1 else values
        for name, values in gradients.items()
    }
    torch.set_num_threads(2)
    assert torch.equal(project(stream(gradients, 2), 9, DIMENSION, SEED), whole)
    assert torch.equal(project(stream(strided), 9, DIMENSION, SEED), whole)
    alone = [project(stream({n: v[i : i + 1] for n, v in gradients.items()}), 1, DIMENSION, SEED)[0] for i in range(9)]
    assert torch.equal(torch.stack(alone), whole)


def test_it_is_linear_and_hangs_on_the_seed_and_the_names():
    a, b = some_gradients(2, 0), some_gradients(2, 1)
    both = {name: 2 * a[name] - 3 * b[name] for name in a}
    found = [project(stream(gradients), 2, DIMENSION, SEED) for gradients in (a, b, both)]
    torch.testing.assert_close(found[2], 2 * found[0] - 3 * found[1])
    assert not torch.allclose(project(stream(a), 2, DIMENSION, SEED + 1), found[0])
    renamed = {f"other {name}": values for name, values in a.items()}
    assert not torch.allclose(project(stream(renamed), 2, DIMENSION, SEED), found[0])


def concentrated(count: int) -> dict[str, torch.Tensor]:
    """Gradients of one input alone, a column of the weight, which comes back with the period of a run of 64."""
    values = torch.zeros(count, 96, 16)
    values[:, :, 5] = torch.randn(count, 96, generator=torch.Generator().manual_seed(2))
    return {"linear": values}


@pytest.mark.parametrize(
    "gradients", [some_gradients(2, shapes={"linear": (96, 16), "bias": (96,)}), concentrated(2)], ids=["all", "column"]
)
def test_inner_products_are_right_on_average_and_within_the_stated_error(gradients):
    """Over many P: the mean is ⟨a, b⟩, the variance at most what the module says and not much less."""
    dimension, draws = 64, 2000
    full = torch.cat([values.flatten(1) for values in gradients.values()], dim=1).double()
    exact = (full @ full.T).numpy()
    found = np.empty((draws, 2, 2))
    for seed in range(draws):
        projected = project(stream(gradients), 2, dimension, seed).double()
        found[seed] = (projected @ projected.T).numpy()
    lengths = np.diag(exact)
    stated = np.sqrt((np.outer(lengths, lengths) + exact**2) / dimension)
    assert (np.abs(found.mean(axis=0) - exact) < 4 * stated / np.sqrt(draws)).all()
    assert (found.std(axis=0) < 1.1 * stated).all()
    assert (found.std(axis=0) > 0.8 * stated).all()


def test_the_matrix_is_never_held(monkeypatch):
    """Of P, the signs of one weight at a time."""
    projection._columns.cache_clear()
    project(stream(some_gradients(3), 1), 3, DIMENSION, SEED)
    known = projection._columns.cache_info()
    assert known.misses == len(SHAPES)
    assert known.currsize == 1
