"""Z-Image: a single-stream flow transformer, a Qwen3 text encoder, and FLUX.1's VAE.

The transformer takes lists, its time runs from noise to image (1 - sigma), and its output is the negative velocity; both
are turned here. Text stands behind the image's tokens, without padding. Its single files hold the transformer alone, with
q, k and v of each attention in one matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from everydream_kit.models.distilled import why_distilled
from everydream_kit.models.family import Conditioning, Layout, SamplerSpec, Sizes, input_dtype
from everydream_kit.models.flow import trained_as_flux
from everydream_kit.models.flow_transformers import TransformerNames, flow_family, having, transformer
from everydream_kit.models.latent_spaces import kl_space
from everydream_kit.models.qwen_text import CHAT, MAX_TOKENS, QWEN3, qwen_prompt_encoder

if TYPE_CHECKING:
    from everydream_kit.models.family import Model

TRANSFORMER = transformer("transformer_z_image", "ZImageTransformer2DModel", "ZImageTransformerBlock", since="0.36")


def predict(
    model: Model, noisy_latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, sizes: Sizes
) -> torch.Tensor:
    """The velocity (B, 16, h, w) in float32."""
    dtype = input_dtype(model.denoiser)
    texts = [text.to(dtype) for text in conditioning.texts()]
    images = list(noisy_latents.to(dtype).unsqueeze(2))  # (16, 1, h, w) each
    time = ((1000 - timesteps) / 1000).to(dtype)
    output = model.denoiser(images, time, texts, return_dict=False)[0]
    return -torch.stack([image.float() for image in output]).squeeze(2)


_BLOCK = {
    **dict.fromkeys(("attention.to_q", "attention.to_k", "attention.to_v"), "attention.qkv"),
    "attention.norm_q": "attention.q_norm",
    "attention.norm_k": "attention.k_norm",
    "attention.to_out.0": "attention.out",
}
NAMES = TransformerNames(
    outside={"all_x_embedder.2-1": "x_embedder", "all_final_layer.2-1": "final_layer"},
    blocks={name: (name, _BLOCK) for name in ("layers", "noise_refiner", "context_refiner")},
    unused=r"^norm_final\.weight$",
)

Z_IMAGE = flow_family(
    name="z_image",
    title="Z-Image",
    pipeline_class="ZImagePipeline",
    denoiser=TRANSFORMER,
    text_encoders=(QWEN3,),
    encode_prompt=qwen_prompt_encoder([-2], CHAT),
    predict=predict,
    latent_space=kl_space(16),
    shift=trained_as_flux,  # the technical report says so; the scheduler's 6 is for sampling
    sampler=SamplerSpec("flow", "cfg", size_multiple=16, num_steps=30, cfgs=(5.0,)),
    layout=Layout(NAMES.to_single_file, NAMES.from_single_file, holds_all=False, lora_for_apps="diffusers"),
    lora_targets=(r"layers\.\d+\.attention\.(to_q|to_k|to_v|to_out\.0)",),
    matches_keys=having("layers.0.adaLN_modulation.0.weight", "x_pad_token"),
    modelspec_architecture="z-image",
    kohya_base="zimage",
    distilled=lambda source: why_distilled(
        source, r"turbo[^/]*/?$", "Z-Image-Turbo", "Z-Image (Tongyi-MAI/Z-Image)", apps="Turbo"
    ),
    caption_tokens=MAX_TOKENS - 8,  # of the template
    prompt_version=f"layer -2 of {MAX_TOKENS} tokens of {CHAT}",
)
