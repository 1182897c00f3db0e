"""Small folders in the layouts that AbC and AbU publish for customised models, with invented numbers."""

import json
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from forgetrace.diffusion.subsets import select

WIDTH, BACKGROUND, EMBEDDING = 6, 40, 5
KINDS = {"media": 3, "gpt": 2}  # queries of each model
EXEMPLARS = (1, 3)  # of each model


def cases() -> list[dict]:
    """Entries of a file of test cases."""
    return [
        {
            "exemplar": [f"dataset/exemplar/art/{model}-{i}.jpg" for i in range(count)],
            "synth": {
                kind: [f"dataset/synth/art/{kind}/m{model}/samples/{i:05d}.png" for i in range(n)]
                for kind, n in KINDS.items()
            },
            "class_id": f"m{model}",
            "category": ["bird", "fish"][model],
        }
        for model, count in enumerate(EXEMPLARS)
    ]


def case_features() -> dict:
    """Content of the features of those cases: the queries of a model resemble its exemplars."""
    generator = torch.Generator().manual_seed(5)
    centres = torch.randn(len(EXEMPLARS), WIDTH, generator=generator)
    around = lambda model, count: centres[model] + 0.1 * torch.randn(count, WIDTH, generator=generator)  # noqa: E731
    entries, ends = cases(), [sum(EXEMPLARS[: i + 1]) for i in range(len(EXEMPLARS))]
    return {
        "exemplar_paths": [file for entry in entries for file in entry["exemplar"]],
        "exemplar_chunks": list(zip([0, *ends[:-1]], ends, strict=True)),
        "exemplar_tensors": torch.cat([around(model, count) for model, count in enumerate(EXEMPLARS)]),
        "synth_paths": {kind: [file for entry in entries for file in entry["synth"][kind]] for kind in KINDS},
        "synth_ids": {kind: [m for m in range(len(EXEMPLARS)) for _ in range(n)] for kind, n in KINDS.items()},
        "synth_tensors": {
            kind: torch.cat([around(model, n) for model in range(len(EXEMPLARS))]) for kind, n in KINDS.items()
        },
    }


def background() -> dict:
    """Content of the features of the background images."""
    values = torch.randn(BACKGROUND, WIDTH, generator=torch.Generator().manual_seed(6))
    return {"feats": values, "paths": [f"{i:06d}.png" for i in range(BACKGROUND)]}


def heads() -> dict:
    """Content of the learned heads."""
    generator = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    linear = lambda: {"weight": draw(WIDTH, WIDTH), "bias": draw(WIDTH)}  # noqa: E731
    return {"real_mapper": linear(), "synth_mapper": linear()}


def write_benchmark(folder: Path) -> Path:
    """What AbC publishes to judge features."""
    (folder / "json").mkdir(parents=True)
    (folder / "json/test_art.json").write_text(json.dumps(cases()), encoding="utf-8")
    torch.save(background(), folder / "laion_subset.pth")
    torch.save(case_features(), folder / "test_art.pth")
    torch.save(heads(), folder / "mapper.pth")
    torch.save({"inv_tau": torch.tensor(20.0), "bias": torch.tensor(-300.0)}, folder / "calibrator.pth")
    return folder


def unet() -> UNet2DConditionModel:
    """A small base model."""
    torch.manual_seed(8)
    return UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32,),
        cross_attention_dim=EMBEDDING,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=4,
    )


def keys_and_values() -> dict[str, torch.Tensor]:
    """Of a model customised from that."""
    weights = unet().state_dict()
    return {name: weights[name] + 1 for name in select(weights, "cross-attn-kv")}


def write_tasks(folder: Path) -> Path:
    """What AbU publishes of AbC, one query of each model; the list of tasks."""
    entries, tasks = cases(), []
    for model, entry in enumerate(entries):
        own = folder / f"models/art/m{model}"
        own.mkdir(parents=True)
        torch.save(keys_and_values(), own / "pytorch_custom_diffusion_weights.pt")
        torch.save({"<new1>": torch.arange(EMBEDDING) + model + 0.0}, own / "<new1>.bin")
        files = [file.replace("dataset/", "") for file in [*entry["exemplar"], entry["synth"]["gpt"][0]]]
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).touch()
        tasks.append(
            {
                "synth_image_path": files[-1],
                "prompt": "A school of <new1> fish",
                "test_case": "test_art",
                "test_case_ind": model,
                "model_path": f"models/art/m{model}",
                "train_prompt": "<new1> fish",
                "category": entry["category"],
            }
        )
    (folder / "tasks.json").write_text(json.dumps(tasks), encoding="utf-8")
    return folder / "tasks.json"
