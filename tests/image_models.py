"""Tiny vision transformers with invented weights, saved as the hub has them."""

from pathlib import Path

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_clip(folder: Path) -> Path:
    """Both towers, like the models on the hub."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    torch.manual_seed(0)
    vision, text = SHAPE | {"image_size": 16, "patch_size": 8}, SHAPE | {"vocab_size": 50}
    for tower in (vision, text):
        tower["projection_dim"] = 8
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)).save_pretrained(folder)
    side = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size={"shortest_edge": 18}, crop_size=side).save_pretrained(folder)
    return folder


def save_vit(folder: Path, seed: int = 0) -> Path:
    """A ViT as DINO is one, saved without pooler."""
    import torch
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    torch.manual_seed(seed)
    ViTModel(ViTConfig(**SHAPE, image_size=16, patch_size=8), add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def save_dinov2(folder: Path) -> Path:
    """A DINOv2, whose patches do not divide the original image."""
    import torch
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    settings = {key: value for key, value in SHAPE.items() if key != "intermediate_size"}
    Dinov2Model(Dinov2Config(**settings, image_size=14, patch_size=7)).save_pretrained(folder)
    side = {"height": 14, "width": 14}
    BitImageProcessorPil(size={"shortest_edge": 16}, crop_size=side).save_pretrained(folder)
    return folder
