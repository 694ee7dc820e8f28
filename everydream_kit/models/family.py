"""What a model family is, a table of facts and functions; and `Model`, one of a family in memory.

The training loop, the sampler, the caches and the converters know families only through `Family`; there is no `if sdxl`
outside a family's own file. A new family is one new file (see `families/sd1.py`) and one line in `families/__init__.py`;
`docs/architecture.md` says how.

A family is a record of functions, not a class to derive from: two families share a function by naming it both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from everydream_kit.config import facts
from everydream_kit.errors import ConfigError
from everydream_kit.models.conditioning import Conditioning as Conditioning  # noqa: PLC0414 - known from here
from everydream_kit.models.conditioning import join_conditioning as join_conditioning  # noqa: PLC0414
from everydream_kit.models.flow import mu_of
from everydream_kit.models.tensors import Tensors, widest

if TYPE_CHECKING:
    from diffusers import DDPMScheduler
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    from everydream_kit.models.block_swap import BlockSwap
    from everydream_kit.models.lora.adapter_settings import LoraSettings
    from everydream_kit.models.tokenizer import Vocabulary

Config = Mapping[str, Any]
"""A component's `config.json`."""
Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name -> shape: what a file's header says before any weight is read."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Where each image of a batch comes from, for families that condition on it. All in pixels.

    Attributes:
        original_sizes: (width, height) of each file.
        crop_top_lefts: (left, top) cut away from each, at the target's scale.
        target_size: (width, height) of the batch.
        numbers: what `Family.size_numbers` makes of all, already on the device.
    """

    original_sizes: Sequence[tuple[int, int]]
    crop_top_lefts: Sequence[tuple[int, int]]
    target_size: tuple[int, int]
    numbers: torch.Tensor | None = None

    @classmethod
    def uncropped(cls, width: int, height: int, batch_size: int) -> Sizes:
        """Sizes that ask for a whole, sharp image: what sampling uses."""
        return cls([(width, height)] * batch_size, [(0, 0)] * batch_size, (width, height))


CLIP_UNUSED = ("text_projection", "logit_scale", "visual_projection.", "vision_model.", "text_model.text_projection.")
"""What CLIP files hold that Stable Diffusion's text encoder without projection does not use."""


@dataclass(frozen=True, slots=True)
class TextEncoderSlot:
    """One text encoder of a family.

    Attributes:
        folder: its folder in the diffusers layout; the tokenizer's is `tokenizer_folder`.
        class_name: transformers' class.
        single_file_prefix: what its keys start with in a single file.
        single_file_layout: `hf`: transformers' own names; `openclip`: OpenCLIP's, with fused q, k, v.
        drops_last_block: the single file holds one more block than is used (SD 2.x).
        kohya_prefix: what its layers are called in a LoRA file for UIs; "" where no trainer makes LoRAs of it.
        trains, blocks, module, since: as `Component` has them.
        tokenizer_class: transformers' class, as `model_index.json` names it.
        index_class: the encoder's class there, where it is another one: a language model's head is not loaded.
    """

    folder: str
    tokenizer_folder: str
    class_name: str
    single_file_prefix: str = ""
    single_file_layout: Literal["hf", "openclip"] = "hf"
    kohya_prefix: str = ""
    drops_last_block: bool = False
    trains: frozenset[str] = frozenset({"full", "lora", "textual_inversion"})
    blocks: tuple[str, ...] = ("CLIPEncoderLayer",)
    module: str = "transformers.models.clip.modeling_clip"
    tokenizer_class: str = "CLIPTokenizer"
    index_class: str = ""
    since: str = ""

    @property
    def unused(self) -> tuple[str, ...]:
        """Starts of the names that CLIP files hold and this text encoder does not use."""
        return CLIP_UNUSED if self.class_name == "CLIPTextModel" else ("logit_scale",)


@dataclass(frozen=True, slots=True)
class Component:
    """One folder of a diffusers pipeline that holds weights.

    Attributes:
        folder: "unet", "transformer", "text_encoder_2", "vae".
        module: where its class is; the first word is the library, as `model_index.json` names it.
        role: what it is for.
        since: version of the library that has the class, for hosts with an older one.
        trains: training kinds that change it; for all others it is frozen.
        blocks: classes of its repeated blocks, which are compiled, divided among processes, kept one at a time
            and, while they are not used, in host memory.
    """

    folder: str
    module: str
    class_name: str
    role: Literal["denoiser", "text_encoder", "vae"]
    trains: frozenset[str] = frozenset()
    blocks: tuple[str, ...] = ()
    since: str = ""

    @property
    def library(self) -> str:
        """diffusers or transformers."""
        return self.module.partition(".")[0]


