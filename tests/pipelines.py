"""A tiny Stable-Diffusion-like pipeline with invented weights, saved in diffusers' layout."""

import string
from pathlib import Path

VOCABULARY = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]
TOKENS, WIDTH, CHANNELS = 12, 16, 4


def save_pipeline(folder: Path, seed: int = 0, channels: tuple[int, int] = (8, 16)) -> Path:
    """Autoencoder (a fourth of the side, 4 channels), text encoder, tokenizer, UNet and scheduler of SD's kinds."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.5,
    )
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(VOCABULARY + SPECIAL)}, merges=[], model_max_length=TOKENS
    )
    ends = {"bos_token_id": len(VOCABULARY), "eos_token_id": len(VOCABULARY) + 1}
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(VOCABULARY) + 2,
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            **ends,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )
    pipeline(vae, text, tokenizer, unet, scheduler, StableDiffusionPipeline).save_pretrained(folder)
    return folder


def pipeline(vae, text, tokenizer, unet, scheduler, kind):
    """The parts together, without the safety checker."""
    return kind(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
