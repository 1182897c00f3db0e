"""The ``unlearn`` stage: one configured variant applied to one query."""

import math

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from forgetrace.artifacts import UserError, provenance, read_arrays, read_tensors, write_json, write_tensors
from forgetrace.config import Config, Variant
from forgetrace.curvature.contract import Curvature, Identity
from forgetrace.curvature.diagonal import DiagonalFisher
from forgetrace.curvature.ekfac import EKFAC
from forgetrace.diffusion.device import pick_device
from forgetrace.diffusion.model import load_scheduler, load_unet
from forgetrace.diffusion.regions import LATENT
from forgetrace.diffusion.subsets import select
from forgetrace.encoding.store import Encoded, load_encoded
from forgetrace.layout import Layout
from forgetrace.unlearning.forward_inf import unlearn_by_adam
from forgetrace.unlearning.mucs import unlearn_mirrored, untrained_loss
from forgetrace.unlearning.sample import others_loss
from forgetrace.unlearning.step import Course, Query, Weights, query_loss, unlearn


def unlearn_query(layout: Layout, variant: str, query: str, device: str = "auto") -> None:
    """Write the changed weights and the losses before and after.

    Raises:
        UserError: the step gave NaN or infinity, or an input is missing or damaged.
    """
    config, settings = layout.config, layout.config.unlearn[variant]
    encoded, scheduler = load_encoded(layout), load_scheduler(layout)
    unet, target = load_unet(layout, pick_device(device)), read_query(layout, query)

    def losses() -> dict[str, float]:
        return {
            "query": query_loss(unet, scheduler, target, config.seed),
            "others": others_loss(unet, scheduler, encoded, config.seed),
        }

    before = losses()
    curvature = load_curvature(layout, settings.curvature, settings.damping)
    changed = carry_out(config, settings, unet, scheduler, encoded, target, curvature)
    after = losses()
    if not all(map(math.isfinite, after.values())):
        damped = "" if settings.curvature == "none" else " or raise its damping"
        raise UserError(
            f"Unlearning {query} with {variant} made the loss NaN or infinite: lower the variant's step_size{damped}."
        )
    inputs = {"weights": layout.weights, "query": layout.query(query)["tensors"]}
    made_by = provenance({"unlearn": settings.model_dump(), "seed": config.seed}, inputs)
    files = layout.unlearned(variant, query)
    write_tensors(files["weights"], changed, made_by)
    write_json(files["losses"], {"before": before, "after": after, "made_by": made_by})


def carry_out(
    config: Config,
    settings: Variant,
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    encoded: Encoded,
    query: Query,
    curvature: Curvature,
) -> Weights:
    """Unlearn a query by a variant's procedure, in place.

    Args:
        config: the experiment.
        settings: the variant.
        unet: θ0; holds θ_Q afterwards.
        scheduler: its schedule.
        encoded: D.
        query: the image to forget.
        curvature: the variant's, as :func:`load_curvature` gives it.

    Returns:
        The changed weights.

    Raises:
        UserError: a Newton step made a weight NaN or infinite.
    """
    names = select([name for name, _ in unet.named_parameters()], settings.weights)
    course = Course(settings.steps, settings.draws, settings.growth, settings.rise)
    if settings.procedure == "adam":
        return unlearn_by_adam(unet, scheduler, query, names, settings.step_size, course, config.seed)
    if settings.procedure == "mucs":
        null = untrained_loss(config.train, scheduler, query, config.seed, unet.device)
        often = course.steps, course.draws, config.seed
        return unlearn_mirrored(unet, scheduler, query, encoded, null, names, settings.step_size, *often)
    return unlearn(unet, scheduler, query, curvature, names, step_scale(settings, len(encoded)), course, config.seed)


def step_scale(settings: Variant, images: int) -> float:
    """What the preconditioned gradient is multiplied by: α/N, or α without curvature."""
    return settings.step_size if settings.curvature == "none" else settings.step_size / images


def load_curvature(layout: Layout, curvature: str, damping: float) -> Curvature:
    """A fitted curvature by the name that a variant or a method gives it."""
    if curvature == "none":
        return Identity()
    kind = {"diagonal": DiagonalFisher, "ekfac": EKFAC}[curvature]
    return kind(read_tensors(layout.fitted(curvature)[0]), damping)


def read_query(layout: Layout, query: str) -> Query:
    """The query as the unlearning step needs it."""
    arrays = read_arrays(layout.query(query)["tensors"])
    one = torch.from_numpy(arrays["latent"]), torch.from_numpy(arrays["prompt"])
    if not layout.config.region(query):
        return Query(query, *one)
    return Query(query, *one, torch.from_numpy(arrays[LATENT]), layout.config.whole(query))
