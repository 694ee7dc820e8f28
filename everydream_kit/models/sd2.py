"""Stable Diffusion 2.x: OpenCLIP ViT-H text encoder cut at its penultimate block, linear projections in attention.

The base models (512) predict epsilon, the 768 models v. The single files hold all 24 text blocks, of which 23 are used.
"""

from __future__ import annotations

from collections.abc import Mapping

from everydream_kit.models.family import Config, Family, Shapes, TextEncoderSlot
from everydream_kit.models.sd1 import encode_one_encoder, predict_from_text


def _matches_configs(configs: Mapping[str, Config]) -> bool:
    unet = configs["unet"]
    return (
        "text_encoder" in configs
        and "text_encoder_2" not in configs
        and unet.get("addition_embed_type") is None
        and bool(unet.get("use_linear_projection", False))
    )


def _matches_keys(shapes: Shapes) -> bool:
    return any(name.startswith("cond_stage_model.model.") for name in shapes)


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
    encode_tokens=encode_one_encoder,
    predict=predict_from_text,
    matches_configs=_matches_configs,
    matches_keys=_matches_keys,
    modelspec_architecture="stable-diffusion-v2",
    kohya_base="sd_v2",
    resolution=lambda prediction_type: 768 if prediction_type == "v_prediction" else 512,
    legacy_config=lambda prediction_type: "v2-inference-v" if prediction_type == "v_prediction" else "v2-inference",
)
