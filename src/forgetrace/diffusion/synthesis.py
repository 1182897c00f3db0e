"""The ``synthesize`` stage: the queries, generated from held-out captions or read from a file."""

from collections.abc import Iterator

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from forgetrace.artifacts import (
    UserError,
    provenance,
    read_array,
    read_image,
    read_json,
    write_arrays,
    write_image,
    write_json,
)
from forgetrace.datasets.images import read_square
from forgetrace.datasets.prepare import read_pool
from forgetrace.diffusion.device import pick_device
from forgetrace.diffusion.model import load_scheduler, load_unet
from forgetrace.diffusion.sampling import sample, trajectory
from forgetrace.encoding.latents import to_latents, to_pixels
from forgetrace.encoding.text import token_states
from forgetrace.layout import Layout
from forgetrace.randomness import generator


def synthesize(layout: Layout, query: str, device: str = "auto") -> None:
    """Write one query's record, image and tensors.

    Raises:
        UserError: the user's image is missing or cannot be read, or the prompt is longer than the captions.
    """
    own = layout.config.image_query(query)
    tokens = read_json(layout.encode_manifest)["caption_shape"][0]
    if own:
        record = {"query": query, "prompt": own.prompt, "source": "file", "file": own.image}
        prompt = token_states([own.prompt], tokens)[0]
        arrays = {"latent": _latent_of_file(layout, own.image), "prompt": prompt}
    else:
        record, arrays = generate_query(layout, load_unet(layout, pick_device(device)), query)
    files = layout.query(query)
    made_by = provenance(layout.config.digest_of("seed", "synthesize"), {"weights": layout.weights})
    write_image(files["image"], to_pixels(arrays["latent"][None], layout.config.encode.factor)[0])
    write_arrays(files["tensors"], arrays, made_by)
    write_json(files["record"], record | {"made_by": made_by})


def generate_query(layout: Layout, unet: UNet2DConditionModel, query: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Generate the query named ``<pool>-<number>`` from its pool's caption and its own noise.

    Returns:
        The record (prompt, seed, sampler) and the arrays latent, initial_noise (C, H, W) and
        prompt (tokens, width), float32.
    """
    pool, _, number = query.rpartition("-")
    prompt = read_pool(layout.data_manifest, pool)[int(number)]
    manifest, settings = read_json(layout.encode_manifest), layout.config.synthesize
    seed = int(generator(layout.config.seed, "query", query).integers(2**31))
    initial = generator(seed, "initial noise").standard_normal(manifest["latent_shape"], dtype=np.float32)
    states = token_states([prompt], manifest["caption_shape"][0])[0]
    latent = regenerate(layout, unet, initial, states)
    record = {"query": query, "prompt": prompt, "source": "pool", "seed": seed}
    record |= {"sampler_steps": settings.sampler_steps, "guidance": settings.guidance}
    return record, {"latent": latent, "initial_noise": initial, "prompt": states}


def regenerate(layout: Layout, unet: UNet2DConditionModel, initial: np.ndarray, prompt: np.ndarray) -> np.ndarray:
    """The latent a model makes of one query's initial noise and prompt.

    Args:
        layout: the experiment, for the sampler's settings.
        unet: any model of the experiment.
        initial: (C, H, W).
        prompt: token states (tokens, width).

    Returns:
        Latent (C, H, W), float32, clipped to [-1, 1].
    """
    latents = sample(*_sampling(layout, unet, initial, prompt))
    return latents[0].clamp(-1, 1).cpu().numpy()


def journey(
    layout: Layout, unet: UNet2DConditionModel, initial: np.ndarray, prompt: np.ndarray
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """The sampler's steps on the way to :func:`regenerate`'s latent, as :func:`trajectory` yields them."""
    return trajectory(*_sampling(layout, unet, initial, prompt))


def _sampling(layout: Layout, unet: UNet2DConditionModel, initial: np.ndarray, prompt: np.ndarray) -> tuple:
    """The sampler's arguments for one query."""
    device = next(unet.parameters()).device
    settings = layout.config.synthesize
    return (
        unet,
        load_scheduler(layout),
        torch.from_numpy(initial)[None].to(device),
        torch.from_numpy(prompt)[None].to(device),
        torch.from_numpy(np.array(read_array(layout.captions, mmap=True)[-1])).to(device),
        settings.sampler_steps,
        settings.guidance,
    )


def _latent_of_file(layout: Layout, path: str) -> np.ndarray:
    from PIL import Image

    height, width, _ = read_json(layout.encode_manifest)["image_shape"]
    size = layout.config.prepare.size
    try:
        pixels = read_image(path) if size is None else read_square(path, size)
    except UserError:
        raise UserError(
            f"{path} is missing or no image that can be read: put the picture of the query there, "
            "or change its 'image' under synthesize.queries."
        ) from None
    if pixels.shape[:2] != (height, width):
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))
    latents = to_latents(pixels[None], layout.config.encode.factor)
    if latents.shape[1:] != tuple(read_json(layout.encode_manifest)["latent_shape"]):
        raise UserError(f"{path} does not give latents of the experiment's shape.")
    return latents[0]
