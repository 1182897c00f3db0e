"""Custom Diffusion (arXiv 2212.04488): θ0 learns one concept from a few exemplars, as a new token V*.

Cross-attention's ``to_k`` and ``to_v`` (or another subset of weights) and the embedding of V* are trained; all else
stays θ0's. Each step minimises

    mean L(z, c; θ) over draws of exemplars + w · mean L(z, c; θ) over as many draws of the prior set,

the prior set being training images with their own captions, whose token states are the frozen ones. Captions are never
dropped. A training takes seconds to minutes and keeps no checkpoints: a killed one is run again and ends the same.

A model that is there already, by whatever program, is taken as it is (``customize.given``), with its images or without.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from forgetrace.artifacts import (
    UserError,
    provenance,
    read_json,
    read_tensors,
    write_arrays,
    write_image,
    write_json,
    write_tensors,
)
from forgetrace.config import Customize
from forgetrace.datasets.concepts import Concept, concept, given_files, names, queries, query_names
from forgetrace.diffusion.device import Repeatable, make_deterministic, pick_device
from forgetrace.diffusion.loss import draw_losses
from forgetrace.diffusion.model import load_scheduler, load_unet
from forgetrace.diffusion.subsets import select
from forgetrace.diffusion.synthesis import generate
from forgetrace.encoding.codec import codec_of
from forgetrace.encoding.new_token import NewToken, text_encoder
from forgetrace.encoding.store import Encoded, load_encoded
from forgetrace.layout import Layout
from forgetrace.progress import progress
from forgetrace.randomness import generator

REPORTED = 50  # steps whose mean loss, first and last, is recorded


@dataclass(frozen=True)
class Exemplars:
    """The exemplars of a concept as a model sees them.

    Attributes:
        latents: (n, C, H, W), float32, or (2n, C, H, W) with mirror images behind all others.
        prompts: n prompts.
    """

    latents: torch.Tensor
    prompts: list[str]


def customize(layout: Layout, model: str, device: str = "auto") -> None:
    """Train or take one customised model and its images; writes every file of ``layout.customized(model)``.

    Raises:
        UserError: a prompt is too long, the rare token is none, the loss is not finite, or what is given is missing
            or does not fit.
    """
    config, files, settings = layout.config, layout.customized(model), layout.config.customize
    manifest, target = read_json(layout.encode_manifest), pick_device(device)
    make_deterministic()
    encoded, unet, scheduler = load_encoded(layout), load_unet(layout, target), load_scheduler(layout)
    learned = concept(model, settings, config.seed, manifest["image_shape"][0])
    tokens = manifest["caption_shape"][0]
    token = NewToken(text_encoder(config.encode, tokens, target), settings.rare_token, tokens)
    exemplars = _exemplars(layout, learned, target)
    asked = queries(settings, model)
    with torch.no_grad():
        token.states([*exemplars.prompts, *(prompt for _, prompt in asked)])  # all fit, or nothing is trained
    loss = {}
    if learned.weights and learned.token:
        take(unet, token, learned.weights, learned.token, trained_names(unet, settings))
    else:
        prior = prior_rows(settings, encoded, config.seed)
        losses = train(unet, scheduler, token, exemplars, encoded, prior, settings, config.seed, model)
        loss = {"loss": {"first": losses[:REPORTED].mean().item(), "last": losses[-REPORTED:].mean().item()}}
    given = {f"given-{i}": file for i, file in enumerate(given_files(settings, model))}
    made_by = provenance(config.digest_of("seed", "customize"), {"weights": layout.weights} | given)
    weights = dict(unet.named_parameters())
    write_tensors(files["weights"], {name: weights[name] for name in trained_names(unet, settings)}, made_by)
    write_tensors(files["token"], {"token": token.row}, made_by)
    with torch.no_grad():
        states = token.states(exemplars.prompts).cpu().numpy()
        prompts = token.states([prompt for _, prompt in asked]).cpu().numpy()
    write_arrays(files["exemplars"], {"latents": exemplars.latents.cpu().numpy(), "states": states}, made_by)
    for i, exemplar in enumerate(learned.exemplars):
        write_image(layout.customized_image(model, f"exemplar-{i:02d}"), exemplar.image)
    _write_queries(layout, learned, unet, prompts, made_by)
    part = next(part for part, models in names(settings, config.seed).items() if model in models)
    named = zip(query_names(settings, model), asked, strict=True)
    record = {"model": model, "kind": learned.kind, "part": part, "exemplars": exemplars.prompts}
    record |= {"queries": [{"query": name, "manner": manner, "prompt": prompt} for name, (manner, prompt) in named]}
    write_json(files["record"], record | loss | {"made_by": made_by})


def take(unet: UNet2DConditionModel, token: NewToken, weights: str, embedding: str, names: list[str]) -> None:
    """Put the weights and the token of a finished model in place.

    Args:
        unet: θ0; the customised model afterwards.
        token: the new token.
        weights: file with all weights that customising changed, by the names they have in the UNet.
        embedding: file of the token's embedding, ``token`` (width,).
        names: the weights that customising may change; no other may be in the file, none may lack.

    Raises:
        UserError: a file is missing or damaged, or is of another base model or text encoder.
    """
    found, own = read_tensors(weights), dict(unet.named_parameters())
    check_weights(weights, found, {name: own[name].shape for name in names})
    row = read_tensors(embedding)
    shapes = {name: tuple(value.shape) for name, value in row.items()}
    if shapes != {"token": tuple(token.row.shape)}:
        raise UserError(
            f"{embedding} holds {shapes}, expected 'token' of width {len(token.row)}: it is of another text encoder."
        )
    with torch.no_grad():
        for name in names:
            own[name].copy_(found[name])
        token.row.copy_(row["token"])


def check_weights(path: str, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Whether a file's weights are those that are asked for, all of them and no others.

    Raises:
        UserError: weights are missing, superfluous or of another shape; all are counted.
    """
    wrong = [name for name, value in found.items() if expected.get(name) != value.shape]
    missing = sorted(expected.keys() - found.keys())
    if wrong or missing:
        raise UserError(
            f"{path} is of another base model: of {len(expected)} weights {len(missing)} are missing and {len(wrong)} "
            f"do not fit, such as {[*wrong, *missing][0]}. Name the model it was customised from, and what of it was "
            "changed (customize.weights)."
        )


