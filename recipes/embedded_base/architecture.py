"""The embedded base model's shape: Stable Diffusion 1.x in small, the same parts with the same names.

Here is the only place where its sizes stand: the training recipe builds from it.
Where the compute goes decided the sizes: the autoencoder's full-resolution layers cost nearly everything, so those are
16 wide; its deep layers and the U-Net's are cheap on two cores and hold most of the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

RESOLUTION_PIXELS = 128
MAX_TOKENS = 77  # CLIP's; captions are padded to it, as in Stable Diffusion 1.x
TEXT_WIDTH = 96

VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 40, 80, 96],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": RESOLUTION_PIXELS,
}

UNET: dict[str, Any] = {
    "sample_size": RESOLUTION_PIXELS // 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [64, 96, 96, 96],
    "layers_per_block": 1,
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 8,  # diffusers reads this as the number of heads, as Stable Diffusion 1.x has it
    "norm_num_groups": 16,
}

TEXT_ENCODER: dict[str, Any] = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 192,
    "num_hidden_layers": 4,  # clip skip up to 4 has a layer to read
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_TOKENS,
    "projection_dim": TEXT_WIDTH,
    "hidden_act": "quick_gelu",
}

# Stable Diffusion 1.x's noise schedule.
NOISE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


def build_vae(scaling_factor: float = 0.18215) -> AutoencoderKL:
    """A fresh autoencoder; `scaling_factor` multiplies latents (SD 1.x's until it is measured)."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**VAE, scaling_factor=scaling_factor)


def build_unet() -> UNet2DConditionModel:
    """A fresh U-Net."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**UNET)


def build_text_encoder(vocabulary_size: int, bos_token_id: int, eos_token_id: int) -> CLIPTextModel:
    """A fresh text encoder for a tokenizer whose padding token is its end-of-text token."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            **TEXT_ENCODER,
            vocab_size=vocabulary_size,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=eos_token_id,
        )
    )
