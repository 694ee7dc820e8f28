"""Checkpoints as tools in the field write them: tiny, with random weights. `write_checkpoint(name, folder)` makes one.

Each starts from our own export of a tiny model and is changed into what the named tool writes. `LAYOUTS` says what must
come of it: SAME (the weights of the tiny model, bit for bit), CLOSE (after a loss of precision), or the start of an
error.
"""

import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import tiny_folder

from everydream_kit.export.single_file_export import export_checkpoint

SAME, CLOSE = "same", "close"
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."


@dataclass(frozen=True)
class Odd:
    """A file to be: its tensors and metadata by our export's names, its name, and what lies next to it."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    name: str = "model.safetensors"
    next_to_it: dict[str, dict[str, torch.Tensor]] | None = None
    is_nested: bool = True
    written_as: str = ""  # the suffix of the kind that the file is, where its name says another


@cache
def _exported(family):
    path = export_checkpoint(tiny_folder(family), tiny_folder(family).parent / f"{family}-plain.safetensors", "fp32")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118


def exported(family):
    tensors, metadata = _exported(family)
    return Odd(dict(tensors), metadata)


def only(odd, *prefixes):
    return replace(odd, tensors={name: value for name, value in odd.tensors.items() if name.startswith(prefixes)})


def without(odd, *prefixes):
    return replace(odd, tensors={name: value for name, value in odd.tensors.items() if not name.startswith(prefixes)})


def with_more(odd, **more: Any):
    return replace(odd, tensors={**odd.tensors, **more.pop("tensors", {})}, **more)


def renamed(odd, pattern, by):
    return replace(odd, tensors={re.sub(pattern, by, name): value for name, value in odd.tensors.items()})


def named(odd, name):
    return replace(odd, name=name)


def misnamed(odd, name, written_as):
    """A file of one kind under the name of another."""
    return replace(odd, name=name, written_as=written_as)


def attention_named(odd, names, *, is_matrix):
    """The VAE's attention by other names, as a matrix or a 1 x 1 convolution."""
    changed = {}
    for name, value in odd.tensors.items():
        found = re.match(r"(first_stage_model\..*mid\.attn_1\.)(q|k|v|proj_out)\.(weight|bias)$", name)
        if found is None:
            changed[name] = value
            continue
        new = f"{found[1]}{names[found[2]]}.{found[3]}"
        changed[new] = value.flatten(1).clone() if is_matrix and value.dim() == 4 else value
    return replace(odd, tensors=changed)


NEW = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}
PLAIN = {name: name for name in NEW}


def everydream2(family):
    """EveryDream 2's own script: new names, matrices; SD 2 without what diffusers dropped."""
    odd = attention_named(exported(family), NEW, is_matrix=True)
    return converters_sd2(odd) if family == "sd2" else odd


def converters_sd2(odd):
    last = max(int(n.split(".")[4]) for n in odd.tensors if n.startswith(f"{TEXT}model.transformer.resblocks."))
    return without(
        odd, f"{TEXT}model.transformer.resblocks.{last}.", f"{TEXT}model.text_projection", f"{TEXT}model.logit_scale"
    )


def with_leftovers(family):
    """What training leaves in a file and nobody needs to draw."""
    odd = exported(family)
    text = f"{TEXT}transformer." if family == "sd1" else "conditioner.embedders.0.transformer."
    first = odd.tensors[UNET + "input_blocks.0.0.weight"]
    leftovers = {
        f"{VAE}loss.discriminator.main.0.weight": torch.randn(2, 3, 4, 4),
        f"{VAE}loss.logvar": torch.zeros(()),
        f"{VAE}model_ema.decay": torch.tensor(0.9),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.diffusion_modelinput_blocks00weight": first.clone(),
        "betas": torch.linspace(0.001, 0.01, 1000),
        "alphas_cumprod": torch.linspace(1, 0, 1000),
        "denoiser.sigmas": torch.linspace(0, 14, 1000),
        f"{text}text_projection.weight": torch.randn(32, 32),
        f"{text}logit_scale": torch.tensor(4.6),
        f"{text}text_model.embeddings.position_ids": torch.arange(77)[None].half(),
        "scale_factor": torch.tensor(0.18215),
        "global_step": torch.tensor(7),
    }
    return with_more(odd, tensors=leftovers)


