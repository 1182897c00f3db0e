"""What a GPU computes is what the CPU computes, but for rounding; for machines that have one."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from forgetrace.artifacts import read_arrays, read_json, read_table, read_tensors
from forgetrace.attribution.scan import scan
from forgetrace.attribution.score import score
from forgetrace.counterfactual.retrain import measure_shared, retrain
from forgetrace.curvature.fit import fit
from forgetrace.diffusion import captured
from forgetrace.diffusion import training as training_module
from forgetrace.diffusion.device import Repeatable, make_deterministic
from forgetrace.diffusion.synthesis import synthesize
from forgetrace.diffusion.training import Training, discard_checkpoints, train_as_one
from forgetrace.encoding.store import load_encoded
from forgetrace.layout import Layout
from forgetrace.unlearning.quality import regenerate_unlearned
from forgetrace.unlearning.variants import unlearn_query

from .conftest import IMAGES, SETTINGS, settings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

GRADIENT_METHODS = {
    "influence": {"timesteps": 2},
    "ekfac": {"attributor": "influence", "curvature": "ekfac", "timesteps": 2},
    "datainf": {"timesteps": 2},
    "tracin": {"timesteps": 2},
    "retrac": {"timesteps": 2},
    "trak": {"timesteps": 2, "noises": 2, "dimension": 32},
    "d-trak": {"timesteps": 2, "noises": 2, "dimension": 32},
    "journey-trak": {"timesteps": 2, "noises": 2, "dimension": 32},
    "das": {"timesteps": 2, "noises": 2, "dimension": 32},
    "unet-features": {},
}
VARIANTS = {
    "unlearn": {"step_size": 1e-4, "draws": 32},
    "ekfac": {"curvature": "ekfac", "step_size": 1e-4, "draws": 32},
    "forward-inf": {"procedure": "adam", "step_size": 1e-4, "steps": 2, "draws": 16},
    "mucs": {"procedure": "mucs", "steps": 2, "draws": 16},
}


@pytest.fixture
def gpu(tiny) -> Layout:
    """The tiny experiment, made on the CPU, with more methods."""
    methods = SETTINGS["score"]["methods"] | GRADIENT_METHODS
    sections = {"unlearn": {**SETTINGS["unlearn"], **VARIANTS}, "score": {"methods": methods}}
    # A user's image has no initial noise, which journey-trak starts from.
    return Layout("tiny", settings(synthesize={"queries": [{"pool": "report", "count": 2}]}, **sections))


def both(compute, read) -> tuple:
    """What the CPU leaves and what the GPU leaves in its place."""
    found = []
    for device in ("cpu", "cuda"):
        compute(device)
        found.append(read())
    return tuple(found)


def close(cpu: np.ndarray, cuda: np.ndarray, tolerance: float) -> None:
    """Compare with the largest value: some gradients are rounding alone."""
    cpu, cuda = np.asarray(cpu, dtype=float), np.asarray(cuda, dtype=float)
    assert np.isfinite(cuda).all()
    assert np.abs(cpu - cuda).max() <= tolerance * np.abs(cpu).max()


def trained(layout: Layout, trainings: list[Training], device: str) -> list:
    """Train on a device; accelerate would stay on the one that the process trained on first."""
    AcceleratorState._reset_state(reset_partial_state=True)
    discard_checkpoints(layout, *trainings)
    return train_as_one(layout, load_encoded(layout), trainings, device)


ALONE = [Training("one", 5, np.zeros(IMAGES, dtype=bool))]
SEVERAL = [Training(f"without-{count}", 5, np.arange(IMAGES) < count) for count in (0, 3, 9)]


@pytest.mark.parametrize("trainings", [ALONE, SEVERAL])
def test_a_training(gpu, trainings):
    for (cpu, curve, _), (cuda, cuda_curve, record) in zip(
        *(trained(gpu, trainings, device) for device in ("cpu", "cuda")), strict=True
    ):
        close(curve["loss"], cuda_curve["loss"], 1e-4)
        for name in cpu:
            close(cpu[name], cuda[name], 2e-2)
        assert record["processor"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("trainings", [ALONE, SEVERAL])
def test_a_training_repeats_itself(gpu, trainings):
    first, second = (trained(gpu, trainings, "cuda")[-1][0] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_attention_to_many_positions_repeats_itself():
    """Fused attention sums up blocks of keys, of which the tiny model's 64 positions have one, in any order."""
    device, random = torch.device("cuda"), torch.Generator("cuda").manual_seed(0)
    states = torch.randn(3, 4, 8, 1024, 32, generator=random, device=device).requires_grad_()

    def compute():
        torch.nn.functional.scaled_dot_product_attention(*states).square().sum().backward()
        gradient, states.grad = states.grad, None
        return gradient

    make_deterministic()
    repeatable = Repeatable(device)
    found = [repeatable(compute, lambda: None) for _ in range(5)]
    assert repeatable.strict
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("trainings", [ALONE, SEVERAL])
def test_a_recorded_step_is_a_launched_one(gpu, monkeypatch, trainings):
    recorded = trained(gpu, trainings, "cuda")
    monkeypatch.setattr(captured, "EAGER", 1000)
    for (weights, curve, _), (expected, expected_curve, _) in zip(
        recorded, trained(gpu, trainings, "cuda"), strict=True
    ):
        close(expected_curve["loss"], curve["loss"], 1e-6)
        for name in weights:
            close(expected[name], weights[name], 1e-4)


