"""A computation of always the same shapes, whose kernels a GPU records once and then replays.

The kernels of a small model are over sooner than Python can launch them: launched one by one, a training step of one
model takes as long as one of fifty that are trained as one.
"""

import logging
from collections.abc import Callable

import torch

EAGER = 3  # calls before the recording: libraries choose their kernels, and their workspaces are allocated
log = logging.getLogger(__name__)


class Captured:
    """A function of tensors on a GPU; what it allocates and leaves behind stays where it is from the recording on."""

    def __init__(self, compute: Callable[..., torch.Tensor], clear: Callable[[], None]):
        """Wrap a computation.

        Args:
            compute: the function; it may leave gradients.
            clear: forgets the gradients of the last call; not called between replays, which overwrite them.
        """
        self.compute, self.clear = compute, clear
        self.calls, self.graph, self.possible = 0, None, True

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """What ``compute`` returns for these inputs; after the recording, the same tensor every time."""
        self.calls += 1
        if self.graph is None and self.possible and self.calls > EAGER:
            self._record(inputs)
        if self.graph is None:
            self.clear()
            return self.compute(*inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.result

    def _record(self, inputs: tuple[torch.Tensor, ...]) -> None:
        self.inputs, graph = [tensor.clone() for tensor in inputs], torch.cuda.CUDAGraph()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # as PyTorch asks for: the recording must not find the default stream's work
            self.clear()
            self.compute(*self.inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self.clear()
        try:
            with torch.cuda.graph(graph):
                self.result = self.compute(*self.inputs)
        except RuntimeError as error:
            self.possible = False
            log.warning("The GPU cannot record this model's step (%s); it is launched anew each time.", error)
            return
        self.graph = graph
