"""Models of one architecture as one module: each layer that has weights holds those of all of them.

A batch is the models' batches one after another, equally long; whatever has no weights (activations, attention,
resampling) is the same for all and stays as it is. One small model leaves a GPU idle between its kernels: fifty of
them as one take hardly longer.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from forgetrace.artifacts import UserError


class _Stacked(nn.Module):
    """A layer of M models: the weights of all, the settings of the first."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.models = len(layers)
        for name in layers[0].__constants__:  # what PyTorch lists as a layer's settings
            setattr(self, name, getattr(layers[0], name))
        for name in ("weight", "bias"):
            own = [getattr(layer, name) for layer in layers]
            values = None if own[0] is None else nn.Parameter(torch.stack([tensor.detach() for tensor in own]))
            self.register_parameter(name, values)

    def _affine(self, normal: torch.Tensor, dim: int) -> torch.Tensor:
        """Scale and shift (M·B, …) by each model's own, along a dimension."""
        if self.weight is None:
            return normal
        shape = [1] * (normal.dim() + 1)
        shape[0], shape[dim + 1] = self.models, -1
        split = normal.view(self.models, -1, *normal.shape[1:])
        return torch.addcmul(self.bias.view(shape), split, self.weight.view(shape)).view(normal.shape)

    def _products(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(M, n, in) times each model's weights (M, out, in), with the bias -> (M, n, out)."""
        if self.bias is None:
            return torch.bmm(rows, weight.transpose(1, 2))
        return torch.baddbmm(self.bias[:, None], rows, weight.transpose(1, 2))


class StackedLinear(_Stacked):
    """Linear layers."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(M·B, …, in) -> (M·B, …, out)."""
        rows = inputs.reshape(self.models, -1, inputs.shape[-1])
        return self._products(rows, self.weight).view(*inputs.shape[:-1], -1)


class StackedConv2d(_Stacked):
    """Convolutions, as a product with every position's patch: grouped ones are slow in their gradients."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(M·B, C, H, W) -> (M·B, out, H', W')."""
        patches = _Patches.apply(inputs, self.kernel_size, self.stride, self.padding)
        weight = self.weight.permute(0, 1, 3, 4, 2).flatten(2)  # in the order of a patch's values
        out = self._products(patches.view(self.models, -1, weight.shape[2]), weight)
        return out.view(*patches.shape[:3], -1).permute(0, 3, 1, 2)


class _Patches(torch.autograd.Function):
    """What each output position of a convolution looks at; channels innermost, so that memory is read in long runs."""

    @staticmethod
    def forward(ctx, inputs, kernel, stride, padding):
        """(N, C, H, W) -> (N, H', W', kernel height, kernel width, C)."""
        ctx.shape, ctx.kernel, ctx.stride, ctx.padding = inputs.shape, kernel, stride, padding
        padded = _padded(inputs, inputs.shape, padding)
        padded[_inside(inputs.shape, padding)] = inputs.permute(0, 2, 3, 1)
        count, height, width, channels = padded.shape
        rows, columns = ((size - k) // s + 1 for size, k, s in zip((height, width), kernel, stride, strict=True))
        each, down, right, one = padded.stride()
        shape = (count, rows, columns, *kernel, channels)
        return padded.as_strided(shape, (each, down * stride[0], right * stride[1], down, right, one)).contiguous()

    @staticmethod
    def backward(ctx, gradient):
        """Add up what every patch says of a position; not in bf16, which convolutions do not add up in either."""
        summed = torch.promote_types(gradient.dtype, torch.float32)
        total = _padded(gradient, ctx.shape, ctx.padding, summed)
        rows, columns = gradient.shape[1:3]
        for y in range(ctx.kernel[0]):
            for x in range(ctx.kernel[1]):
                down = slice(y, y + (rows - 1) * ctx.stride[0] + 1, ctx.stride[0])
                right = slice(x, x + (columns - 1) * ctx.stride[1] + 1, ctx.stride[1])
                total[:, down, right] += gradient[:, :, :, y, x]
        return total[_inside(ctx.shape, ctx.padding)].permute(0, 3, 1, 2).to(gradient.dtype), None, None, None


def _padded(
    like: torch.Tensor, shape: torch.Size, padding: tuple[int, int], dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Zeros for images of a shape (N, C, H, W) with their padding, (N, H + …, W + …, C)."""
    count, channels, height, width = shape
    return like.new_zeros(count, height + 2 * padding[0], width + 2 * padding[1], channels, dtype=dtype)


def _inside(shape: torch.Size, padding: tuple[int, int]) -> tuple[slice, slice, slice]:
    """Where the images lie in their padding."""
    rows, columns = slice(padding[0], padding[0] + shape[2]), slice(padding[1], padding[1] + shape[3])
    return slice(None), rows, columns


class StackedGroupNorm(_Stacked):
    """Group normalisations."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(M·B, C, …) -> the same."""
        return self._affine(F.group_norm(inputs.contiguous(), self.num_groups, eps=self.eps), 1)


class StackedLayerNorm(_Stacked):
    """Layer normalisations."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(M·B, …, C) -> the same."""
        return self._affine(F.layer_norm(inputs.contiguous(), self.normalized_shape, eps=self.eps), inputs.dim() - 1)


KINDS = {
    nn.Linear: StackedLinear,
    nn.Conv2d: StackedConv2d,
    nn.GroupNorm: StackedGroupNorm,
    nn.LayerNorm: StackedLayerNorm,
}


def stacked(models: Sequence[nn.Module]) -> nn.Module:
    """One module that computes all of them, each on its share of the batch.

    Args:
        models: M ≥ 1 of one architecture.

    Returns:
        A module whose parameters have the names and shapes of one model's, with a first dimension of M before them.

    Raises:
        UserError: a layer has weights and is none of :data:`KINDS`, or is a convolution that is not a plain one.
    """
    whole = copy.deepcopy(models[0])
    _exchange(whole, models, "")
    return whole


def _exchange(whole: nn.Module, models: Sequence[nn.Module], above: str) -> None:
    for name, child in list(whole.named_children()):
        layers, path = [getattr(model, name) for model in models], f"{above}{name}"
        if type(child) in KINDS and _is_plain(child):
            setattr(whole, name, KINDS[type(child)](layers))
        elif any(True for _ in child.parameters(recurse=False)):
            raise UserError(
                f"Models with a layer like {path} ({type(child).__name__}) cannot be trained as one: set "
                "retrain.stack: 1."
            )
        else:
            _exchange(child, layers, f"{path}.")


def _is_plain(layer: nn.Module) -> bool:
    if type(layer) is not nn.Conv2d:
        return True
    usual = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    return usual and not isinstance(layer.padding, str)


def clip_each(parameters: Sequence[nn.Parameter], limit: float) -> None:
    """Scale the gradients of each of M stacked models to a global norm of at most ``limit``, in place."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1).norm(dim=1)
    factors = (limit / (norms + 1e-6)).clamp(max=1)  # as torch.nn.utils.clip_grad_norm_
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))
