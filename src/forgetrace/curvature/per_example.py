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
from collections.abc import Callable, Container, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call, vjp, vmap

from forgetrace.artifacts import UserError

# Numbers held at once: on a CPU they stay in a core's own cache, on a GPU they keep it busy.
HELD = {"cpu": 2**18, "cuda": 2**26}


def per_example_gradients(
    model: nn.Module, losses: Callable[[], torch.Tensor], wanted: Container[str] | None = None
) -> Iterator[tuple[str, slice, torch.Tensor]]:
    """Run ``losses`` once and yield the gradients of each loss, weight after weight, some examples at a time.

    Args:
        model: whose weights to differentiate by. Its layers with weights take tensors by position, keep
            examples apart along the first dimension, and nobody changes their inputs in place afterwards.
        losses: calls the model on a batch and returns the loss of each example, (B,).
        wanted: names of the weights to differentiate by; by default all.

    Yields:
        The name of a weight, which b of the B examples, and ∂ losses[rows] / ∂ weight, (b, *shape of the weight),
        of the weight's dtype and device, the caller's to overwrite. A layer called several times, or a weight
        of several layers, has one gradient, the sum over its calls.

    Raises:
        UserError: a weight's gradients cannot be told apart by example; names the weight.
    """
    names = {weight: name for name, weight in model.named_parameters() if wanted is None or name in wanted}
    uses: dict[str, list[tuple[int, str]]] = {name: [] for name in names.values()}
    calls, outputs = [], []

    def record(layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if not all(isinstance(value, torch.Tensor) for value in (*inputs, output)):
            return
        for key, weight in layer.named_parameters(recurse=False):
            if weight in names:
                uses[names[weight]].append((len(calls), key))
        calls.append((layer, tuple(value.detach() for value in inputs)))
        # The place in the graph and not the tensor, which the next layer may change in place.
        outputs.append(get_gradient_edge(output if output.requires_grad else output.requires_grad_()))

    layers = [layer for layer in model.modules() if any(weight in names for weight in layer.parameters(recurse=False))]
    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        loss = losses()
    finally:
        for handle in handles:
            handle.remove()
    deltas = torch.autograd.grad(loss.sum(), outputs, allow_unused=True) if outputs else ()
    for name, places in uses.items():
        tensors = [value for i, _ in places for value in (*calls[i][1], deltas[i]) if value is not None]
        if {value.shape[:1] for value in tensors} != {loss.shape}:
            raise UserError(
                f"The gradients of {name} cannot be told apart by example: its layer is not called on tensors with "
                "one row per example. Use a UNet2DConditionModel of layers that are."
            )
    for weight, name in names.items():
        count = max(1, HELD.get(weight.device.type, HELD["cuda"]) // weight.numel())
        for start in range(0, len(loss), count):
            rows = slice(start, min(start + count, len(loss)))
            parts = (_gradient(*calls[i], deltas[i], key, rows) for i, key in uses[name])
            yield name, rows, functools.reduce(torch.add, parts)


def _gradient(
    layer: nn.Module, inputs: tuple[torch.Tensor, ...], delta: torch.Tensor | None, key: str, rows: slice
) -> torch.Tensor:
    """What one call adds to some examples' gradients of its layer's weight ``key``, (b, *shape of the weight)."""
    weight = getattr(layer, key)
    if delta is None:  # the losses do not depend on this call
        return weight.new_zeros(rows.stop - rows.start, *weight.shape)
    inputs, delta = tuple(value[rows] for value in inputs), delta[rows]
    rule = RULES.get(type(layer))
    if rule is None or (rule is _convolution and not _plain(layer)):
        return _of_any_layer(layer, inputs, delta, key)
    return rule(layer, *inputs, delta, key)


def _linear(layer: nn.Linear, x: torch.Tensor, delta: torch.Tensor, key: str) -> torch.Tensor:
    delta = delta.reshape(len(delta), -1, layer.out_features)
    return delta.sum(dim=1) if key == "bias" else delta.mT @ x.reshape(len(x), -1, layer.in_features)


def _convolution(layer: nn.Conv2d, x: torch.Tensor, delta: torch.Tensor, key: str) -> torch.Tensor:
    if key == "bias":
        return delta.flatten(2).sum(dim=2)
    # Channels last, so that a patch is copied a kernel position at a time and not a number at a time.
    (up, left), (high, wide) = layer.padding, layer.kernel_size
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, up, up))
    per_example, down, right, channel = x.stride()
    (step_down, step_right), (apart_down, apart_right) = layer.stride, layer.dilation
    patches = x.as_strided(
        (len(x), *delta.shape[2:], high, wide, layer.in_channels),
        (per_example, step_down * down, step_right * right, apart_down * down, apart_right * right, channel),
    )
    gradient = delta.flatten(2) @ patches.flatten(3).flatten(1, 2)
    return gradient.view(len(x), -1, high, wide, layer.in_channels).permute(0, 1, 4, 2, 3)


def _group_norm(layer: nn.GroupNorm, x: torch.Tensor, delta: torch.Tensor, key: str) -> torch.Tensor:
    if key == "weight":
        delta = delta * F.group_norm(x, layer.num_groups, eps=layer.eps)
    return delta.reshape(len(x), layer.num_channels, -1).sum(dim=2)


def _layer_norm(layer: nn.LayerNorm, x: torch.Tensor, delta: torch.Tensor, key: str) -> torch.Tensor:
    if key == "weight":
        delta = delta * F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    return delta.reshape(len(x), -1, *layer.normalized_shape).sum(dim=1)


RULES = {nn.Linear: _linear, nn.Conv2d: _convolution, nn.GroupNorm: _group_norm, nn.LayerNorm: _layer_norm}


def _plain(layer: nn.Conv2d) -> bool:
    return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _of_any_layer(layer: nn.Module, inputs: tuple[torch.Tensor, ...], delta: torch.Tensor, key: str) -> torch.Tensor:
    """The same for any kind of layer, by the layer's own backward pass on every example; slower."""

    def of_example(delta: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        def output(weight: torch.Tensor) -> torch.Tensor:
            return functional_call(layer, {key: weight}, tuple(value[None] for value in inputs))

        return vjp(output, getattr(layer, key).detach())[1](delta[None])[0]

    return vmap(of_example)(delta, *inputs)
