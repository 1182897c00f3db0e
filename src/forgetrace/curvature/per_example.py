"""The gradient of every example of a batch, one weight at a time.

A backward pass over a batch adds up the gradients of its examples. But each layer's inputs x and the
gradients δ of its outputs still belong to one example each, and so does what they make. With p running
over an example's positions (tokens or pixels; one for a time embedding):

    linear        Σ_p δ_p x_pᵀ
    convolution   Σ_p δ_p x_pᵀ, where x_p is the patch under the kernel
    norm          Σ_p δ_p ⊙ x_p, where x is the normalised input
    bias          Σ_p δ_p

One pass serves the whole batch, and only a few examples' gradients of one weight are held at once.
"""

import functools
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call, vjp, vmap

from forgetrace.artifacts import UserError

# Numbers held at once: on a CPU they stay in a core's own cache, on a GPU they keep it busy.
HELD = {"cpu": 2**18, "cuda": 2**26}


class Call(NamedTuple):
    """One call of a layer on a batch: its inputs x, and δ, which is None where no loss depends on the call."""

    layer: nn.Module
    inputs: tuple[torch.Tensor, ...]
    delta: torch.Tensor | None


@dataclass(frozen=True)
class Record:
    """What the gradients of a batch's examples are made of.

    Attributes:
        examples: B, how many.
        uses: by name of a weight, the calls that used it, each with the name that the weight has in the layer.
    """

    examples: int
    uses: dict[str, list[tuple[Call, str]]]

    def gradients(self, names: Iterable[str]) -> Iterator[tuple[str, slice, torch.Tensor]]:
        """Gradients of the named weights, as :func:`per_example_gradients` yields them."""
        for name in names:
            call, key = self.uses[name][0]
            weight = getattr(call.layer, key)
            for rows in self._shares(weight.numel(), weight.device):
                parts = (_gradient(*call, key, rows) for call, key in self.uses[name])
                yield name, rows, functools.reduce(torch.add, parts)

    def positions(self, layer: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What the gradient matrices of one of :func:`matrix_layers` are made of, some examples at a time.

        An example's matrix is ``δᵀ a``, (outputs, columns): the columns are the inputs, of a convolution in the order
        (*kernel, channels), and then the bias where there is one.

        Yields:
            a, (b, P, columns), whose last column is 1 where there is a bias, and δ, (b, P, outputs). A layer called
            several times has the positions of all its calls.
        """
        calls = [call for call, _ in self.uses[f"{layer}.weight"] if call.delta is not None]
        if not calls:
            return
        weight, bias = calls[0].layer.weight, calls[0].layer.bias
        count = sum(call.delta.numel() for call in calls) // (self.examples * len(weight))
        for rows in self._shares(max(count, len(weight)) * weight[0].numel(), weight.device):
            a = torch.cat([_input_rows(call.layer, call.inputs[0][rows], call.delta) for call in calls], dim=1)
            delta = torch.cat([_output_rows(call.layer, call.delta[rows]) for call in calls], dim=1)
            yield a if bias is None else F.pad(a, (0, 1), value=1), delta

    def _shares(self, numbers: int, device: torch.device) -> Iterator[slice]:
        """The examples in slices, each of as many as may be held at once where one is so many ``numbers``."""
        count = max(1, HELD.get(device.type, HELD["cuda"]) // numbers)
        for start in range(0, self.examples, count):
            yield slice(start, min(start + count, self.examples))


def per_example_gradients(
    model: nn.Module, losses: Callable[[], torch.Tensor], wanted: Container[str] | None = None
) -> Iterator[tuple[str, slice, torch.Tensor]]:
    """Run ``losses`` once and yield the gradients of each loss, weight after weight, some examples at a time.

    Args:
        model: whose weights to differentiate by, as for :func:`record`.
        losses: calls the model on a batch and returns the loss of each example, (B,).
        wanted: names of the weights to differentiate by; by default all.

    Yields:
        The name of a weight, which b of the B examples, and ∂ losses[rows] / ∂ weight, (b, *shape of the weight),
        of the weight's dtype and device, the caller's to overwrite. A layer called several times, or a weight
        of several layers, has one gradient, the sum over its calls.

    Raises:
        UserError: a weight's gradients cannot be told apart by example; names the weight.
    """
    recorded = record(model, losses, wanted)
    yield from recorded.gradients(recorded.uses)


def record(model: nn.Module, losses: Callable[[], torch.Tensor], wanted: Container[str] | None = None) -> Record:
    """Run ``losses`` and a backward pass once, and keep what every layer with weights was given.

    Args:
        model: its layers with weights take tensors by position, keep examples apart along the first dimension,
            and nobody changes their inputs in place afterwards.
        losses: calls the model on a batch and returns the loss of each example, (B,).
        wanted: names of the weights whose gradients will be asked for; by default all.

    Raises:
        UserError: a weight's gradients cannot be told apart by example; names the weight.
    """
    names = {weight: name for name, weight in model.named_parameters() if wanted is None or name in wanted}
    places: dict[str, list[tuple[int, str]]] = {name: [] for name in names.values()}
    seen, outputs = [], []

    def note(layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if not all(isinstance(value, torch.Tensor) for value in (*inputs, output)):
            return
        for key, weight in layer.named_parameters(recurse=False):
            if weight in names:
                places[names[weight]].append((len(seen), key))
        seen.append((layer, tuple(value.detach() for value in inputs)))
        # The place in the graph and not the tensor, which the next layer may change in place.
        outputs.append(get_gradient_edge(output if output.requires_grad else output.requires_grad_()))

    layers = [layer for layer in model.modules() if any(weight in names for weight in layer.parameters(recurse=False))]
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        loss = losses()
    finally:
        for handle in handles:
            handle.remove()
    deltas = torch.autograd.grad(loss.sum(), outputs, allow_unused=True) if outputs else ()
    calls = [Call(*call, delta) for call, delta in zip(seen, deltas, strict=True)]
    uses = {name: [(calls[i], key) for i, key in found] for name, found in places.items()}
    for name, found in uses.items():
        tensors = [value for call, _ in found for value in (*call.inputs, call.delta) if value is not None]
        if {value.shape[:1] for value in tensors} != {loss.shape}:
            raise UserError(
                f"The gradients of {name} cannot be told apart by example: its layer is not called on tensors with "
                "one row per example. Use a UNet2DConditionModel of layers that are."
            )
    return Record(len(loss), uses)


def matrix_layers(model: nn.Module) -> dict[str, nn.Module]:
    """By name, the layers an example's gradient of which is one matrix ``δᵀ a``.

    These are linear layers and plain convolutions, but none that shares a weight with another layer.
    """
    owners = Counter(weight for layer in model.modules() for weight in layer.parameters(recurse=False))
    return {
        name: layer
        for name, layer in model.named_modules()
        if _has_matrix(layer) and all(owners[weight] == 1 for weight in layer.parameters(recurse=False))
    }


def _has_matrix(layer: nn.Module) -> bool:
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) is nn.Linear


def _gradient(
    layer: nn.Module, inputs: tuple[torch.Tensor, ...], delta: torch.Tensor | None, key: str, rows: slice
) -> torch.Tensor:
    """What one call adds to some examples' gradients of its layer's weight ``key``, (b, *shape of the weight)."""
    weight = getattr(layer, key)
    if delta is None:  # the losses do not depend on this call
        return weight.new_zeros(rows.stop - rows.start, *weight.shape)
    inputs, delta = tuple(value[rows] for value in inputs), delta[rows]
    rule = _matrix if _has_matrix(layer) else RULES.get(type(layer))
    return rule(layer, *inputs, delta, key) if rule else _of_any_layer(layer, inputs, delta, key)


def _matrix(layer: nn.Linear | nn.Conv2d, x: torch.Tensor, delta: torch.Tensor, key: str) -> torch.Tensor:
    deltas = _output_rows(layer, delta)
    if key == "bias":
        return deltas.sum(dim=1)
    return from_columns(deltas.mT @ _input_rows(layer, x, delta), layer.weight.shape)


def _output_rows(layer: nn.Linear | nn.Conv2d, delta: torch.Tensor) -> torch.Tensor:
    """δ by position: (b, P, outputs)."""
    return delta.flatten(2).mT if type(layer) is nn.Conv2d else delta.reshape(len(delta), -1, layer.out_features)


def _input_rows(layer: nn.Linear | nn.Conv2d, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """The inputs of every position of δ: (b, P, inputs), those of a convolution in the order (*kernel, channels)."""
    if type(layer) is nn.Linear:
        return x.reshape(len(x), -1, layer.in_features)
    # Channels last, so that a patch is copied a kernel position at a time and not a number at a time.
    (up, left), (high, wide) = layer.padding, layer.kernel_size
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, up, up))
    per_example, down, right, channel = x.stride()
    (step_down, step_right), (apart_down, apart_right) = layer.stride, layer.dilation
    patches = x.as_strided(
        (len(x), *delta.shape[2:], high, wide, layer.in_channels),
        (per_example, step_down * down, step_right * right, apart_down * down, apart_right * right, channel),
    )
    return patches.flatten(3).flatten(1, 2)


def to_columns(weight: torch.Tensor) -> torch.Tensor:
    """A weight (outputs, channels, *kernel) as a matrix with the columns of :meth:`Record.positions`."""
    return weight.movedim(1, -1).flatten(1)


def from_columns(matrix: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse for matrices (..., outputs, columns) of weights of this shape."""
    _, channels, *kernel = shape
    return matrix.unflatten(-1, (*kernel, channels)).movedim(-1, -1 - len(kernel))


def _group_norm(layer: nn.GroupNorm, x: torch.Tensor, delta: torch.Tensor, key: str) -> torch.Tensor:
    if key == "weight":
        delta = delta * F.group_norm(x, layer.num_groups, eps=layer.eps)
    return delta.reshape(len(x), layer.num_channels, -1).sum(dim=2)


def _layer_norm(layer: nn.LayerNorm, x: torch.Tensor, delta: torch.Tensor, key: str) -> torch.Tensor:
    if key == "weight":
        delta = delta * F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    return delta.reshape(len(x), -1, *layer.normalized_shape).sum(dim=1)


RULES = {nn.GroupNorm: _group_norm, nn.LayerNorm: _layer_norm}


def _of_any_layer(layer: nn.Module, inputs: tuple[torch.Tensor, ...], delta: torch.Tensor, key: str) -> torch.Tensor:
    """The same for any kind of layer, by the layer's own backward pass on every example; slower."""

    def of_example(delta: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        def output(weight: torch.Tensor) -> torch.Tensor:
            return functional_call(layer, {key: weight}, tuple(value[None] for value in inputs))

        return vjp(output, getattr(layer, key).detach())[1](delta[None])[0]

    return vmap(of_example)(delta, *inputs)
