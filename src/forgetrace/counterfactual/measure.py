"""What a model says of a query: its loss, and the image it makes of the same noise and prompt."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from forgetrace.artifacts import fingerprint, read_arrays, sha256_of, stage_versions, write_image, write_json
from forgetrace.diffusion.device import processor_name
from forgetrace.diffusion.loss import batched_losses
from forgetrace.diffusion.model import load_scheduler
from forgetrace.diffusion.noise import NoiseBank
from forgetrace.diffusion.regions import LATENT, PIXELS
from forgetrace.diffusion.synthesis import generate_many, regenerate
from forgetrace.encoding.codec import codec_of
from forgetrace.layout import Layout


def measure(layout: Layout, unet: UNet2DConditionModel, model: tuple[str, int, str], query: str, key: str) -> None:
    """Write a model's losses on a query and the regenerated image.

    A user's image has no initial noise to be regenerated from: its losses are all there is. The losses are
    written last and hold the image's hash, so that a kill between the two cannot pair them with another image.
    Of a region, the losses inside and outside of it are measured too.

    Args:
        layout: the experiment.
        unet: the model.
        model: its name (method, k, member).
        query: the query.
        key: fingerprint of everything the measurement depends on, kept with it.
    """
    files, arrays = layout.measure(*model, query), read_arrays(layout.query(query)["tensors"])
    timesteps, losses = query_losses(layout, unet, arrays)
    regenerated = "initial_noise" in arrays
    if regenerated:
        latent = regenerate(layout, unet, arrays["initial_noise"], arrays["prompt"])
        write_image(files["image"], codec_of(layout.config.encode, unet.device).decode(latent[None])[0])
    record = {"query": query, "method": model[0], "k": int(model[1]), "member": model[2]}
    # Rounding differs between processors: a table may mix them, but must be able to say so.
    record |= {"processor": processor_name(next(unet.parameters()).device)}
    record |= {"key": key, "regenerated": regenerated, "loss": float(losses.mean())}
    if regenerated:
        record |= {"image_sha256": sha256_of(files["image"])}
    record |= {"timesteps": timesteps.tolist(), "losses": [round(float(value), 8) for value in losses]}
    if LATENT in arrays:
        record |= {"regions": region_losses(layout, unet, arrays)}
    write_json(files["losses"], record)


def brief_measures(layout: Layout, unet: UNet2DConditionModel, queries: Sequence[str]) -> dict[str, dict[str, float]]:
    """A model's mean loss on queries and, unless they are a user's, the squared error of what it makes of their noise.

    Of a region, both are those inside.

    Returns:
        By query ``loss``, and ``mse`` of the pixels in [0, 1] between it and its regenerated image.
    """
    arrays = {query: read_arrays(layout.query(query)["tensors"]) for query in queries}
    found = {
        query: {"loss": float(query_losses(layout, unet, of, of.get(LATENT))[1].mean())} for query, of in arrays.items()
    }
    generated = [query for query, of in arrays.items() if "initial_noise" in of]
    if not generated:
        return found
    noises, prompts, originals = (
        np.stack([arrays[query][name] for query in generated]) for name in ("initial_noise", "prompt", "latent")
    )
    codec = codec_of(layout.config.encode, unet.device)
    images, made = codec.decode(originals), codec.decode(generate_many(layout, unet, noises, prompts))
    for query, original, image in zip(generated, images, made, strict=True):
        inside = arrays[query].get(PIXELS, slice(None))
        found[query]["mse"] = float(np.square((image.astype(float) - original) / 255)[inside].mean())
    return found


def region_losses(layout: Layout, unet: UNet2DConditionModel, arrays: dict) -> dict[str, float]:
    """A model's mean loss ``inside`` a region and, unless it is the whole image, ``outside``.

    With a the region's share of the image, the loss of the whole image is a · inside + (1 − a) · outside.
    """
    weights = {"inside": arrays[LATENT], "outside": 1 - arrays[LATENT]}
    return {
        part: float(query_losses(layout, unet, arrays, region)[1].mean())
        for part, region in weights.items()
        if region.any()
    }


def query_losses(
    layout: Layout, unet: UNet2DConditionModel, arrays: dict, region: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Losses at every ``timestep_stride``-th timestep on a bank shared by all models and queries.

    Args:
        layout: the experiment.
        unet: the model.
        arrays: the query's latent and prompt.
        region: weights of the latent positions that count, (H, W); by default all alike.

    Returns:
        Timesteps (T,), int64, and losses averaged over the draws of each timestep, (T,), float64.
    """
    scheduler, settings = load_scheduler(layout), layout.config.evaluate
    timesteps = np.arange(0, scheduler.config.num_train_timesteps, settings.timestep_stride, dtype=np.int64)
    shape = arrays["latent"].shape
    bank = NoiseBank(layout.config.seed, "evaluate", np.tile(timesteps, settings.draws), shape)
    count = len(bank.timesteps)
    losses = batched_losses(
        unet,
        scheduler,
        torch.from_numpy(arrays["latent"]).expand(count, -1, -1, -1),
        torch.from_numpy(arrays["prompt"]).expand(count, -1, -1),
        bank.timesteps,
        bank.draws(),
        None if region is None else torch.from_numpy(region),
    )
    return timesteps, losses.reshape(settings.draws, -1).mean(axis=0)


def measure_key(layout: Layout, query: str, model_key: str) -> str:
    """Fingerprint of what a measurement depends on: the model, the query, how it is measured."""
    # The arrays, not the file: its provenance may change where the query does not.
    arrays = read_arrays(layout.query(query)["tensors"])
    return fingerprint(
        {
            "model": model_key,
            "query": {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()},
            "versions": stage_versions("measure"),
            "evaluate": layout.config.evaluate.model_dump(include={"timestep_stride", "draws"}),
            "sampler": layout.config.synthesize.model_dump(include={"sampler_steps", "guidance"}),
        }
    )
