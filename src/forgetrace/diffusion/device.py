"""Where the work runs and in which precision."""

import ctypes
import fcntl
import functools
import logging
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from forgetrace.artifacts import UserError

log = logging.getLogger(__name__)
Found = TypeVar("Found")


def pick_device(name: str = "auto") -> torch.device:
    """The device to compute on, set up for it: full fp32 and repeatable kernels on a GPU, a tuned CPU.

    Args:
        name: ``auto`` (CUDA if there is one, else CPU; of several GPUs the first that no other job has) or a torch
            device such as ``cpu`` or ``cuda:1``.

    Raises:
        UserError: the named device does not exist here.
    """
    if name == "auto":
        name = _free_gpu() if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # accelerate trains on the current device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"--device {name} cannot be used here ({reason}); try --device cpu.") from None
    if device.type == "cpu":
        _tune_cpu()
    else:
        # Scores are small differences: fp32 must be fp32, and a model must repeat itself.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # heeded from the first matrix product on
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    return device


@functools.cache
def _free_gpu() -> str:
    """The first GPU that no other process of ours on this machine has taken; it is this one's until it ends.

    The kernel drops the lock with the process, so that none is ever stale. Where all are taken, jobs share; where
    ``torchrun`` or ``accelerate launch`` started several processes, each takes the one of its own number.
    """
    count, rank = torch.cuda.device_count(), os.environ.get("LOCAL_RANK")
    if count < 2 or rank is not None:
        return "cuda" if rank is None else f"cuda:{int(rank) % count}"
    for index in range(count):
        # By what the GPU is: its number differs between processes that see different ones.
        own = Path(
            tempfile.gettempdir(), f"forgetrace-{os.getuid()}-gpu-{torch.cuda.get_device_properties(index).uuid}"
        )
        held = os.open(own, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(held)  # another job's, or a file system without locks
            continue
        return f"cuda:{index}"  # the lock stays open
    return f"cuda:{os.getpid() % count}"


def make_deterministic() -> None:
    """Choose repeatable kernels for all else too, where a GPU has them; for trainings, whose differences grow.

    A single-threaded CPU training is repeatable as it is.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Else every new tensor is filled first, to show reads of uninitialised memory: a twentieth of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False


class Repeatable:
    """Computes gradients with kernels that repeat themselves, on a GPU.

    To be warned of the others is not enough: attention's fused backward has a repeatable way, and takes it only where
    all else is refused. Where a model needs a kernel that has none, it goes on without, after a warning. Several
    processes that train one model cannot compute a refused step again: nothing is refused there.
    """

    def __init__(self, device: torch.device, processes: int = 1):
        self.strict = device.type == "cuda" and processes == 1

    def __call__(self, compute: Callable[[], Found], clear: Callable[[], None]) -> Found:
        """What ``compute`` returns; ``clear`` forgets what it left behind when it was refused."""
        if not self.strict:
            return compute()
        torch.use_deterministic_algorithms(True)
        try:
            return compute()
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            log.warning("%s Two trainings of one model will differ by rounding.", str(error).partition(". ")[0] + ".")
            self.strict = False
        finally:
            torch.use_deterministic_algorithms(True, warn_only=True)
        clear()
        return compute()


def native_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 faster than fp32; emulated bf16 is many times slower."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return _cpu_has_bf16()


@functools.cache
def _cpuinfo() -> str:
    """What Linux says of the processors; empty elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _cpu_has_bf16() -> bool:
    return any(flag in _cpuinfo() for flag in ("avx512_bf16", "amx_bf16"))


def processor_name(device: torch.device) -> str:
    """The model of the GPU, or of the CPU with its widest vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models = [line.partition(":")[2].strip() for line in _cpuinfo().splitlines() if line.startswith("model name")]
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def resolve_precision(precision: str, device: torch.device) -> str:
    """``fp32`` or ``bf16`` for a config's precision."""
    if precision == "auto":
        return "bf16" if native_bf16(device) else "fp32"
    return precision


# glibc's mallopt parameters, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


@functools.cache
def _tune_cpu() -> None:
    """Keep freed memory in the process and treat denormal numbers as zero.

    A training step allocates and frees the same few hundred tensors; by default glibc hands large ones
    back to the kernel each time, and their page faults cost a tenth of the step.
    """
    torch.set_flush_denormal(True)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # not glibc
    mallopt(M_MMAP_THRESHOLD, 2**30)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
