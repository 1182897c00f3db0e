"""A published state dict as a UNet: its architecture is read from the shapes of its weights.

Both projects trained diffusers' ``UNet2DConditionModel`` with its defaults but for the blocks, their channels and the
width of captions. Shapes tell all of these. They do not tell the number of attention heads, which is 8, or the groups
of normalisations, which are diffusers' 32.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from zipfile import is_zipfile

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from forgetrace.artifacts import UserError

HEADS, TIMESTEPS = 8, 1000
KEYS = "attn2.to_k.weight"  # of any cross-attention
AGAIN = "download it again"


def load_restricted(path: Path) -> object:
    """What ``torch.save`` wrote, if it is tensors in plain containers; from the disk as they are asked for.

    Raises:
        UserError: the file is missing or damaged, or holds anything that would have to be run to be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {AGAIN}, or name the folder it is in.") from None
    except Exception as error:  # a damaged file makes torch raise nearly anything, a malicious one UnpicklingError
        refused = re.search(r"(?:Unsupported|Trying to) [^\n]*?(?= was not| by default|\n|$)", str(error))
        reason = refused[0] if refused else str(error).split("\n")[0][:200] or type(error).__name__
        raise UserError(f"{path} cannot be read as tensors alone ({reason}): {AGAIN}.") from None


def load_saved(path: Path) -> dict[str, torch.Tensor]:
    """Named tensors as ``torch.save`` wrote them.

    Raises:
        UserError: the file is missing or damaged, or holds anything but named tensors.
    """
    content = load_restricted(path)
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path} holds no tensors by name but {type(content).__name__}: {AGAIN}.")
    if odd := [name for name, value in content.items() if not isinstance(value, torch.Tensor)]:
        raise UserError(f"{path} holds '{odd[0]}', which is no tensor but {type(content[odd[0]]).__name__}: {AGAIN}.")
    return dict(content)


def empty_unet(weights: Mapping[str, torch.Tensor], side: int) -> UNet2DConditionModel:
    """The UNet that the weights are of, without memory for weights of its own.

    Args:
        weights: the state dict.
        side: of the latents, in numbers; diffusers records it.

    Raises:
        UserError: they are of another architecture; says how, and names no file.
    """
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel(**architecture(weights, side))
    except (KeyError, ValueError, IndexError, RuntimeError, TypeError) as error:
        raise UserError(f"is no UNet2DConditionModel of the published kind (it lacks {error})") from None
    expected, found = ({name: tuple(w.shape) for name, w in one.items()} for one in (unet.state_dict(), weights))
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    wrong = [name for name in sorted(expected.keys() & found.keys()) if expected[name] != found[name]]
    if wrong:
        name = wrong[0]
        raise UserError(f"holds {name} of shape {found[name]}, expected {expected[name]} ({len(wrong)} do not fit)")
    if missing or extra:
        raise UserError(f"lacks {len(missing)} weights and has {len(extra)} of no use, such as {(missing + extra)[0]}")
    return unet


def architecture(weights: Mapping[str, torch.Tensor], side: int) -> dict:
    """Arguments of ``UNet2DConditionModel``, as the shapes of its weights tell them."""
    levels = _count(weights, r"down_blocks\.(\d+)\.")
    channels = [len(weights[f"down_blocks.{i}.resnets.0.conv1.weight"]) for i in range(levels)]

    def kinds(way: str) -> tuple[str, ...]:
        attends = [f"{way}_blocks.{i}.attentions.0.norm.weight" in weights for i in range(levels)]
        return tuple(f"CrossAttn{way.title()}Block2D" if yes else f"{way.title()}Block2D" for yes in attends)

    cross = next((name for name in sorted(weights) if name.endswith(KEYS)), KEYS)
    return {
        "sample_size": side,
        "in_channels": weights["conv_in.weight"].shape[1],
        "out_channels": len(weights["conv_out.weight"]),
        "layers_per_block": _count(weights, r"down_blocks\.0\.resnets\.(\d+)\."),
        "block_out_channels": tuple(channels),
        "down_block_types": kinds("down"),
        "up_block_types": kinds("up"),
        "cross_attention_dim": weights[cross].shape[1],
        "attention_head_dim": HEADS,  # diffusers' name for the number of heads
    }


def published_scheduler() -> DDPMScheduler:
    """The noise schedule of both projects: diffusers' default, of 1,000 steps, predicting ε."""
    return DDPMScheduler(num_train_timesteps=TIMESTEPS)


def _count(weights: Mapping[str, torch.Tensor], pattern: str) -> int:
    """How many blocks have names like this."""
    return len({found[1] for name in weights if (found := re.match(pattern, name))})
