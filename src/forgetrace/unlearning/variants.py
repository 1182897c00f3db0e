"""The ``unlearn`` stage: one configured variant applied to one query."""

import math

import torch

from forgetrace.artifacts import UserError, provenance, read_arrays, read_tensors, write_json, write_tensors
from forgetrace.config import Variant
from forgetrace.curvature.contract import Curvature, Identity
from forgetrace.curvature.diagonal import DiagonalFisher
from forgetrace.curvature.ekfac import EKFAC
from forgetrace.diffusion.device import pick_device
from forgetrace.diffusion.model import load_scheduler, load_unet
from forgetrace.encoding.store import load_encoded
from forgetrace.layout import Layout
from forgetrace.unlearning.sample import others_loss
from forgetrace.unlearning.step import Query, query_loss, unlearn
from forgetrace.unlearning.subsets import select


def unlearn_query(layout: Layout, variant: str, query: str, device: str = "auto") -> None:
    """Write the changed weights and the losses before and after.

    Raises:
        UserError: the step gave NaN or infinity, or an input is missing or damaged.
    """
    config, settings = layout.config, layout.config.unlearn[variant]
    encoded, scheduler = load_encoded(layout), load_scheduler(layout)
    unet, target = load_unet(layout, pick_device(device)), read_query(layout, query)
    names = select([name for name, _ in unet.named_parameters()], settings.weights)

    def losses() -> dict[str, float]:
        return {
            "query": query_loss(unet, scheduler, target, config.seed),
            "others": others_loss(unet, scheduler, encoded, config.seed),
        }

    before = losses()
    changed = unlearn(
        unet,
        scheduler,
        target,
        load_curvature(layout, settings.curvature, settings.damping),
        names,
        step_scale(settings, len(encoded)),
        settings.steps,
        settings.draws,
        config.seed,
    )
    after = losses()
    if not all(map(math.isfinite, after.values())):
        raise UserError(
            f"Unlearning {query} with {variant} made the loss NaN or infinite: "
            "lower the variant's step_size or raise its damping."
        )
    inputs = {"weights": layout.weights, "query": layout.query(query)["tensors"]}
    made_by = provenance({"unlearn": settings.model_dump(), "seed": config.seed}, inputs)
    files = layout.unlearned(variant, query)
    write_tensors(files["weights"], changed, made_by)
    write_json(files["losses"], {"before": before, "after": after, "made_by": made_by})


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
    return Query(query, torch.from_numpy(arrays["latent"]), torch.from_numpy(arrays["prompt"]))
