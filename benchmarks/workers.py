"""Processes that work when told to, so that two ways to do a thing can be timed side by side.

Allocator settings, denormal flushing and thread counts belong to a process: reference and candidate each live in
their own and take turns, so that whatever else the machine does meets both.
"""

import contextlib
import multiprocessing
import os
import statistics
import sys
import time
import traceback
import unittest.mock
from collections.abc import Callable, Iterator, Sequence

from forgetrace.artifacts import UserError

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices() -> list[str]:
    """What to measure on: ``cpu``, and ``cuda`` where there is one."""
    import torch

    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def synchronise() -> None:
    """Wait for a GPU, where this process uses one: a clock read earlier would show the time to ask, not to do."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def timed(piece: Callable[[], float], seconds: float) -> tuple[float, float]:
    """Do pieces of work, at least one, until the time is over; (units of work done, seconds taken)."""
    synchronise()
    units, start = 0, time.perf_counter()
    while True:
        units += piece()
        synchronise()
        if (taken := time.perf_counter() - start) >= seconds:
            return units, taken


class Worker:
    """A process that prepares once and then works whenever it is told to."""

    def __init__(self, prepare: Callable[..., Callable], *args: object, threads: int | None = 1):
        """Start it.

        Args:
            prepare: an importable function; called in the new process, returns the function that does the work.
            args: its arguments.
            threads: of PyTorch; None leaves PyTorch's default.
        """
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, os.getcwd(), prepare, args), daemon=True)
        with unittest.mock.patch.dict(os.environ, TQDM_DISABLE="1"):
            for name in THREADS:
                os.environ.pop(name, None)
                os.environ |= {name: str(threads)} if threads else {}
            self.process.start()
        other.close()

    def tell(self, *request: object) -> None:
        """Have the work done with these arguments."""
        self.pipe.send(request)

    def answer(self) -> object:
        """What the preparation (None) or the work returned.

        Raises:
            UserError: as raised in the worker.
            RuntimeError: anything else that went wrong there, with its traceback.
        """
        try:
            kind, content = self.pipe.recv()
        except EOFError:
            raise RuntimeError("a worker process was killed; is there enough memory?") from None
        if kind is not None:
            raise kind(content)
        return content

    def call(self, *request: object) -> object:
        """Tell, and wait for the answer."""
        self.tell(*request)
        return self.answer()


@contextlib.contextmanager
def team(
    count: int, prepare: Callable[..., Callable], *args: object, threads: int | None = 1
) -> Iterator[list[Worker]]:
    """Workers that are ready; they end with the block."""
    workers = [Worker(prepare, *args, threads=threads) for _ in range(count)]
    try:
        for worker in workers:
            worker.answer()
        yield workers
    finally:
        for worker in workers:
            worker.pipe.close()
            worker.process.join(5)
            worker.process.terminate()  # where it is still at work, after an error here
            worker.process.join()


def rate(workers: Sequence[Worker], *request: object) -> float:
    """Units per second of workers that work at the same time, each returning (units, seconds)."""
    for worker in workers:
        worker.tell(*request)
    return sum(units / seconds for units, seconds in [worker.answer() for worker in workers])


def interleave(sides: Sequence[Callable[[], float]], repeats: int) -> list[list[float]]:
    """Ask the sides in turn, again and again; the first round warms up and does not count."""
    rounds = [[side() for side in sides] for _ in range(repeats + 1)]
    return [list(values) for values in zip(*rounds[1:], strict=True)]


def fastest(workers: Sequence[Worker], options: Sequence[int], seconds: float) -> tuple[int, dict[int, float]]:
    """The option of the work that gives the best rate, and the median rates of all."""
    rates = interleave([lambda option=option: rate(workers, seconds, option) for option in options], 2)
    medians = dict(zip(options, map(statistics.median, rates), strict=True))
    return max(medians, key=medians.get), medians


def _serve(pipe, folder: str, prepare: Callable[..., Callable], args: tuple) -> None:
    os.chdir(folder)
    try:
        work = prepare(*args)
        pipe.send((None, None))
        while True:
            pipe.send((None, work(*pipe.recv())))
    except UserError as error:
        pipe.send((UserError, str(error)))
    except EOFError:
        pass  # nobody asks any more
    except Exception:
        pipe.send((RuntimeError, traceback.format_exc()))
