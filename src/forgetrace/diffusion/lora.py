"""Low-rank changes (LoRA, arXiv 2106.09685) of a given model, as diffusers saves them, merged into its weights."""

from pathlib import Path

from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from forgetrace.artifacts import UserError

KEY = "train.lora"


def lora_file(path: str) -> Path:
    """The file of LoRA weights: the one named, or the one that diffusers writes into a folder."""
    return Path(path) / "pytorch_lora_weights.safetensors" if Path(path).is_dir() else Path(path)


def merge_lora(unet: UNet2DConditionModel, path: str) -> None:
    """Add ``scale · B A`` to every weight that the file changes, in place; scales are those of the file.

    Args:
        unet: the model the LoRA was trained on.
        path: ``pytorch_lora_weights.safetensors``, or a folder that holds it.

    Raises:
        UserError: peft is not installed, or the file is missing, damaged, of another model or of more than the UNet.
    """
    file = lora_file(path)
    if not file.is_file():
        raise UserError(f"{KEY}: there is no {file}; give a file in diffusers' LoRA format or a folder that holds one.")
    try:
        import peft  # noqa: F401 - diffusers needs it
    except ImportError:
        raise UserError(f"{KEY} needs the package peft: pip install 'forgetrace[lora]'.") from None
    try:
        weights, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
            file.parent, weight_name=file.name, local_files_only=True, return_lora_metadata=True
        )
    except Exception as error:  # a damaged file makes its reader raise nearly anything
        raise UserError(f"{KEY}: {file} cannot be read ({str(error).splitlines()[0]}).") from error
    if others := sorted(name for name in weights if not name.startswith("unet.")):
        raise UserError(f"{KEY}: {file} changes more than the UNet ({others[0]}); only a UNet's LoRA can be merged.")
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    try:
        unet.load_lora_adapter(weights, prefix="unet", network_alphas=alphas, metadata=metadata)
        unet.fuse_lora()
        unet.unload_lora()
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{KEY}: {file} is of another model ({str(error).splitlines()[0]}).") from error
    unet.requires_grad_(False)
    changed = sum(not weight.equal(before[name]) for name, weight in unet.state_dict().items())
    if 2 * changed != len(weights):  # a silent mismatch leaves weights as they were
        raise UserError(f"{KEY}: of {len(weights) // 2} weights that {file} changes, {changed} are the model's.")
