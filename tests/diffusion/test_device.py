import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from forgetrace.diffusion import device

# What a job does, on a machine that is said to have two GPUs.
JOB = """
import sys, torch
from types import SimpleNamespace
from forgetrace.diffusion import device
torch.cuda.device_count = lambda: 2
torch.cuda.get_device_properties = lambda index: SimpleNamespace(uuid=f"gpu-{index}")
print(device._free_gpu(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """Says how many GPUs there are."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"gpu-{index}"))
    device._free_gpu.cache_clear()
    yield lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    device._free_gpu.cache_clear()


def test_jobs_side_by_side_take_a_gpu_each_and_leave_it_when_they_end_even_when_killed(tmp_path):
    environment = {"TMPDIR": str(tmp_path), "PATH": ""}

    def job() -> subprocess.Popen:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-c", JOB], env=environment, **pipes)

    jobs = []
    try:
        for expected in ("cuda:0", "cuda:1"):
            jobs.append(job())
            assert jobs[-1].stdout.readline().strip() == expected
        jobs.append(job())  # all are taken: one is shared
        assert jobs[-1].stdout.readline().strip() in ("cuda:0", "cuda:1")
        jobs[1].kill()
        jobs[1].wait()
        jobs.append(job())
        assert jobs[-1].stdout.readline().strip() == "cuda:1"
    finally:
        for process in jobs:
            process.kill()
            process.communicate()


def test_a_process_keeps_its_gpu(gpus):
    gpus(3)
    assert device._free_gpu() == device._free_gpu() == "cuda:0"


def test_a_single_gpu_needs_no_lock(gpus, tmp_path):
    gpus(1)
    assert device._free_gpu() == "cuda"
    assert not list(tmp_path.iterdir())


def test_processes_of_one_training_take_those_of_their_numbers(gpus, monkeypatch, tmp_path):
    gpus(4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert device._free_gpu() == "cuda:2"
    assert not list(tmp_path.iterdir())


def unrepeatable(weight: torch.Tensor) -> torch.Tensor:
    """Leaves a gradient, then computes what PyTorch has no repeatable kernel for, on a CPU either."""
    (weight * 2).sum().backward()
    return torch.zeros(3).put_(torch.tensor([1]), torch.tensor([5.0]))


def test_gradients_are_repeatable_or_it_is_said_that_they_are_not(caplog):
    weight, seen = torch.ones(2, requires_grad=True), []

    def clear():
        weight.grad = None

    def compute():
        seen.append(torch.is_deterministic_algorithms_warn_only_enabled())
        return unrepeatable(weight)

    repeatable = device.Repeatable(torch.device("cpu"))
    assert not repeatable.strict  # a single thread repeats itself
    assert not device.Repeatable(torch.device("cuda"), processes=2).strict
    repeatable.strict = True  # as on a GPU
    try:
        with pytest.warns(UserWarning, match="put_"):  # PyTorch's own, once it only warns
            assert repeatable(compute, clear).tolist() == [0, 5, 0]
        assert seen == [False, True]
        assert weight.grad.tolist() == [2, 2]  # once, not twice
        assert "put_" in caplog.text
        assert "will differ by rounding" in caplog.text
        clear()
        repeatable(compute, clear)
        assert len(seen) == 3  # not tried again
    finally:
        torch.use_deterministic_algorithms(False)


def test_other_errors_are_not_taken_for_unrepeatable_kernels():
    repeatable = device.Repeatable(torch.device("cpu"))
    repeatable.strict = True

    def fail():
        raise RuntimeError("out of memory")

    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            repeatable(fail, lambda: None)
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
