"""Fresh models with random weights: for training from scratch, for tests, and for measuring without a download.

`build_model` takes the family's shipped configs and changes the given keys; `build_tiny_model` is the smallest thing
that has every part of the real one, and trains in seconds on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from everydream_kit.draws import derive_seed
from everydream_kit.models.components import build_component
from everydream_kit.models.families import family_by_name
from everydream_kit.models.family import Model, ModelFiles, configs_folder
from everydream_kit.models.loading import model_of
from everydream_kit.models.model_files import predicted_by, read_json
from everydream_kit.models.model_saving import save_model

_TINY_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "projection_dim": 32,
}
_TINY_UNET = {
    "block_out_channels": [32, 32, 64, 64],
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
    "sample_size": 8,
}
_TINY_SDXL_UNET = {
    **_TINY_UNET,
    "block_out_channels": [32, 32, 64],
    "attention_head_dim": [2, 2, 4],
    "cross_attention_dim": 80,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 96,  # 6 sizes x 8 + the pooled text's 48
    "transformer_layers_per_block": [1, 1, 2],
}
_TINY_VAE = {"block_out_channels": [16, 16, 32, 32], "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 64}
_TINY_QWEN = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
    **{"num_hidden_layers": 3, "vocab_size": 261},  # bytes, and five special tokens
    **{"bos_token_id": 256, "eos_token_id": 258, "pad_token_id": 256},
}
_TINY_FRAME_VAE = {"base_dim": 8, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
_TINY_QWEN25_VL = {
    **{**_TINY_QWEN, "rope_scaling": {"mrope_section": [4, 2, 2], "rope_type": "default"}},
    "vision_config": {
        **{"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32},
        **{"patch_size": 4, "window_size": 8, "fullatt_block_indexes": [0]},
    },
}
_TINY_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 2, "num_layers": 2, "vocab_size": 98}
_TINY_QWEN_VL = {
    "text_config": {
        **_TINY_QWEN,
        **{"hidden_size": 16, "head_dim": 8, "num_hidden_layers": 36, "intermediate_size": 32},  # 35 are read
        "rope_parameters": {"rope_theta": 5_000_000, "mrope_section": [2, 1, 1], "mrope_interleaved": True},
    },
    "vision_config": {
        **{"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
        **{"num_position_embeddings": 16, "patch_size": 4, "deepstack_visual_indexes": [0]},
    },
}
_TINY: dict[str, dict[str, Any]] = {
    "sd1": {"denoiser": _TINY_UNET, "text_encoders": [_TINY_TEXT]},
    "sd2": {
        "denoiser": {**_TINY_UNET, "attention_head_dim": [2, 2, 4, 4]},
        "text_encoders": [_TINY_TEXT],
        "prediction_type": "v_prediction",
    },
    "sdxl": {
        "denoiser": _TINY_SDXL_UNET,
        "text_encoders": [_TINY_TEXT, {**_TINY_TEXT, "hidden_size": 48, "projection_dim": 48}],
    },
    "z_image": {
        "denoiser": {
            **{"dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32},
            **{"axes_dims": [4, 6, 6], "axes_lens": [256, 64, 64]},
        },
        "text_encoders": [_TINY_QWEN],
    },
    "flux2_klein": {
        "denoiser": {
            **{"num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2},
            **{"joint_attention_dim": 48, "axes_dims_rope": [4, 4, 4, 4], "timestep_guidance_channels": 32},
        },
        "text_encoders": [{**_TINY_QWEN, "hidden_size": 16, "head_dim": 8, "num_hidden_layers": 28}],  # 27 are read
    },
    "flux1": {
        "denoiser": {
            **{"num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2},
            **{"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": [4, 6, 6]},
        },
        "text_encoders": [_TINY_TEXT, _TINY_T5],
    },
    "anima": {
        "denoiser": {
            **{"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "text_embed_dim": 32},
            **{"mlp_ratio": 2.0, "adaln_lora_dim": 8, "max_size": [4, 64, 64]},
        },
        "vae": _TINY_FRAME_VAE,
        "text_encoders": [
            _TINY_QWEN,
            {
                **{"source_dim": 32, "target_dim": 32, "model_dim": 32, "num_layers": 2, "num_attention_heads": 2},
                **{"target_vocab_size": 98, "min_sequence_length": 64},  # printable ASCII, and four more
            },
        ],
    },
    "krea2": {
        "denoiser": {
            **{"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1},
            **{"intermediate_size": 64, "timestep_embed_dim": 32, "text_hidden_dim": 16, "axes_dims_rope": [4, 6, 6]},
            **{"text_num_attention_heads": 2, "text_num_key_value_heads": 2, "text_intermediate_size": 32},
            **{"num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1},
        },
        "vae": _TINY_FRAME_VAE,
        "text_encoders": [_TINY_QWEN_VL],
    },
    "qwen_image": {
        "denoiser": {
            **{"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32},
            "axes_dims_rope": [4, 6, 6],
        },
        "vae": _TINY_FRAME_VAE,
        "text_encoders": [_TINY_QWEN25_VL],
    },
}


def build_model(
    family: str,
    *,
    denoiser: Mapping[str, Any] | None = None,
    vae: Mapping[str, Any] | None = None,
    text_encoders: Sequence[Mapping[str, Any]] | None = None,
    scheduler: Mapping[str, Any] | None = None,
    prediction_type: str | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Model:
    """Build a model with random weights, each layer initialised as its library does by default.

    Args:
        denoiser, vae, scheduler: changes to the family's shipped config.
        text_encoders: changes to each text encoder's.
        prediction_type: by default what the shipped scheduler says.
        seed: of the weights. The same seed gives the same weights on the same version of torch.
        device: "meta" for names and shapes without memory.

    Raises:
        ModelError: unknown family, or a config that cannot be built.
    """
    table = family_by_name(family)
    folder = configs_folder(table)
    texts = text_encoders or [{}] * len(table.text_encoders)
    changes = {table.denoiser.folder: denoiser or {}, table.vae.folder: vae or {}}
    changes |= {slot.folder: change for slot, change in zip(table.text_encoders, texts, strict=True)}
    scheduler_config = {**read_json(folder / "scheduler" / "scheduler_config.json"), **(scheduler or {})}
    prediction_type = predicted_by(table, scheduler_config, str(folder), prediction_type)
    if table.objective == "diffusion":
        scheduler_config["prediction_type"] = prediction_type
    zero_terminal_snr = bool(scheduler_config.get("rescale_betas_zero_snr"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights", family))
        modules = {
            one.folder: build_component(
                one, {**read_json(folder / one.folder / "config.json"), **changes[one.folder]}, device
            )
            for one in table.components
        }
    files = ModelFiles(
        family=table,
        source=f"random weights ({family}, seed {seed})",
        configs={},
        tensors={},
        tokenizers={slot.tokenizer_folder: None for slot in table.text_encoders},
        scheduler_config=scheduler_config,
        prediction_type=prediction_type,
        zero_terminal_snr=zero_terminal_snr,
    )
    return model_of(files, {name: module.eval() for name, module in modules.items()})


def build_tiny_model(family: str, seed: int = 0, denoiser: Mapping[str, Any] | None = None) -> Model:
    """The smallest model of a family that has every part: about 2 M weights, 64-pixel images, the real vocabulary.

    SD 2 comes with v-prediction, the other diffusion models with epsilon.

    Args:
        denoiser: changes to its config.
    """
    tiny = _TINY[family_by_name(family).name]
    changed = {**tiny, "denoiser": {**tiny["denoiser"], **(denoiser or {})}}
    model = build_model(family, **{"vae": _TINY_VAE, "seed": seed, **changed})
    generator = torch.Generator().manual_seed(derive_seed(seed, "statistics", family))
    for module in model.vae.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # whose 0 and 1 would hide that they are used
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0.0, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model


def write_model(model: Model, folder: str | Path) -> Path:
    """Save a model as a diffusers folder and return the folder: `write_model(build_tiny_model("sd1"), path)`."""
    save_model(model, folder)
    return Path(folder)
