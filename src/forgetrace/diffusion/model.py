"""The attributed model: a diffusers UNet with its noise schedule, built, saved and loaded."""

from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from forgetrace.artifacts import UserError, atomic, read_json, read_tensors
from forgetrace.config import Train
from forgetrace.diffusion.given import fresh_unet, given_scheduler, given_unet
from forgetrace.layout import Layout
from forgetrace.randomness import generator


def build_unet(
    recipe: Train, latent_shape: tuple[int, int, int], caption_width: int, seed: int
) -> UNet2DConditionModel:
    """A UNet with freshly drawn weights; of the given architecture where the recipe names a model.

    Args:
        recipe: the architecture.
        latent_shape: (C, H, W) of a latent.
        caption_width: width of a token state.
        seed: seed of the weights; equal seeds give equal weights.
    """
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in recipe.cross_attention]
    up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(recipe.cross_attention)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(generator(seed, "weights").integers(2**62)))
        if recipe.given:
            return fresh_unet(*recipe.given)
        return UNet2DConditionModel(
            sample_size=latent_shape[-1],
            in_channels=latent_shape[0],
            out_channels=latent_shape[0],
            layers_per_block=recipe.layers_per_block,
            block_out_channels=tuple(recipe.channels),
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            cross_attention_dim=caption_width,
            # diffusers' name for the number of heads, kept for its saved configs.
            attention_head_dim=recipe.attention_heads,
            norm_num_groups=recipe.norm_groups,
        )


def initial_unet(
    recipe: Train, latent_shape: tuple[int, int, int], caption_width: int, seed: int
) -> UNet2DConditionModel:
    """The UNet that training starts from: the parent's where there is one, else as :func:`build_unet`."""
    if recipe.parent:
        return given_unet(recipe.parent, "train.parent").requires_grad_(True).train()
    return build_unet(recipe, latent_shape, caption_width, seed)


def build_scheduler(recipe: Train) -> DDPMScheduler:
    """The noise schedule of a recipe."""
    if recipe.given:
        return given_scheduler(*recipe.given)
    return DDPMScheduler(
        num_train_timesteps=recipe.timesteps,
        beta_schedule=recipe.schedule,
        prediction_type=recipe.prediction,
        clip_sample=False,
    )


def save_architecture(unet: UNet2DConditionModel, scheduler: DDPMScheduler, layout: Layout) -> None:
    """Write both configs in diffusers' own layout, so that ``from_pretrained`` reads the folder."""
    for owner, path in ((unet, layout.architecture), (scheduler, layout.scheduler)):
        with atomic(path) as temporary:
            temporary.write_text(owner.to_json_string(), encoding="utf-8")


def load_scheduler(layout: Layout) -> DDPMScheduler:
    """The noise schedule θ0 was trained with."""
    return DDPMScheduler.from_config(read_json(layout.scheduler))


def load_unet(
    layout: Layout, device: torch.device, weights: str | Path | None = None, changed: str | Path | None = None
) -> UNet2DConditionModel:
    """θ0, or a model of its architecture with other weights, ready to be asked.

    Args:
        layout: the experiment.
        device: where to put it.
        weights: all of its weights; by default θ0's.
        changed: weights laid over them, some or all.

    Raises:
        UserError: weights are missing, damaged or belong to another architecture.
    """
    unet = UNet2DConditionModel.from_config(read_json(layout.architecture))
    load_weights(unet, weights or layout.weights)
    if changed is not None:
        load_weights(unet, changed, partial=True)
    return frozen(unet, device)


def frozen(unet: UNet2DConditionModel, device: torch.device) -> UNet2DConditionModel:
    """The UNet on a device, in evaluation mode, no gradients needed."""
    return unet.requires_grad_(False).eval().to(device)


def load_weights(unet: UNet2DConditionModel, path: str | Path, partial: bool = False) -> None:
    """Copy weights into a model, after checking that every name and shape fits.

    Raises:
        UserError: the file is missing or damaged, or a weight does not fit; with ``partial``
            unset also where a weight of the model is not in the file.
    """
    tensors = read_tensors(path)
    expected = {name: tensor.shape for name, tensor in unet.state_dict().items()}
    wrong = [name for name, tensor in tensors.items() if expected.get(name) != tensor.shape]
    missing = [] if partial else sorted(expected.keys() - tensors.keys())
    if wrong or missing:
        raise UserError(
            f"{path} belongs to another architecture ({len(wrong)} weights do not fit, {len(missing)} are missing, "
            f"such as {(wrong + missing)[0]}): delete it and run again, or use the config it was trained with."
        )
    unet.load_state_dict(tensors, strict=not partial)
