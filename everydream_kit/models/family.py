"""What a model family is, a table of facts and three functions; and `Model`, one of a family in memory.

The training loop, the sampler and the converters know families only through `Family`; there is no `if sdxl` outside
a family's own file. A new family is one new file (see `sd1.py`) and one line in `families.py`; `docs/models.md` says
how.

A family is a record of functions rather than a class to derive from: what two families share, they share by naming the
same function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from everydream_kit.errors import ConfigError

if TYPE_CHECKING:
    from diffusers import DDPMScheduler
    from transformers import CLIPTokenizer

    from everydream_kit.models.lora_settings import LoraSettings

Config = Mapping[str, Any]
"""A component's `config.json`."""
Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name -> shape: what a file's header tells before any weight is read."""


@dataclass(slots=True)
class Conditioning:
    """What conditions the UNet besides the caption.

    Attributes:
        encoder_hidden_states: (B, L, D), the text encoders' output; L is 77 times the number of chunks.
        pooled: (B, P), the pooled text embedding of families that use it.
    """

    encoder_hidden_states: torch.Tensor
    pooled: torch.Tensor | None = None

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        pooled = None if self.pooled is None else self.pooled.to(device=device, dtype=dtype)
        return Conditioning(self.encoder_hidden_states.to(device=device, dtype=dtype), pooled)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Where each image of a batch comes from, for families that condition on it. All in pixels.

    Attributes:
        original_sizes: (width, height) of each file.
        crop_top_lefts: (left, top) cut away from each, at the target's scale.
        target_size: (width, height) of the batch.
    """

    original_sizes: Sequence[tuple[int, int]]
    crop_top_lefts: Sequence[tuple[int, int]]
    target_size: tuple[int, int]

    @classmethod
    def uncropped(cls, width: int, height: int, batch_size: int) -> Sizes:
        """Sizes that request an uncropped, sharp image: used for sampling."""
        return cls([(width, height)] * batch_size, [(0, 0)] * batch_size, (width, height))


@dataclass(frozen=True, slots=True)
class TextEncoderSlot:
    """One text encoder of a family.

    Attributes:
        folder: its folder in the diffusers layout; the tokenizer's is `tokenizer_folder`.
        class_name: transformers' class.
        single_file_prefix: what its keys start with in a single file.
        single_file_layout: `hf`: transformers' own names; `openclip`: OpenCLIP's, with fused q, k, v.
        drops_last_block: the single file holds one more block than is used (SD 2.x).
        kohya_prefix: what its layers are called in a LoRA file for UIs.
    """

    folder: str
    tokenizer_folder: str
    class_name: Literal["CLIPTextModel", "CLIPTextModelWithProjection"]
    single_file_prefix: str
    single_file_layout: Literal["hf", "openclip"]
    kohya_prefix: str
    drops_last_block: bool = False


EncodeTokens = Callable[["Model", Sequence[torch.Tensor], int], Conditioning]
"""(model, token ids (B, 77) for each tokenizer, clip_skip) -> Conditioning."""
Predict = Callable[["Model", torch.Tensor, torch.Tensor, Conditioning, Sizes], torch.Tensor]
"""(model, noisy latents (B, 4, h, w), timesteps (B,), conditioning, sizes) -> the UNet's prediction, float32."""


@dataclass(frozen=True)
class Family:
    """Everything that differs between model families.

    Attributes:
        name: key in `FAMILIES`, and the name of the folder of shipped configs. title: for messages and model cards.
        pipeline_class: diffusers' pipeline, written into `model_index.json`. text_encoders: in the order of
        `Model.text_encoders`. encode_tokens, predict: see their types. matches_configs: whether a diffusers folder's
        configs ("unet", "text_encoder", ...) are of this family. matches_keys: whether a single file's names and
        shapes are of this family. modelspec_architecture: as single-file metadata names it (stability.ai's
        modelspec). kohya_base: as kohya-style LoRA metadata names it (`ss_base_model_version`). resolution: side in
        pixels that the family was trained at, given the prediction type. legacy_config: content of the `.yaml` that
        old UIs want next to a single file, given the prediction type, or None. zeros_for_empty: its UNet was trained
        with zeros in place of a dropped caption's embeddings, not with the encoded empty text.
    """

    name: str
    title: str
    pipeline_class: str
    text_encoders: tuple[TextEncoderSlot, ...]
    encode_tokens: EncodeTokens
    predict: Predict
    matches_configs: Callable[[Mapping[str, Config]], bool]
    matches_keys: Callable[[Shapes], bool]
    modelspec_architecture: str
    kohya_base: str
    resolution: Callable[[str], int]
    legacy_config: Callable[[str], dict[str, Any] | None] = lambda prediction_type: None
    zeros_for_empty: bool = False