def scaled_fp8(family):
    """ComfyUI's scaled fp8: each matrix of the UNet in e4m3 with a scale."""
    odd, changed = exported(family), {}
    for name, value in odd.tensors.items():
        if name.startswith(UNET) and name.endswith(".weight") and value.dim() == 2:
            scale = value.abs().max() / 448
            changed[name] = (value / scale).to(torch.float8_e4m3fn)
            changed[name.removesuffix("weight") + "scale_weight"] = scale.reshape(1)
            changed[name.removesuffix("weight") + "scale_input"] = torch.ones(1)
        else:
            changed[name] = value
    changed[UNET + "scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    return replace(odd, tensors=changed)


def vae_next_to_it(prefix, suffix):
    odd = exported("sd1")
    own = {prefix + name.removeprefix(VAE): v for name, v in only(odd, VAE).tensors.items()}
    return with_more(without(odd, VAE), next_to_it={f"model.vae{suffix}": own})


def cast(odd, dtype):
    return replace(odd, tensors={name: v.to(dtype) if v.is_floating_point() else v for name, v in odd.tensors.items()})


def reshaped(odd, pattern, shape):
    """Some tensors in another shape of the same numbers."""
    return replace(
        odd,
        tensors={n: v.reshape(shape(v)).clone() if re.search(pattern, n) else v for n, v in odd.tensors.items()},
    )


def inpainting():
    odd = exported("sd1")
    name = UNET + "input_blocks.0.0.weight"
    return with_more(odd, tensors={name: torch.randn(32, 9, 3, 3)})


def bare(*names):
    return Odd({name: torch.zeros(2, 2) for name in names}, {})


LEFT = {"global_step": torch.tensor(7)}
"""Outside of what a wrapper holds."""

LAYOUTS = {
    # made by, expected outcome
    "everydream2 sd1": (lambda: everydream2("sd1"), SAME),
    "everydream2 sd1 ckpt": (lambda: named(everydream2("sd1"), "last.ckpt"), SAME),
    "everydream2 sd2": (lambda: everydream2("sd2"), SAME),
    "everydream2 sdxl": (lambda: everydream2("sdxl"), SAME),
    "diffusers script, vae convolutions": (lambda: attention_named(exported("sd1"), NEW, is_matrix=False), SAME),
    "diffusers before 0.15, vae names": (lambda: attention_named(exported("sd1"), OLD, is_matrix=True), SAME),
    "published names, vae matrices": (lambda: attention_named(exported("sd2"), PLAIN, is_matrix=True), SAME),
    "sd2 without the 24th block": (lambda: converters_sd2(exported("sd2")), SAME),
    "sd1 with what training left": (lambda: with_leftovers("sd1"), SAME),
    "sdxl with what training left": (lambda: with_leftovers("sdxl"), SAME),
    "sd1 of NovelAI, text without text_model": (
        lambda: renamed(exported("sd1"), r"^(cond_stage_model\.transformer\.)text_model\.", r"\1"),
        SAME,
    ),
    "upper case name": (lambda: named(exported("sd1"), "MODEL.SAFETENSORS"), SAME),
    "sft": (lambda: named(exported("sdxl"), "model.sft"), SAME),
    "ckpt with a state_dict": (lambda: named(exported("sd1"), "model.ckpt"), SAME),
    "upper case ckpt": (lambda: named(exported("sd1"), "MODEL.CKPT"), SAME),
    "ckpt without a state_dict": (lambda: replace(named(exported("sd1"), "model.pt"), is_nested=False), "do not fit"),
    "safetensors named .ckpt": (lambda: misnamed(exported("sd1"), "model.ckpt", ".safetensors"), SAME),
    "ckpt named .safetensors": (lambda: misnamed(exported("sd1"), "model.safetensors", ".ckpt"), SAME),
    "a wrapper's module.": (lambda: renamed(exported("sd2"), "^", "module."), SAME),
    "a wrapper's model.": (lambda: with_more(renamed(exported("sdxl"), "^", "model."), tensors=LEFT), SAME),
    "a wrapper's state_dict. in a ckpt": (
        lambda: named(renamed(exported("sd1"), "^", "state_dict."), "model.ckpt"),
        SAME,
    ),
    "half precision": (lambda: cast(exported("sd1"), torch.float16), CLOSE),
    "bfloat16": (lambda: cast(exported("sdxl"), torch.bfloat16), CLOSE),
    "scaled fp8": (lambda: scaled_fp8("sdxl"), CLOSE),
    "no VAE, one next to it": (lambda: vae_next_to_it("", ".safetensors"), SAME),
    "no VAE, one next to it with its prefix": (lambda: vae_next_to_it(VAE, ".pt"), SAME),
    "sd2 projections as convolutions": (
        lambda: reshaped(exported("sd2"), r"proj_(in|out)\.weight$", lambda v: (*v.shape[:2], 1, 1)),
        SAME,
    ),
    "sd1 projections as matrices": (
        lambda: reshaped(exported("sd1"), r"\.1\.proj_(in|out)\.weight$", lambda v: v.shape[:2]),
        SAME,
    ),
    "no VAE": (lambda: without(exported("sd1"), VAE), r"holds no VAE.*model\.vae\.safetensors"),
    "a UNet in a checkpoint's names": (lambda: only(exported("sd1"), UNET), "a UNet alone"),
    "no text encoder": (
        lambda: without(exported("sd1"), TEXT),
        "holds a UNet and a VAE, but no text encoder. Take the full checkpoint",
    ),
    "no UNet": (lambda: without(exported("sd1"), UNET), "holds a VAE and a text encoder, but no UNet"),
    "a text encoder of no family": (
        lambda: renamed(exported("sd1"), r"^cond_stage_model\.transformer", "cond_stage_model.roberta"),
        "text encoder is of none of the families sd1",
    ),
    "a UNet": (lambda: renamed(only(exported("sd1"), UNET), re.escape(UNET), ""), "a UNet alone"),
    "a VAE": (
        lambda: renamed(only(exported("sd1"), VAE), re.escape(VAE), ""),
        "a VAE alone, with no UNet and no text encoder",
    ),
    "a VAE of diffusers": (
        lambda: bare("encoder.down_blocks.0.resnets.0.conv1.weight"),
        "a VAE alone, with no UNet and no text encoder",
    ),
    "a text encoder": (lambda: bare("text_model.encoder.layers.0.mlp.fc1.weight"), "a text encoder alone"),
    "a UNet of diffusers": (lambda: bare("down_blocks.0.resnets.0.conv1.weight"), "one part of a diffusers model"),
    "unknown weights in the UNet": (
        lambda: with_more(exported("sd1"), tensors={UNET + "banana.weight": torch.zeros(2)}),
        r"1 unknown, such as banana\.weight",
    ),
    "missing weights": (lambda: without(exported("sd1"), UNET + "middle_block.0."), r"missing, such as mid_block"),
    "inpainting": (inpainting, "an inpainting model"),
    "refiner": (
        lambda: with_more(exported("sdxl"), tensors={"conditioner.embedders.0.model.ln_final.weight": torch.zeros(2)}),
        "an SDXL refiner",
    ),
    "Flux": (lambda: bare("double_blocks.0.img_attn.qkv.weight"), "SD 3, Flux or later"),
    "Z-Image": (lambda: bare("model.diffusion_model.layers.0.attention.qkv.weight"), "SD 3, Flux or later"),
    "a ControlNet": (lambda: bare("control_model.input_blocks.0.0.weight"), "a ControlNet"),
    "a LoRA": (lambda: bare("lora_unet_mid.lora_down.weight"), "a LoRA, not a model"),
    "a LoHa": (lambda: bare("lora_unet_mid.hada_w1_a"), "a LoRA, not a model"),
    "a LoRA of diffusers in 2024": (lambda: bare("unet.down_blocks.0.to_q.lora.down.weight"), "a LoRA, not a model"),
    "a LoRA of SimpleTuner": (lambda: bare("lycoris_down_blocks_0.lokr_w1"), "a LoRA, not a model"),
    "an embedding": (lambda: bare("emb_params"), "a textual-inversion embedding"),
}


def write_checkpoint(name, folder):
    """Write a layout's file, with what lies next to it. Returns its path."""
    odd = LAYOUTS[name][0]()
    path = Path(folder) / odd.name
    written = path.with_suffix(odd.written_as) if odd.written_as else path
    _write(written, odd.tensors, odd.metadata, is_nested=odd.is_nested)
    written.replace(path)
    for near, tensors in (odd.next_to_it or {}).items():
        _write(Path(folder) / near, tensors, {}, is_nested=True)
    return path


def _write(path, tensors, metadata, *, is_nested):
    own = {name: value.clone().contiguous() for name, value in tensors.items()}
    if path.suffix.lower() in (".safetensors", ".sft"):
        save_file(own, path, metadata)
    else:
        torch.save({"state_dict": own, "metadata": metadata} if is_nested else own, path)
