"""Small folders in the layouts that AttributeByUnlearning and FastGDA publish, with invented numbers."""

import json
import pickle
import zlib
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from ..datasets.pictures import picture

IMAGES, CAPTIONS, TOKENS, WIDTH, QUERIES, SIZE = 83, 5, 3, 8, 2, 24
SHAPE = (4, 4, 4)
CHANNELS = (32, 64)
KV = ("attn2.to_k.weight", "attn2.to_v.weight")


def captions_of(image: int) -> list[str]:
    """Five captions, the last shared by every seventh image, and a sixth that is not used."""
    return [f"picture {image} told by {i}" for i in range(4)] + [f"one of {image % 7}", "a sixth"]


def states_of(caption: str) -> np.ndarray:
    """Invented token states, a function of the caption alone."""
    return np.random.default_rng(zlib.crc32(caption.encode())).standard_normal((TOKENS, WIDTH), dtype=np.float32)


def unet() -> UNet2DConditionModel:
    """Of the published kind, but smaller."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=SHAPE[-1],
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=CHANNELS,
        cross_attention_dim=WIDTH,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8,
    )


def _write_coco(folder: Path) -> None:
    (folder / "annotations").mkdir(parents=True)
    (folder / "train2017").mkdir()
    # In no order of their numbers.
    numbers = [(7 * i) % IMAGES + 1 for i in range(IMAGES)]
    for number in numbers:
        picture(number).save(folder / f"train2017/{number:012d}.jpg")
    listed = [{"id": number, "file_name": f"{number:012d}.jpg"} for number in numbers]
    told = [
        {"id": 10 * i + j, "image_id": number, "caption": caption}
        for i, number in enumerate(numbers)
        for j, caption in enumerate(captions_of(i))
    ]
    told.sort(
        key=lambda annotation: -annotation["image_id"]
    )  # those of one image keep their order, as in the real file
    content = {"images": listed, "annotations": told, "info": {}, "licenses": []}
    (folder / "annotations/captions_train2017.json").write_text(json.dumps(content), encoding="utf-8")


def _write_arrays(latents: Path, captions: Path, dtype: str) -> None:
    random = np.random.default_rng(1)
    np.save(latents, random.standard_normal((2 * IMAGES, *SHAPE), dtype=np.float32))
    states = np.stack([np.stack([states_of(c) for c in captions_of(i)[:CAPTIONS]]) for i in range(IMAGES)])
    np.save(captions, states.astype(dtype))


def _write_queries(latents: Path, prompts: Path, images: Path, name: str = "{}.png") -> None:
    random = np.random.default_rng(2)
    images.mkdir(parents=True)
    np.save(latents, random.standard_normal((QUERIES, *SHAPE), dtype=np.float32))
    np.save(prompts, np.stack([states_of(f"prompt {i}")[None] for i in range(QUERIES)]))
    for i in range(QUERIES):
        picture(100 + i, SIZE, SIZE).save(images / name.format(i))


def fisher() -> dict[str, torch.Tensor]:
    """As AbU's: of every weight, float64."""
    generator = torch.Generator().manual_seed(3)
    weights = unet().named_parameters()
    return {name: torch.rand(w.shape, generator=generator, dtype=torch.float64) * 1e-3 + 1e-4 for name, w in weights}


def write_abu(folder: Path, dtype: str = "float32") -> Path:
    """AttributeByUnlearning's data/mscoco."""
    _write_coco(folder)
    _write_arrays(folder / "coco17_train_latents.npy", folder / "coco17_train_text_embeddings.npy", dtype)
    torch.save(unet().state_dict(), folder / "model.bin")
    torch.save(fisher(), folder / "fisher_info.pt")
    names = folder / "coco17_sample_latents.npy", folder / "coco17_sample_text_embeddings.npy"
    _write_queries(*names, folder / "sample")
    (folder / "sample_caption.txt").write_text("".join(f"prompt {i}\n" for i in range(QUERIES)), encoding="utf-8")
    return folder


def write_fastgda(folder: Path) -> Path:
    """FastGDA's data/coco."""
    data, factors = folder / "trainset", folder / "ekfac_fisher"
    _write_coco(data)
    _write_arrays(data / "latents.npy", data / "text_embeddings.npy", "float16")
    torch.save(unet().state_dict(), folder / "model.bin")
    for name, pattern in (("test", "{}.png"), ("train", "{:06d}.png")):
        place = folder / f"query_{name}"
        place.mkdir()
        _write_queries(place / "latents.npy", place / "text_embeddings.npy", place / "images", pattern)
    factors.mkdir()
    for part, tensors in ekfac().items():
        save_file(tensors, factors / f"{part}.safetensors")
    return folder


def ekfac() -> dict[str, dict[str, torch.Tensor]]:
    """Factors of the keys and values, of a layer with a bias and of a convolution, by part and module."""
    generator = torch.Generator().manual_seed(4)
    parts = {name: {} for name in ("activation_eigenvectors", "gradient_eigenvectors", "lambda_matrix")}
    counts = {}
    for name, weight in unet().named_parameters():
        layer = name.removesuffix(".weight")
        if name.endswith(KV) or name in ("time_embedding.linear_1.weight", "conv_in.weight"):
            rows, columns = len(weight), weight[0].numel() + (not name.endswith(KV))
            for part, size in (("activation_eigenvectors", columns), ("gradient_eigenvectors", rows)):
                parts[part][layer] = torch.linalg.qr(torch.randn(size, size, generator=generator))[0].contiguous()
            parts["lambda_matrix"][layer] = torch.rand(rows, columns, generator=generator) + 0.1
            counts[layer] = torch.tensor([40])
    return {**parts, "num_lambda_processed": counts}


def write_influence(path: Path, influence: np.ndarray) -> None:
    """One of AbU's influence_<i>.pkl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps({"influence": influence, "rank": np.argsort(-influence)}))
