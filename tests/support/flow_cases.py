"""What tests of the families of flow matching must know of each, and what diffusers' pipeline makes of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_folder

from everydream_kit.models.families import FAMILIES
from everydream_kit.models.loading import open_model
from everydream_kit.models.sampling import SamplePrompt, sample_images
from everydream_kit.runs import RunFolder

FLOW = [name for name, family in FAMILIES.items() if family.objective == "flow"]


@dataclass(frozen=True)
class Case:
    """What the tests must know of a family.

    Attributes:
        wide: config of a transformer that is wider than a token of an image, so that it can hold what the noise is.
        options: (pipeline, guidance scale, negative prompt) -> diffusers' arguments for them.
        distilled: name of a checkpoint that should not be trained on.
        num_tokens: most that are kept of a short caption.
        usual: guidance scale and steps of a sample.
        app_layer: a weight of a LoRA file for apps, by the names of ComfyUI's key maps (`comfy/lora.py`).
        published: tensors and weights of the published single file of the transformer.
        fused: a layer of the file for apps that is three of diffusers'.
        loras: layouts of LoRA files that diffusers reads.
        conditioner: what stands before the names of the text conditioner in the single file, where there is one.
    """

    wide: dict[str, Any]
    options: Callable[[Any, float, str], dict[str, Any]]
    distilled: str
    num_tokens: int
    usual: tuple[float, int]
    app_layer: str
    published: tuple[int, int]
    fused: str = ""
    loras: tuple[Literal["kohya", "diffusers", "comfy"], ...] = ("kohya", "diffusers")
    conditioner: str = ""


CASES = {
    "z_image": Case(
        {"dim": 128, "n_layers": 1, "axes_dims": [16, 24, 24]},
        lambda pipeline, cfg, negative: {"guidance_scale": cfg - 1, "negative_prompt": negative},  # counts from 0
        "Z-Image-Turbo",
        80,
        (5.0, 30),
        "transformer.layers.0.attention.to_q.lora_A.weight",
        (453, 6_154_908_736),  # 12,309,817,472 bytes in z_image_turbo_bf16.safetensors
    ),
    "flux2_klein": Case(
        {"attention_head_dim": 48, "num_attention_heads": 4, "num_single_layers": 1, "axes_dims_rope": [12] * 4},
        lambda pipeline, cfg, negative: {
            "guidance_scale": cfg,
            "negative_prompt_embeds": pipeline.encode_prompt(negative)[0],
        },
        "FLUX.2-klein-4B",
        512,
        (4.0, 50),
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
        (149, 3_875_544_576),  # flux-2-klein-base-4b.safetensors has 16,560 bytes more, its header
        "double_blocks.0.img_attn.qkv",
    ),
    "qwen_image": Case(
        {"attention_head_dim": 48, "num_attention_heads": 4, "num_layers": 1, "axes_dims_rope": [8, 20, 20]},
        lambda pipeline, cfg, negative: {"true_cfg_scale": cfg, "negative_prompt": negative},
        "Qwen-Image-2512-Lightning",
        300,
        (4.0, 50),
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        (1933, 20_430_401_088),  # qwen_image_bf16.safetensors has twice as many bytes, and its header
    ),
    "flux1": Case(
        {"attention_head_dim": 48, "num_attention_heads": 4, "num_single_layers": 1, "axes_dims_rope": [8, 20, 20]},
        lambda pipeline, cfg, negative: {"guidance_scale": cfg},  # embedded: there is no second prediction
        "FLUX.1-schnell",
        512,
        (3.5, 28),
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        (780, 11_901_408_320),  # flux1-dev.safetensors has 23,802,932,552 bytes, twice this and its header
    ),
    "anima": Case(
        {"num_attention_heads": 8, "num_layers": 1},
        lambda pipeline, cfg, negative: {"negative_prompt": negative, **guided(pipeline, cfg)},
        "anima-turbo-v1.1",
        80,
        (4.0, 30),
        "lora_unet_blocks_0_self_attn_q_proj.lora_down.weight",
        (567 + 118, 1_956_405_248 + 134_663_680),  # as diffusers' scripts/convert_anima_to_diffusers.py splits it
        loras=("comfy", "diffusers"),
        conditioner="net.llm_adapter.",
    ),
    "krea2": Case(
        {"num_attention_heads": 8, "num_key_value_heads": 4, "num_layers": 1},
        lambda pipeline, cfg, negative: {"guidance_scale": cfg - 1, "negative_prompt": negative},  # counts from 0
        "Krea-2-Turbo",
        300,
        (5.5, 28),
        "diffusion_model.blocks.0.attn.wq.lora_A.weight",
        (430, 12_820_073_036),  # as diffusers' own conversion takes raw.safetensors
    ),
}


def guided(pipeline: Any, cfg: float) -> dict[str, Any]:
    """A modular pipeline's guidance is a part of it."""
    from diffusers.guiders import ClassifierFreeGuidance

    pipeline.update_components(guider=ClassifierFreeGuidance(guidance_scale=cfg))
    return {}


