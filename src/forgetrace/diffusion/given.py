"""A model from elsewhere: any ``UNet2DConditionModel`` with its scheduler, as diffusers saves a pipeline.

As ``train.pretrained`` it is θ0 itself and nothing is trained. As ``train.parent`` it is where training starts, θ0's
(unless that is given too) and that of every leave-K-out model.
"""

from diffusers import DDPMScheduler, UNet2DConditionModel

from forgetrace.artifacts import UserError, read_json
from forgetrace.config import Train
from forgetrace.encoding.pipeline import hashes, load, parts
from forgetrace.encoding.store import Encoded

PARTS = ["unet", "scheduler"]
BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}
MIDDLE = "UNetMidBlock2DCrossAttn"


def given_unet(name: str, key: str) -> UNet2DConditionModel:
    """The UNet of a pipeline in fp32, on the CPU.

    Args:
        name: a folder, or a model of the hub.
        key: the config's key, for messages.

    Raises:
        UserError: there is no such pipeline, or its UNet is damaged or of a kind that needs more than a caption.
    """
    folder = parts(name, PARTS, key) / PARTS[0]
    check_conditions(read_json(folder / "config.json"), key)
    return load(
        lambda: UNet2DConditionModel.from_pretrained(folder, local_files_only=True, output_loading_info=True), folder
    )


def fresh_unet(name: str, key: str) -> UNet2DConditionModel:
    """A UNet of the same architecture with weights drawn by torch's generator."""
    return UNet2DConditionModel.from_config(read_json(parts(name, PARTS, key) / PARTS[0] / "config.json"))


def given_scheduler(name: str, key: str) -> DDPMScheduler:
    """The noise schedule of a pipeline, whatever sampler it was saved with.

    Raises:
        UserError: it has none, such as a flow-matching one, or predicts something else than ε or v.
    """
    config = read_json(parts(name, PARTS, key) / PARTS[1] / "scheduler_config.json")
    if not (config.get("beta_schedule") or config.get("trained_betas")) or (
        config.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction")
    ):
        raise UserError(
            f"{key}: the scheduler {config.get('_class_name')} is none of a diffusion model that predicts ε or v, "
            "which is what forgetrace knows."
        )
    known = (
        "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
        "rescale_betas_zero_snr",
    )  # fmt: skip
    return DDPMScheduler(**{name: config[name] for name in known if name in config}, clip_sample=False)


def given_source(name: str, key: str) -> dict[str, str]:
    """SHA-256 of the files that make the model, by path inside the pipeline."""
    return hashes(parts(name, PARTS, key), PARTS)


def check_conditions(config: dict, key: str) -> None:
    """Refuse a UNet that is conditioned on more than timestep and caption, such as SDXL's.

    Raises:
        UserError: it is.
    """
    conditions = ("addition_embed_type", "class_embed_type", "num_class_embeds", "time_cond_proj_dim")
    for name in (*conditions, "encoder_hid_dim_type"):
        if config.get(name):
            raise UserError(
                f"{key}: this UNet is also conditioned by '{name}', which forgetrace does not know; give one that "
                "needs timestep and caption only, such as Stable Diffusion 1 or 2."
            )
    blocks = {*config.get("down_block_types", BLOCKS), *config.get("up_block_types", BLOCKS)}
    if (unknown := sorted(blocks - BLOCKS)) or config.get("mid_block_type", MIDDLE) != MIDDLE:
        raise UserError(
            f"{key}: this UNet has blocks of the kind {(unknown or [config.get('mid_block_type')])[0]}, which "
            f"forgetrace does not know; it knows {', '.join(sorted(BLOCKS))} and {MIDDLE}."
        )


def check_fits(unet: UNet2DConditionModel, scheduler: DDPMScheduler, recipe: Train, encoded: Encoded) -> None:
    """Refuse a model that the encoded data or the config do not fit.

    Raises:
        UserError: another number of latent channels, another width of captions, or another number of timesteps.
    """
    channels, width = encoded.latents.shape[1], encoded.captions.shape[2]
    for what, own, other, keys in (
        ("takes latents of {} channels", unet.config.in_channels, channels, "encode.image_encoder and pipeline"),
        ("predicts {} channels", unet.config.out_channels, channels, "the model: one that learns variances has more"),
        ("attends to captions of width {}", unet.config.cross_attention_dim, width, "encode.text_encoder and pipeline"),
        ("has a schedule of {} timesteps", scheduler.config.num_train_timesteps, recipe.timesteps, "train.timesteps"),
    ):
        if own != other:
            raise UserError(f"The given model {what.format(own)}, the experiment's are {other}: change {keys}.")


def check_descends(unet: UNet2DConditionModel, scheduler: DDPMScheduler, parent: str) -> None:
    """Refuse a parent from which the given θ0 cannot have been trained.

    Raises:
        UserError: its weights have other names or shapes, or its noise schedule or prediction is another.
    """
    key = "train.parent"
    own, theirs = ({name: w.shape for name, w in one.state_dict().items()} for one in (unet, given_unet(parent, key)))
    other = given_scheduler(parent, key)
    if own != theirs:
        raise UserError(
            f"{key}: {parent} has another architecture than train.pretrained; give what that was trained from."
        )
    if scheduler.config.prediction_type != other.config.prediction_type or not scheduler.betas.equal(other.betas):
        raise UserError(f"{key}: {parent} has another noise schedule or prediction than train.pretrained.")