UNET = Component(
    "unet",
    "diffusers.models.unets.unet_2d_condition",
    "UNet2DConditionModel",
    "denoiser",
    frozenset({"full", "lora"}),
    ("BasicTransformerBlock", "ResnetBlock2D"),
)


KL_VAE = Component("vae", "diffusers.models.autoencoders.autoencoder_kl", "AutoencoderKL", "vae")


@dataclass(frozen=True, slots=True)
class PromptSettings:
    """How prompts are encoded, in addition to the family's own ways.

    Attributes:
        clip_skip: hidden layer of a CLIP text encoder, from its end.
        num_windows: windows of the text encoder that a prompt may fill (`Family.count_windows`).
    """

    clip_skip: int = 0
    num_windows: int = 1


@dataclass(frozen=True, slots=True)
class LatentSpace:
    """All that is known of the VAE.

    Attributes:
        stored_channels: of what is cached for each 8-pixel cell.
        shape: (model, width, height in pixels) -> (channels, h, w) of the latents that the denoiser works on.
        encode: (model, pixels (B, 3, H, W) uint8) -> what the cache keeps (B, stored_channels, H/8, W/8), float32.
        latents: (model, what is stored, noise of the latents' shape) -> latents as the denoiser knows them, float32.
        decode: (model, latents) -> pixels (B, 3, H, W) uint8 on the CPU.
    """

    stored_channels: int
    shape: Callable[[Model, int, int], tuple[int, int, int]]
    encode: Callable[[Model, torch.Tensor], torch.Tensor]
    latents: Callable[[Model, torch.Tensor, torch.Tensor], torch.Tensor]
    decode: Callable[[Model, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class SamplerSpec:
    """How images are sampled with a family.

    Attributes:
        kind: `diffusion`: any scheduler over the model's own betas; `flow`: Euler over shifted sigmas.
        guidance: `cfg`: two predictions; `embedded`: the scale is an input of the denoiser; `none`: distilled away.
        size_multiple: sides in pixels must be multiples of it.
        num_steps: usual number of denoising steps.
        cfgs: guidance scales that samples of training have next to each other; the first is the usual one.
        few_steps: usual number of denoising steps of the family's distilled models, which need no guidance.
        mu: (scheduler's config, width, height, steps) -> logarithm of the shift in sampling, for schedulers whose shift
            follows the image's size.
        after_guidance: (guided prediction, the caption's own) -> what is used of them.
    """

    kind: Literal["diffusion", "flow"] = "diffusion"
    guidance: Literal["cfg", "embedded", "none"] = "cfg"
    size_multiple: int = 8
    num_steps: int = 30
    cfgs: tuple[float, ...] = (7.0, 4.0, 1.01)
    few_steps: int = 8
    mu: Callable[[Mapping[str, Any], int, int, int], float] = mu_of
    after_guidance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda guided, conditional: guided


def _same_layers(names: Sequence[str]) -> dict[str, list[str]]:
    return {}


@dataclass(frozen=True, slots=True)
class Layout:
    """How a family's weights are named outside diffusers folders.

    Attributes:
        to_single_file: a model's weights by the names of the file that image apps load.
        from_single_file: (tensors, family, configs) -> weights by component and diffusers' names.
        lora_for_apps: the LoRA layout that image apps read: kohya's, diffusers' own, or ComfyUI's, which names the single
            file's layers (`app_layers`).
        lora_stem: (layer, the denoiser's config) -> its name in kohya's layout, behind `lora_unet_`.
        renames: the denoiser's config -> pairs of diffusers' and the single file's prefixes, for reading LoRA files.
        app_layers: the denoiser's layers -> layers of the single file, each with those that it is made of, in order.
        shares_of: a layer of the single file -> shares of its rows that its parts have; () for equal ones.
        swapped_layers: layers of the single file whose two halves stand the other way round.
        holds_all: the single file is the whole model; else it is the denoiser, and the rest is in the folder around it.
        also_holds: folders of components that such a file holds next to the denoiser.
    """

    to_single_file: Callable[[ModelFiles], Tensors]
    from_single_file: Callable[[Tensors, Family, dict[str, Config]], dict[str, Tensors]]
    lora_for_apps: Literal["kohya", "diffusers", "comfy"] = "kohya"
    lora_stem: Callable[[str, Config], str] = lambda name, config: name.replace(".", "_")
    renames: Callable[[Config], list[tuple[str, str]]] = lambda config: []
    app_layers: Callable[[Sequence[str]], dict[str, list[str]]] = _same_layers
    shares_of: Callable[[str], tuple[int, ...]] = lambda layer: ()
    swapped_layers: tuple[str, ...] = ()
    holds_all: bool = True
    also_holds: tuple[str, ...] = ()

    @property
    def has_app_layers(self) -> bool:
        """Whether the single file has layers of its own, so that a LoRA can be written by their names."""
        return self.app_layers is not _same_layers


EncodePrompt = Callable[["Model", Sequence[str], PromptSettings], Conditioning]
"""(model, prompts, settings) -> Conditioning: template, tokenizer, layers and masks."""
Predict = Callable[["Model", torch.Tensor, torch.Tensor, Conditioning, Sizes], torch.Tensor]
"""(model, noisy latents (B, C, h, w), timesteps (B,), conditioning, sizes) -> the denoiser's prediction, (B, C, h, w) float32.
Packing, position ids and the output's sign are inside."""


def _no_shift(scheduler_config: Mapping[str, Any], width: int, height: int) -> float:
    return 1.0


@dataclass(frozen=True)
class Family:
    """Everything that differs between model families.

    Attributes:
        name: key in `FAMILIES`, and the name of the folder of shipped configs.
        title: for messages and model cards.
        pipeline_class: diffusers' pipeline, written into `model_index.json`; a modular one has an index of its own, too
            (`model_files.MODULAR_INDEX`).
        text_encoders: in the order of `Model.text_encoders`.
        encode_prompt, predict, latent_space, layout, sampler: see their types.
        modelspec_architecture: as single-file metadata names it (stability.ai's modelspec).
        kohya_base: as kohya-style LoRA metadata names it (`ss_base_model_version`).
        matches_configs: whether the configs ("unet", "text_encoder", ...) of a diffusers folder with this denoiser are of
            this family.
        matches_keys: whether the names and shapes in a denoiser's file, without a prefix, are of this family; complete
            checkpoints are recognized by their text encoder's prefix.
        resolution: side in pixels that the family was trained at, given the prediction type.
        denoiser, vae: the components of these roles.
        objective: what it learns, by name (`training.objectives.OBJECTIVES`).
        count_windows: (model, texts) -> windows of the text encoder that the longest of them fills.
        shift: (scheduler's config, width, height in pixels) -> factor by which flow matching moves its noise levels upward;
            1 for diffusion.
        lora_targets: names or regular expressions of the layers that a LoRA adapts by default.
        index: what else `model_index.json` holds.
        legacy_config: content of the `.yaml` that old UIs require next to a single file, given the prediction type, or None.
        zeros_for_empty: its denoiser was trained with zeros in place of a dropped caption's embeddings, not with the encoded
            empty text.
        distilled: a model's name -> why it should not be trained on, or None.
        prompt_version: what encoded captions depend on, apart from the text encoders' weights: template and layers.
        caption_tokens: tokens of a caption, template and marks excluded, that the last text encoder reads; its tokenizer
            counts them.
        size_numbers: (sizes, B) -> (B, n) float32 on the host: the denoiser's condition on sizes; None: it has none.
    """

    name: str
    title: str
    pipeline_class: str
    text_encoders: tuple[TextEncoderSlot, ...]
    encode_prompt: EncodePrompt
    predict: Predict
    latent_space: LatentSpace
    layout: Layout
    modelspec_architecture: str
    kohya_base: str
    matches_configs: Callable[[Mapping[str, Config]], bool] = lambda configs: True
    matches_keys: Callable[[Shapes], bool] = lambda shapes: False
    resolution: Callable[[str], int] = lambda prediction_type: 1024
    denoiser: Component = UNET
    vae: Component = KL_VAE
    objective: Literal["diffusion", "flow"] = "diffusion"
    sampler: SamplerSpec = SamplerSpec()
    count_windows: Callable[[Model, Sequence[str]], int] = lambda model, texts: 1
    shift: Callable[[Mapping[str, Any], int, int], float] = _no_shift
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    index: Mapping[str, Any] = field(default_factory=dict)
    legacy_config: Callable[[str], dict[str, Any] | None] = lambda prediction_type: None
    zeros_for_empty: bool = False
    distilled: Callable[[str], str | None] = lambda source: None
    prompt_version: str = ""
    caption_tokens: int = 75
    size_numbers: Callable[[Sizes, int], torch.Tensor] | None = None
    not_captured: str = ""

    @property
    def components(self) -> tuple[Component, ...]:
        """All of them: denoiser, VAE, text encoders."""
        texts = (
            Component(slot.folder, slot.module, slot.class_name, "text_encoder", slot.trains, slot.blocks, slot.since)
            for slot in self.text_encoders
        )
        return (self.denoiser, self.vae, *texts)

    @property
    def refuses(self) -> dict[str, str]:
        """Settings that have no meaning for it -> why, as their declarations say."""
        return {name: one.refusal for name, one in facts().items() if one.refusal and self.name not in one.families}

    def sampler_of(self, source: str) -> SamplerSpec:
        """What is usual for a model: few steps without guidance where its name says that it is distilled."""
        if self.distilled(source) is None:
            return self.sampler
        return replace(self.sampler, num_steps=self.sampler.few_steps, cfgs=(1.0,))

    def component(self, folder: str) -> Component:
        """The component of this folder."""
        return next(component for component in self.components if component.folder == folder)


def has_large_texts(family: Family) -> bool:
    """Whether its text encoders are language models, which are never trained and too large to stay on the device."""
    return not any(slot.trains for slot in family.text_encoders)


def configs_folder(family: Family) -> Path:
    """The shipped config files of a family, laid out as a diffusers folder without weights."""
    return Path(str(files("everydream_kit") / "models" / "configs" / family.name))


def text_tower(text_encoder: torch.nn.Module) -> Any:
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
        denoiser: the network that is trained to denoise: a UNet or a transformer.
        text_encoders, tokenizers: in the family's order.
        noise_scheduler: the training schedule, made from the model's own betas. Not what is saved.
        scheduler_config: the model's own sampler (class name and settings) as found; saved back unchanged.
        prediction_type: `epsilon`, `v_prediction`, `sample` or, for flow matching, `flow_prediction`.
        source: where it came from, for messages and model cards.
        origin: how to load it again, from any folder: `load_model`'s arguments.
        fingerprint: what its weights were known by when they were loaded; None where they were not.
        lora: the settings of its LoRA adapter (`lora.py`), if it has one.
        new_tokens: learned tokens (`tokens.py`): name -> the names of its vectors in the tokenizers.
        block_swap: brings the denoiser's blocks that wait in host memory, if any do.
    """

    family: Family
    denoiser: torch.nn.Module
    vae: torch.nn.Module
    text_encoders: list[torch.nn.Module]
    tokenizers: list[CLIPTokenizer]  # or another class, as the family's slots say
    noise_scheduler: DDPMScheduler
    scheduler_config: dict[str, Any]
    prediction_type: str
    zero_terminal_snr: bool
    source: str
    origin: dict[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None
    lora: LoraSettings | None = None
    new_tokens: dict[str, list[str]] = field(default_factory=dict)
    block_swap: BlockSwap | None = None

    def modules(self) -> dict[str, torch.nn.Module]:
        """Every module by the name of its folder."""
        texts = {
            slot.folder: module for slot, module in zip(self.family.text_encoders, self.text_encoders, strict=True)
        }
        return {self.family.denoiser.folder: self.denoiser, self.family.vae.folder: self.vae, **texts}

    @property
    def unet(self) -> torch.nn.Module:
        """The denoiser, as plug-ins and families with a UNet know it."""
        return self.denoiser

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent cell."""
        config: Any = self.vae.config
        stages = config["dim_mult"] if "dim_mult" in config else config["block_out_channels"]
        return int(2 ** (len(stages) - 1))


@dataclass
class ModelFiles:
    """A model's parts, by the names of their folders in the diffusers layout.

    Attributes:
        configs: "unet", "vae", "text_encoder", ... -> its `config.json`.
        tensors: the same names -> weights by diffusers' names.
        tokenizers: "tokenizer", ... -> its folder, a vocabulary of its own, or None for the shipped one.
        scheduler_config: the model's own sampler, as found.
        extra_embeddings: folder of learned tokens, if the model carries any.
    """

    family: Family
    source: str
    configs: dict[str, Config]
    tensors: dict[str, Tensors]
    tokenizers: dict[str, Path | Vocabulary | None]
    scheduler_config: dict[str, Any]
    prediction_type: str
    zero_terminal_snr: bool
    metadata: dict[str, str] = field(default_factory=dict)

    def num_elements(self) -> int:
        """How many numbers all weights hold together."""
        return sum(math.prod(tensor.shape) for part in self.tensors.values() for tensor in part.values())

    def stored_dtype(self, component: str) -> torch.dtype | None:
        """The format that holds all weights of a component as its file does; None where no weights were opened."""
        return widest([tensor.dtype for tensor in self.tensors.get(component, {}).values()])

    def num_bytes(self) -> int:
        """Size of all weights as they are stored."""
        lazy = [tensor for part in self.tensors.values() for tensor in part.values()]
        return sum(tensor.dtype.itemsize * math.prod(tensor.shape) for tensor in lazy)