def test_a_step_is_recorded(gpu, caplog):
    AcceleratorState._reset_state(reset_partial_state=True)
    loop = training_module._Loop(gpu, load_encoded(gpu), SEVERAL, Accelerator(), "fp32")
    for _ in range(captured.EAGER + 2):
        loop.run_step()
    assert loop.gradients.graph is not None
    assert loop.repeatable.strict
    assert not caplog.records


def test_the_base_model_and_a_query(gpu):
    latent = lambda: read_arrays(gpu.query("report-00")["tensors"])["latent"]  # noqa: E731

    def compute(device):
        record = gpu.query("report-00")["record"]
        Path(record).write_text("{}")
        synthesize(gpu, "report-00", device)

    close(*both(compute, latent), 1e-3)


@pytest.mark.parametrize("curvature", ["diagonal", "ekfac"])
def test_the_fisher_information(gpu, curvature):
    cpu, cuda = both(lambda device: fit(gpu, curvature, device), lambda: read_tensors(gpu.fitted(curvature)[0]))
    for name in cpu:
        if not name.endswith(("Q_A", "Q_G")):  # eigenvectors of equal eigenvalues may be any
            close(cpu[name], cuda[name], 1e-2 if curvature == "ekfac" else 1e-3)


@pytest.mark.parametrize("variant", [*VARIANTS, "unlearn-sgd"])
def test_unlearning_and_its_scan(gpu, variant):
    fit(gpu, "ekfac", "cpu")

    def compute(device):
        unlearn_query(gpu, variant, "report-00", device)
        scan(gpu, variant, "report-00", device)

    cpu, cuda = both(compute, lambda: read_arrays(gpu.scan(variant, "report-00"))["losses"])
    close(cpu, cuda, 1e-3)


def test_the_scan_of_the_base_model(gpu):
    close(*both(lambda device: scan(gpu, device=device), lambda: read_arrays(gpu.base_scan)["losses"]), 1e-5)


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_a_method_that_runs_the_model(gpu, method):
    from forgetrace.attribution.registry import attributor

    fit(gpu, "ekfac", "cpu")

    def compute(device):
        for features in attributor(gpu, method, device).features():
            features.fit()
        for query in gpu.config.queries():
            Path(gpu.score(method, query)).unlink(missing_ok=True)
        score(gpu, method, device=device)

    table = lambda: read_table(gpu.score(method, "report-00")).sort_values("image_id")["score"].to_numpy()  # noqa: E731
    cpu, cuda = both(compute, table)
    assert np.corrcoef(cpu, cuda)[0, 1] > 0.999


def test_retraining_and_measuring(gpu):
    AcceleratorState._reset_state(reset_partial_state=True)
    for model in gpu.shared_models()[1:]:
        retrain(gpu, [model], "cuda")
    measure_shared(gpu, "report-00", "cuda")
    together = replace(gpu, config=settings(retrain={"stack": 4}))
    retrain(together, [("unlearn", 10, "report-00"), ("random", 10, "draw9")], "cuda")
    record = read_json(gpu.measure("unlearn", 10, "report-00", "report-00")["losses"])
    assert record["processor"] == torch.cuda.get_device_name()
    assert np.isfinite(record["losses"]).all()


def test_what_unlearning_changes(gpu):
    layout = replace(gpu, config=settings(evaluate={"others": 2}))
    for query in layout.config.forgotten_queries():
        unlearn_query(layout, "unlearn", query, "cuda")
    cpu, cuda = both(
        lambda device: regenerate_unlearned(layout, "unlearn", device),
        lambda: read_arrays(layout.regenerated("unlearn")),
    )
    assert cpu.keys() == cuda.keys()
    for name, values in cpu.items():
        assert np.abs(values.astype(float) - cuda[name]).mean() < 0.02 * 255