def configs_folder(family: Family) -> Path:
    """The shipped config files of a family, laid out as a diffusers folder without weights."""
    return Path(str(files("everydream_kit") / "models" / "configs" / family.name))


def text_tower(text_encoder: torch.nn.Module) -> torch.nn.Module:
    """The module that holds `embeddings`, `encoder` and `final_layer_norm`.

    transformers 4, and every `...WithProjection`, keep it in `.text_model`; transformers 5 flattened `CLIPTextModel`.
    """
    return getattr(text_encoder, "text_model", text_encoder)


def run_text_encoder(text_encoder: torch.nn.Module, token_ids: torch.Tensor, from_end: int) -> tuple[Any, torch.Tensor]:
    """A text encoder's own output, and the hidden states (B, 77, D) that its layer `from_end` gives, before the final norm.

    The layer's output is caught by a hook and not asked for by `output_hidden_states`: transformers looks up what it may
    record by the name of the model's class, which FSDP changes.

    Args:
        token_ids: (B, 77) of int64.
        from_end: 1 is the last layer, 2 the penultimate; one more than there are layers is the embeddings.

    Raises:
        ConfigError: the encoder has fewer layers.
    """
    layers = text_tower(text_encoder).encoder.layers
    if from_end > len(layers) + 1:
        raise ConfigError(f"clip_skip: the text encoder has {len(layers)} layers; take at most {len(layers) + 1}.")
    caught: list[torch.Tensor] = []

    def catch(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)

    if from_end > len(layers):
        hook = layers[0].register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    else:
        hook = layers[-from_end].register_forward_hook(catch)
    try:
        output = text_encoder(token_ids)
    finally:
        hook.remove()
    return output, caught[0]


def parameter_dtype(module: torch.nn.Module) -> torch.dtype:
    """Format of a module's weights; works through DDP and compile wrappers, which have no `.dtype`."""
    return next(module.parameters()).dtype


def input_dtype(module: torch.nn.Module) -> torch.dtype:
    """Format of what goes into a module: its weights', or under autocast float32, which every layer casts for itself.

    One cast for all layers would also add up their gradients in half precision.
    """
    device = next(module.parameters()).device
    return torch.float32 if torch.is_autocast_enabled(device.type) else parameter_dtype(module)


@dataclass
class Model:
    """A model in memory.

    Attributes:
        family: what is particular about it; `model.family.predict(model, ...)`.
        text_encoders, tokenizers: in the family's order.
        noise_scheduler: the training schedule, made from the model's own betas. Not what is saved.
        scheduler_config: the model's own sampler (class name and settings) as found; saved back unchanged.
        prediction_type: `epsilon`, `v_prediction` or `sample`.
        source: where it came from, for messages and model cards.
        origin: how to load it again: `load_model`'s arguments.
        lora: the settings of its LoRA adapter (`lora.py`), if it has one.
        new_tokens: learnt tokens (`tokens.py`): name -> the names of its vectors in the tokenizers.
    """

    family: Family
    unet: torch.nn.Module
    vae: torch.nn.Module
    text_encoders: list[torch.nn.Module]
    tokenizers: list[CLIPTokenizer]
    noise_scheduler: DDPMScheduler
    scheduler_config: dict[str, Any]
    prediction_type: str
    zero_terminal_snr: bool
    source: str
    origin: dict[str, Any] = field(default_factory=dict)
    lora: LoraSettings | None = None
    new_tokens: dict[str, list[str]] = field(default_factory=dict)

    def modules(self) -> dict[str, torch.nn.Module]:
        """Every module by the name of its folder."""
        texts = {
            slot.folder: module for slot, module in zip(self.family.text_encoders, self.text_encoders, strict=True)
        }
        return {"unet": self.unet, "vae": self.vae, **texts}

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent cell."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)
