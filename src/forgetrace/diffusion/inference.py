"""The UNet as a scan asks it: the same function of the same weights, arranged for many evaluations.

A scan evaluates a caption at many timesteps and keeps no gradients. What the training arrangement wastes
there is exchanged; results differ by rounding alone.

- Keys and values of cross-attention are projected once per caption, not once per evaluation.
- On a CPU, linear layers go to oneDNN: PyTorch gives them to MKL, which leaves half of a processor that is
  not Intel's unused, and whose bias costs a pass of its own.
- There GEGLU multiplies its halves apart: the activation of a slice of a wider result is not vectorised.
"""

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention


def for_inference(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Exchange the slow parts, in place; names of weights stay, gradients can no longer be taken.

    Afterwards ``encoder_hidden_states`` may hold n captions for n·r evaluations: each caption serves r
    consecutive ones.

    Args:
        unet: frozen and on its device.

    Returns:
        The same model.
    """
    unet.set_attn_processor(SharedCaptionAttention())
    weight = next(unet.parameters())
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        _exchange(unet)
    return unet


def _exchange(module: torch.nn.Module) -> None:
    for name, child in module.named_children():
        if type(child) is GEGLU:
            setattr(module, name, SplitGEGLU(child.proj))
        elif type(child) is torch.nn.Linear:
            setattr(module, name, DirectLinear(child))
        else:
            _exchange(child)


def onednn_linear(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str = "none"
) -> torch.Tensor:
    """``activation(inputs weightᵀ + bias)`` by oneDNN, which uses all of a processor of any maker."""
    return torch.ops.mkldnn._linear_pointwise(inputs.contiguous(), weight, bias, activation, [], "none")


class DirectLinear(torch.nn.Module):
    """A linear layer computed by oneDNN, bias included."""

    def __init__(self, linear: torch.nn.Linear):
        """Args: linear, whose weights it takes over."""
        super().__init__()
        self.out_features = linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(…, in) -> (…, out)."""
        return onednn_linear(inputs, self.weight, self.bias)


class SplitGEGLU(torch.nn.Module):
    """``(x W + b) · gelu(x V + c)``, W and V the halves of one projection."""

    def __init__(self, proj: torch.nn.Linear):
        """Args: proj, of both halves, W first."""
        super().__init__()
        self.proj = proj

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(…, in) -> (…, half of the projection's outputs)."""
        (value, gate), (value_bias, gate_bias) = self.proj.weight.chunk(2), self.proj.bias.chunk(2)
        gated = onednn_linear(inputs, gate, gate_bias, "gelu")
        return onednn_linear(inputs, value, value_bias).mul_(gated)


class SharedCaptionAttention:
    """Attention processor for evaluations that share captions, r consecutive ones each."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        **others: object,
    ) -> torch.Tensor:
        """(B, positions, width) -> the same; captions (B / r, tokens, caption width), or none: self-attention."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        groups, width = len(source), attn.to_q.out_features
        # One caption's evaluations form one long sequence of positions that attend to the same tokens.
        query, key, value = (
            projected.view(groups, -1, attn.heads, width // attn.heads).transpose(1, 2)
            for projected in (attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source))
        )
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        return attn.to_out[0](mixed.reshape(len(hidden_states), -1, width))
