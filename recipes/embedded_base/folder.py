"""Writing a small model as a diffusers folder in half precision, in the form that every reader accepts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedded_base import architecture

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel


def write_model_folder(
    folder: Path, tokenizer: Path, vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel
) -> None:
    """Write all parts of a Stable Diffusion 1.x pipeline, weights as fp16 safetensors.

    Args:
        folder: where to write; made if need be.
        tokenizer: folder with vocab.json, merges.txt and their JSON files, copied as they are.
        vae, unet, text_encoder: the models, in any precision.
    """
    import diffusers
    import torch
    from safetensors.torch import save_file

    models: dict[str, Any] = {"vae": vae, "unet": unet, "text_encoder": text_encoder}
    for name, model in models.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        weights = {key: value.to(torch.float16).contiguous() for key, value in model.state_dict().items()}
        if name == "text_encoder":
            # transformers 5 drops this prefix; transformers 4 and single-file readers know only the prefixed names.
            weights = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in weights.items()}
            model.config.architectures = ["CLIPTextModel"]
            model.config.dtype = "float16"
            model.config.save_pretrained(folder / name)
            save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
        else:
            model.save_config(folder / name)
            save_file(weights, folder / name / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    if tokenizer != folder / "tokenizer":
        shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    scheduler: Any = diffusers.DDIMScheduler(
        **architecture.NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="epsilon"
    )
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
