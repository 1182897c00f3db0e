"""Unlearning quality: what a model that forgot a query makes of the query's noise, and of other noise and prompts.

AbU (arXiv 2406.09408, its check of the unlearned models) generates the forgotten image and 99 others again: the first
should change, the others should not. The others are here of training captions, drawn without repetition while there
are enough, each with initial noise of its own; they are the same for every variant and query.
"""

import numpy as np
from diffusers import UNet2DConditionModel

from forgetrace.artifacts import provenance, read_array, read_arrays, read_tensors, write_arrays
from forgetrace.diffusion.device import pick_device
from forgetrace.diffusion.model import load_unet
from forgetrace.diffusion.synthesis import generate_many
from forgetrace.encoding.codec import codec_of
from forgetrace.layout import Layout
from forgetrace.randomness import generator


def regenerate_unlearned(layout: Layout, variant: str, device: str = "auto") -> None:
    """Write, for every query of :meth:`Config.forgotten_queries`, images before and after it was unlearned.

    The arrays are uint8: ``targets`` (queries, height, width, 3) by θ0 and ``targets_unlearned`` alike by each query's
    own θ_Q; ``others`` (others, height, width, 3) and ``others_unlearned`` (queries, others, height, width, 3).

    Raises:
        UserError: a file of a query or of what was unlearned is missing or damaged.
    """
    queries = layout.config.forgotten_queries()
    unet = load_unet(layout, pick_device(device))
    own = [read_arrays(layout.query(query)["tensors"]) for query in queries]
    noise = np.concatenate([np.stack([arrays["initial_noise"] for arrays in own]), others_noise(layout)])
    prompts = np.concatenate([np.stack([arrays["prompt"] for arrays in own]), others_prompts(layout)])
    before = _images(layout, unet, noise, prompts)
    targets, others = np.empty_like(before[: len(own)]), []
    theta0 = {name: weight.detach().clone() for name, weight in unet.state_dict().items()}
    for i, query in enumerate(queries):
        unet.load_state_dict(theta0 | read_tensors(layout.unlearned(variant, query)["weights"]))
        asked = [i, *range(len(own), len(noise))]
        after = _images(layout, unet, noise[asked], prompts[asked])
        targets[i] = after[0]
        others.append(after[1:])
    made_by = provenance(
        layout.config.digest_of("seed", "synthesize") | {"unlearn": layout.config.unlearn[variant].model_dump()},
        {"weights": layout.weights} | {query: layout.unlearned(variant, query)["weights"] for query in queries},
    )
    arrays = {"targets": before[: len(own)], "targets_unlearned": targets}
    arrays |= {"others": before[len(own) :], "others_unlearned": np.stack(others)}
    write_arrays(layout.regenerated(variant), arrays, made_by)


def others_noise(layout: Layout) -> np.ndarray:
    """Initial noise of the other images; (others, C, H, W), float32."""
    shape = read_array(layout.latents, mmap=True).shape[1:]
    streams = [generator(layout.config.seed, "other image", i) for i in range(layout.config.evaluate.others)]
    return np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams])


def others_prompts(layout: Layout) -> np.ndarray:
    """Token states of the other images' prompts; (others, tokens, width), float32."""
    captions = read_array(layout.captions, mmap=True)
    order = generator(layout.config.seed, "other images").permutation(len(captions) - 1)  # the last is the empty one
    return np.array(captions[np.resize(order, layout.config.evaluate.others)], dtype=np.float32)


def _images(layout: Layout, unet: UNet2DConditionModel, noise: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """What a model makes of n initial noises and prompts; (n, height, width, 3), uint8."""
    return codec_of(layout.config.encode, unet.device).decode(generate_many(layout, unet, noise, prompts))
