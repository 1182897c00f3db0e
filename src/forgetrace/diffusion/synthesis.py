"""The ``synthesize`` stage: the queries, generated from held-out captions, read from a file, or published ones."""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from forgetrace.artifacts import (
    UserError,
    fingerprint,
    provenance,
    read_array,
    read_image,
    read_json,
    sha256_of,
    stage_versions,
    write_arrays,
    write_image,
    write_json,
)
from forgetrace.datasets.images import read_own, read_square
from forgetrace.datasets.prepare import read_pool
from forgetrace.diffusion.device import pick_device
from forgetrace.diffusion.model import load_scheduler, load_unet
from forgetrace.diffusion.regions import synthesize_region
from forgetrace.diffusion.sampling import sample, trajectory
from forgetrace.encoding.captions import caption_states
from forgetrace.encoding.codec import clipped, codec_of
from forgetrace.encoding.given import query_files, query_image, read_queries
from forgetrace.layout import Layout
from forgetrace.randomness import generator

NUMBERS = 100 * 12 * 8 * 8  # of the latents that are sampled at once: a hundred digits, four of Stable Diffusion's
log = logging.getLogger(__name__)


def synthesize(layout: Layout, query: str, device: str = "auto") -> None:
    """Write one query's record, image and tensors; a region's from those of the whole image.

    Raises:
        UserError: the user's image is missing or cannot be read, the prompt is longer than the captions, or a
            published query does not fit the training data; as :func:`synthesize_region`.
    """
    if layout.config.region(query):
        synthesize_region(layout, query, device)
        return
    if layout.config.given_query(query):
        _keep(layout, query, *_published(layout, query))
        return
    own, settings, device = layout.config.image_query(query), layout.config.encode, pick_device(device)
    tokens = read_json(layout.encode_manifest)["caption_shape"][0]
    if own:
        record = {"query": query, "prompt": own.prompt, "source": "file", "file": own.image}
        prompt = caption_states(settings, [own.prompt], tokens, device)[0]
        arrays = {"latent": _latent_of_file(layout, own.image, device), "prompt": prompt}
    else:
        key = generated_with(layout, query)
        if _is_there(layout, query, key):
            log.warning("%s is already there: kept.", query)
            return
        record, arrays = generate_query(layout, load_unet(layout, device), query)
        record |= {"key": key}
    _keep(layout, query, record, arrays, codec_of(settings, device).decode(arrays["latent"][None])[0])


def generated_with(layout: Layout, query: str) -> str:
    """Fingerprint of all a generated query hangs on but for the machine, whose rounding makes other bytes."""
    return fingerprint(
        {
            "query": query,
            "weights": sha256_of(layout.weights),
            "data": read_json(layout.encode_manifest)["source"],
            "settings": layout.config.synthesize.model_dump(include={"sampler_steps", "guidance"}),
            "seed": layout.config.seed,
            "versions": stage_versions("encode", "synthesize"),
        }
    )


def _is_there(layout: Layout, query: str, key: str) -> bool:
    """Whether every file of a query with this fingerprint is there; the record is removed first, written last."""
    files = layout.query(query)
    try:
        return read_json(files["record"])["key"] == key and all(Path(file).exists() for file in files.values())
    except (UserError, KeyError):
        return False


def _keep(layout: Layout, query: str, record: dict, arrays: dict[str, np.ndarray], image: np.ndarray) -> None:
    """Write a query's files."""
    files = layout.query(query)
    made_by = provenance(layout.config.digest_of("seed", "synthesize"), _made_of(layout, query))
    Path(files["record"]).unlink(missing_ok=True)
    write_image(files["image"], image)
    write_arrays(files["tensors"], arrays, made_by)
    write_json(files["record"], record | {"made_by": made_by})


