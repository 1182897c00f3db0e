"""diffusers without what no job here needs of it: a job of seconds should not wait for ten of them to begin.

Its UNet and schedulers ask for torch's compiler, in order to mark functions for it, and for peft and transformers, for
models that are none of ours; together they are half of what a job imports. A library that is asked for by its own name
is there as ever.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

NAME = "diffusers"
USED = ("DDPMScheduler", "DDIMScheduler", "UNet2DConditionModel")
COMPILER = "torch._dynamo"
ABSENT = ("peft", "transformers")
AS_A_JOB = "from forgetrace.imports import lean_diffusers; lean_diffusers()"  # for programs that time a job's start


class Finder(MetaPathFinder):
    """Finds diffusers where it is and has it imported by :class:`Lean`."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        """The package's own spec with another loader."""
        if name != NAME:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec:
            spec.loader = Lean(spec.loader)
        return spec


class Lean(Loader):
    """Imports diffusers without its company, or with, should that fail."""

    def __init__(self, own: Loader) -> None:
        self.own = own

    def exec_module(self, module: ModuleType) -> None:
        """Import the package and what is used of it."""
        before = set(sys.modules)
        module.__spec__.loader = module.__loader__ = self.own
        try:
            with _alone():
                self.own.exec_module(module)
                for name in USED:
                    getattr(sys.modules[NAME], name)
        except Exception:
            # Another version may ask for more.
            for name in [name for name in set(sys.modules) - before if name.startswith(f"{NAME}.")]:
                del sys.modules[name]
            sys.modules[NAME] = module
            self.own.exec_module(module)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """No compiler that does anything, and none of the absent packages, unless they are there already."""
    compiler = ModuleType(COMPILER)
    compiler.allow_in_graph = lambda function: function
    compiler.disable = _disable
    stands_in = {COMPILER: compiler, **dict.fromkeys(ABSENT)}
    stands_in = {name: module for name, module in stands_in.items() if name not in sys.modules}
    sys.modules.update(stands_in)
    try:
        yield
    finally:
        for name in stands_in:
            sys.modules.pop(name, None)


def _disable(function: Callable | None = None, recursive: bool = True, **options) -> Callable:
    """``torch._dynamo.disable`` where nothing is compiled."""
    return function or (lambda own: own)


def lean_diffusers() -> None:
    """Have diffusers imported so when it is first asked for; its pipelines and adapters then do not work."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