def _write_queries(
    layout: Layout, learned: Concept, unet: UNet2DConditionModel, prompts: np.ndarray, made_by: dict
) -> None:
    """Write a customised model's images of prompts, (n, tokens, width): those given, or generated."""
    own, codec = query_names(layout.config.customize, learned.name), codec_of(layout.config.encode, unet.device)
    if learned.queries:
        images = np.stack(learned.queries)
        arrays = {"latents": codec.encode(images), "prompts": prompts}
    else:
        noise = initial_noise(layout.config.seed, own, read_json(layout.encode_manifest)["latent_shape"])
        arrays = {"latents": generate(layout, unet, noise, prompts), "initial_noise": noise, "prompts": prompts}
        images = codec.decode(arrays["latents"])
    write_arrays(layout.customized(learned.name)["queries"], arrays, made_by)
    for name, image in zip(own, images, strict=True):
        write_image(layout.customized_image(learned.name, name), image)


def trained_names(unet: UNet2DConditionModel, settings: Customize) -> list[str]:
    """Names of the weights that customisation changes."""
    return select([name for name, _ in unet.named_parameters()], settings.weights)


def prior_rows(settings: Customize, encoded: Encoded, seed: int) -> np.ndarray:
    """The prior set, the same for all models of an experiment; sorted rows of D, int64."""
    return np.sort(generator(seed, "prior set").permutation(len(encoded))[: settings.prior_images])