def _published(layout: Layout, query: str) -> tuple[dict, dict[str, np.ndarray], np.ndarray]:
    """Record, arrays and image of a query of ``forgetrace import-release``; its initial noise is unknown."""
    entry, number = layout.config.given_query(query)
    prompts, files = read_queries(entry.given, entry.name)["prompts"], query_files(entry.given, entry.name)
    if number >= len(prompts):
        raise UserError(
            f"synthesize.queries: {entry.given} has {len(prompts)} queries '{entry.name}'; lower its count."
        )
    rows = (read_array(files[role], mmap=True)[number] for role in ("latents", "prompts"))
    arrays = dict(zip(("latent", "prompt"), (np.array(row, dtype=np.float32) for row in rows), strict=True))
    manifest = read_json(layout.encode_manifest)
    for role, shape in (("latent", manifest["latent_shape"]), ("prompt", manifest["caption_shape"])):
        if list(arrays[role].shape) != list(shape):
            raise UserError(
                f"synthesize.queries: the {role} of {query} in {entry.given} has shape {arrays[role].shape}, those of "
                f"the training data have {tuple(shape)}; give the queries of the same release (encode.given)."
            )
    record = {"query": query, "prompt": prompts[number], "source": "release", "folder": entry.given, "number": number}
    image, size = read_image(query_image(entry.given, entry.name, number)), manifest["image_shape"]
    if list(image.shape) != list(size):
        raise UserError(
            f"synthesize.queries: the image of {query} in {entry.given} has {image.shape[0]} pixels a side, those of "
            f"the training data {size[0]}: set prepare.size: {image.shape[0]}."
        )
    return record, arrays, image


def _made_of(layout: Layout, query: str) -> dict[str, str]:
    """Files that a query is made of by role: θ0's weights, and those of a release."""
    if not layout.config.given_query(query):
        return {"weights": layout.weights}
    entry, number = layout.config.given_query(query)
    files = query_files(entry.given, entry.name) | {"image": query_image(entry.given, entry.name, number)}
    return {"weights": layout.weights} | files


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
    states = caption_states(layout.config.encode, [prompt], manifest["caption_shape"][0], unet.device)[0]
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
        Latent (C, H, W), float32, clipped to the range of latents where there is one.
    """
    return generate(layout, unet, initial[None], prompt[None])[0]


def generate(layout: Layout, unet: UNet2DConditionModel, initial: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """:func:`regenerate` for n initial noises and prompts at once, (n, C, H, W) and (n, tokens, width)."""
    return clipped(layout.config.encode, sample(*_sampling(layout, unet, initial, prompts)).cpu().numpy())


def generate_many(layout: Layout, unet: UNet2DConditionModel, initial: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """:func:`generate`, as many at once as make up :data:`NUMBERS`."""
    count = max(1, NUMBERS // initial[0].size)
    batches = [slice(start, start + count) for start in range(0, len(initial), count)]
    return np.concatenate([generate(layout, unet, initial[batch], prompts[batch]) for batch in batches])


def journey(
    layout: Layout, unet: UNet2DConditionModel, initial: np.ndarray, prompt: np.ndarray
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """The sampler's steps on the way to :func:`regenerate`'s latent, as :func:`trajectory` yields them."""
    return trajectory(*_sampling(layout, unet, initial[None], prompt[None]))


def _sampling(layout: Layout, unet: UNet2DConditionModel, initial: np.ndarray, prompts: np.ndarray) -> tuple:
    """The sampler's arguments for n images."""
    device = next(unet.parameters()).device
    settings = layout.config.synthesize
    return (
        unet,
        load_scheduler(layout),
        torch.from_numpy(initial).to(device),
        torch.from_numpy(prompts).to(device),
        torch.from_numpy(np.array(read_array(layout.captions, mmap=True)[-1], dtype=np.float32)).to(device),
        settings.sampler_steps,
        settings.guidance,
    )


def _latent_of_file(layout: Layout, path: str, device: torch.device) -> np.ndarray:
    from PIL import Image

    height, width, _ = read_json(layout.encode_manifest)["image_shape"]
    size = layout.config.prepare.size
    try:
        pixels = np.asarray(read_own(path)) if size is None else read_square(path, size)
    except UserError as error:
        sentence = str(error).removesuffix(".")
        raise UserError(
            f"{sentence}: put the picture of the query there, or change its 'image' under synthesize.queries."
        ) from None
    if pixels.shape[:2] != (height, width):
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))
    latents = codec_of(layout.config.encode, device).encode(pixels[None])
    if latents.shape[1:] != tuple(read_json(layout.encode_manifest)["latent_shape"]):
        raise UserError(f"{path} does not give latents of the experiment's shape.")
    return latents[0]