def pipeline_of(folder: Path) -> Any:
    import diffusers

    cls = getattr(diffusers, FAMILIES[open_model(folder).family.name].pipeline_class)
    if issubclass(cls, diffusers.ModularPipeline):  # as model cards say
        pipeline = diffusers.ModularPipeline.from_pretrained(folder)
        pipeline.load_components(pretrained_model_name_or_path=str(folder))
    else:
        pipeline = cls.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def fed_to_the_decoder(vae: Any) -> Iterator[list[torch.Tensor]]:
    """What goes into a VAE's decoder meanwhile: an image before its 256 levels hide small differences."""
    fed: list[torch.Tensor] = []
    hook = vae.decoder.register_forward_pre_hook(lambda module, given: fed.append(given[0].flatten()))
    with hook:
        yield fed


def theirs(family: str, pipeline: Any, cfg: float = 4.0, negative: str = "") -> np.ndarray:
    """A 64 x 96 image of diffusers' own pipeline."""
    made = pipeline(
        prompt="a red square",
        width=64,
        height=96,
        num_inference_steps=4,
        generator=torch.Generator("cpu").manual_seed(4),
        **CASES[family].options(pipeline, cfg, negative),
    )
    images = made.images if hasattr(made, "images") else made.get("images")
    return np.asarray(images[0]).astype(int)


def ours(model: Any, cfg: float = 4.0, negative: str = "") -> np.ndarray:
    wanted = SamplePrompt("a red square", negative, seed=4, width=64, height=96, cfgs=(cfg,))
    return np.asarray(sample_images(model, [wanted], num_inference_steps=4)[0]).astype(int)


def copy_of_base(family: str, folder: Path) -> Path:
    """A copy of the base's folder: a single file holds the transformer alone and is read next to the rest."""
    return Path(shutil.copytree(tiny_folder(family), folder / "base"))


def settings_for(family: str, tmp_path: Path) -> dict[str, Any]:
    """Of a short run on four images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a red square, number {10**number}", encoding="utf-8")
    return {
        **{"resume_ckpt": str(tiny_folder(family)), "data_root": str(folder), "logdir": str(tmp_path / "logs")},
        **{"resolution": 64, "batch_size": 2, "max_steps": 4, "max_epochs": 9, "lr": 1e-3, "seed": 7, "log_step": 1},
        **{"num_workers": 0, "cache_variants": 1, "cond_dropout": 0.2, "sample_steps": None, "no_save_ckpt": True},
        **{"optimizer": "adamw", "save_full_precision": True},
    }


def weights_of(run: RunFolder, suffix: str = "") -> dict[str, torch.Tensor]:
    folder = run.last_checkpoint
    paths = sorted(folder.with_name(folder.name + suffix).rglob("*.safetensors"))
    found = {
        path.parent.name: load_file(path) for path in paths if "resume" not in path.parts and "text" not in str(path)
    }
    return {f"{name}/{key}": value for name, tensors in found.items() for key, value in tensors.items()}