def initial_noise(seed: int, names: list[str], shape: list[int]) -> np.ndarray:
    """Where sampling starts, a function of each query's own name; (n, C, H, W), float32."""
    streams = [generator(seed, "customised query", query) for query in names]
    return np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams])


def train(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    token: NewToken,
    exemplars: Exemplars,
    encoded: Encoded,
    prior: np.ndarray,
    settings: Customize,
    seed: int,
    name: str,
) -> np.ndarray:
    """Customise a model and a token, in place.

    Args:
        unet: θ0, frozen; afterwards the customised model, frozen.
        scheduler: its schedule.
        token: the new token.
        exemplars: of the concept.
        encoded: D.
        prior: its rows to preserve.
        settings: the recipe.
        seed: the experiment's.
        name: of the model, for its random numbers.

    Returns:
        Exemplars' loss at every step, (steps,), float64.

    Raises:
        UserError: the loss is not finite.
    """
    weights = dict(unet.named_parameters())
    own = [weights[weight].requires_grad_() for weight in trained_names(unet, settings)]
    optimizer = torch.optim.AdamW([*own, token.row], lr=settings.learning_rate, weight_decay=settings.weight_decay)
    distinct = sorted(set(exemplars.prompts))
    row_of = torch.tensor([distinct.index(prompt) for prompt in exemplars.prompts])
    losses, repeatable = np.empty(settings.steps), Repeatable(token.row.device)
    for step in progress(range(settings.steps), total=settings.steps, unit="step", what=f"customize {name}"):
        random = generator(seed, "customize", name, step)
        count, shape = settings.batch_size, tuple(exemplars.latents.shape[1:])
        chosen, kept = random.integers(len(exemplars.prompts), size=count), random.choice(prior, size=count)
        timesteps = random.integers(scheduler.config.num_train_timesteps, size=2 * count)
        noise = random.standard_normal((2 * count, *shape), dtype=np.float32)
        mirrored = random.integers(2, size=count) if settings.flips else 0
        picks = random.random((count, 2)) if encoded.has_views else None
        prior_latents, prior_states = encoded.examples(kept, picks)
        rows = row_of[chosen].to(token.row.device)
        latents = torch.cat([exemplars.latents[chosen + mirrored * len(exemplars.prompts)], prior_latents])
        drawn = (latents, prior_states, timesteps, noise)
        compute = partial(_gradients, unet, scheduler, token, distinct, rows, *drawn, settings.prior_weight)
        losses[step] = repeatable(compute, optimizer.zero_grad)
        optimizer.step()
        optimizer.zero_grad()
        if not np.isfinite(losses[step]):
            raise UserError(f"Customising {name} diverged at step {step + 1}: lower customize.learning_rate.")
    unet.requires_grad_(False)
    return losses


def _gradients(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    token: NewToken,
    distinct: list[str],
    rows: torch.Tensor,
    latents: torch.Tensor,
    prior_states: torch.Tensor,
    timesteps: np.ndarray,
    noise: np.ndarray,
    prior_weight: float,
) -> float:
    """Leave the gradients of a batch, exemplars with the prompts of these rows first; their mean loss."""
    states, count = token.states(distinct)[rows], len(rows)
    states = torch.cat([states, prior_states.to(states.device)])
    found = draw_losses(unet, scheduler, latents, states, timesteps, noise)
    loss = found[:count].mean()
    (loss + prior_weight * found[count:].mean()).backward()
    return loss.item()


def _exemplars(layout: Layout, learned: Concept, device: torch.device) -> Exemplars:
    images = np.stack([exemplar.image for exemplar in learned.exemplars])
    if layout.config.customize.flips or layout.config.encode.flips:
        images = np.concatenate([images, images[:, :, ::-1]])
    latents = codec_of(layout.config.encode, device).encode(np.ascontiguousarray(images))
    return Exemplars(torch.from_numpy(latents), [exemplar.caption for exemplar in learned.exemplars])
