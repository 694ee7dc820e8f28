"""The model that a run starts from: found, loaded, and made ready to be trained.

Here it is decided which weights are trained (all, an adapter, new tokens) and which memory measures the modules take. How a
file becomes a model is in `models.loading`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everydream_kit.config import EMBEDDED_MODEL
from everydream_kit.errors import ConfigError
from everydream_kit.foreign import read_origin
from everydream_kit.models.adapters import AdapterBase, is_adapter_folder
from everydream_kit.models.block_swap import BlockSwap, waiting_blocks
from everydream_kit.models.family import Family, Model, has_large_texts
from everydream_kit.models.loading import load_model
from everydream_kit.models.number_formats import Formats
from everydream_kit.models.quantized import FORMS as QUANTIZED_FORMS
from everydream_kit.runs import Checkpoint, find_last_checkpoint
from everydream_kit.runs.run_folder import is_run
from everydream_kit.training.objectives import rescale_zero_terminal_snr
from everydream_kit.training.parameters import TrainedPart, select_parameters
from everydream_kit.training.parts import TEXT_ENCODER, UNET
from everydream_kit.training.precision import Precision, choose_precision

if TYPE_CHECKING:
    import torch

    from everydream_kit.config import TrainConfig
    from everydream_kit.training.journal import Journal
    from everydream_kit.training.ranks import Ranks

TILE_PIXELS = 512
"""Side of a tile. SD 1.5's own images go through as a whole."""


def load_base(
    config: TrainConfig, weights_from: Checkpoint | None, ranks: Ranks, adapter_base: AdapterBase | None = None
) -> Model:
    """Load the base model, or the weights of a run that is resumed, onto the device, each part in its format.

    Args:
        adapter_base: for a LoRA's or a learned word's checkpoint, the base to use in place of the one that it names.

    Raises:
        ModelError, CheckpointError: it is not there or cannot be used.
        ConfigError: zero terminal SNR is asked of an epsilon model.
    """
    precision = precision_of(config, ranks.device.type)
    model = load_model(
        weights_from.folder if weights_from is not None else find_base(config),
        dtype=choose_formats(config, precision),
        device="cpu" if shards(config, ranks) else ranks.device,
        revision=config.base_revision,
        subfolder=config.base_subfolder if weights_from is None else None,
        variant=config.base_variant if weights_from is None else None,
        family=config.family,
        prediction_type=config.prediction_type,
        vae=config.vae if weights_from is None else None,  # a checkpoint holds or names its own
        adapter_base=adapter_base or _own_base(config, weights_from),
        check=partial(refuse_what_does_not_fit, config, precision),
        large_texts_on="cpu",  # they come to the device for the captions, while the denoiser waits
        blocks_in_host_memory=config.blocks_to_swap,
    )
    if config.enable_zero_terminal_snr and not model.zero_terminal_snr:
        model.noise_scheduler = rescale_zero_terminal_snr(model.noise_scheduler, model.prediction_type)
        model.zero_terminal_snr = True
    return model


def refuse_what_does_not_fit(config: TrainConfig, precision: Precision, family: Family) -> None:
    """Before anything is loaded. Raises: ConfigError, as `refuse_settings` and `refuse_float16`."""
    refuse_settings(config, family)
    refuse_float16(config, family, precision)


def refuse_settings(config: TrainConfig, family: Family) -> None:
    """Name the settings that mean nothing for a family.

    Raises:
        ConfigError: all of them, with the reasons.
    """
    defaults = type(config).model_fields
    kinds = {kind for component in family.components for kind in component.trains}
    found = []
    if config.training_kind not in kinds:
        found.append(
            f"training_kind {config.training_kind}: {family.title} is trained with {' or '.join(sorted(kinds))}."
        )
    found += [
        f"{name}: {why} ({family.title}). Leave it out."
        for name, why in family.refuses.items()
        if name in defaults and getattr(config, name) != defaults[name].default
    ]
    if found:
        raise ConfigError("\n".join(found))


def refuse_float16(config: TrainConfig, family: Family, precision: Precision) -> None:
    """Raises: ConfigError: the family's activations exceed float16, which was asked for, or is all that this GPU has."""
    import torch

    if family.objective != "flow" or precision.dtype != torch.float16:
        return
    for name, value, others in (("amp_dtype", "fp16", "auto or bf16"), ("frozen_dtype", "float16", "auto or bfloat16")):
        if getattr(config, name) == value and (name == "amp_dtype" or precision.device_type != "cuda"):
            raise ConfigError(f"{name} {value}: activations of {family.title} exceed float16; set {name} to {others}.")
    raise ConfigError(
        f"amp_dtype: activations of {family.title} exceed float16, and GPUs from before 2020 (T4, V100) have no bfloat16. "
        "Take a GPU that has it, or set amp off."
    )


def trains_texts(family: Family) -> bool:
    """Whether any text encoder of a family may be trained as a whole."""
    return any("full" in slot.trains for slot in family.text_encoders)


def _own_base(config: TrainConfig, weights_from: Checkpoint | None) -> dict[str, str] | None:
    """The base that a person named for a fetched run; its adapter's file names the one of another machine."""
    if weights_from is None or not is_adapter_folder(weights_from.folder):
        return None
    if weights_from.run is None or read_origin(weights_from.run.folder) is None:
        return None
    named = {
        "source": str(find_base(config)),
        "revision": config.base_revision,
        "subfolder": config.base_subfolder,
        "variant": config.base_variant,
        "family": config.family,
        "prediction_type": config.prediction_type,
        "vae": config.vae,
    }
    return {name: value for name, value in named.items() if value is not None}


def precision_of(config: TrainConfig, device_type: str) -> Precision:
    """The formats that a run computes in. Raises: ConfigError, where they do not go together."""
    return choose_precision(device_type, config)


def choose_formats(config: TrainConfig, precision: Precision) -> Formats:
    """The format of each part of the model.

    Only whole components (UNet, text encoder) are frozen here: layers frozen within one that is trained keep its format.
    Where the model is divided among processes, everything has the trained weights' format.

    Raises:
        ConfigError: this machine lacks what a quantized base needs.
    """
    trains_unet = config.training_kind == "full" and not config.disable_unet_training
    trains_text = config.training_kind == "full" and not config.disable_textenc_training
    roles = ({"denoiser"} if trains_unet else set()) | ({"text_encoder"} if trains_text else set())
    return Formats(
        trained=precision.weight_dtype,
        frozen=None if config.parallel == "fsdp2" else precision.frozen_dtype,
        trained_roles=frozenset(roles),
        keeps_precision=config.training_kind == "full" and config.frozen_dtype == "auto",
        quantization=_quantized_form(config.quantization),
        text_quantization=_quantized_form(config.text_quantization),
    )


def _quantized_form(name: str) -> str | None:
    """A form that this machine has what is needed for."""
    if name == "none":
        return None
    QUANTIZED_FORMS[name].check()
    return name


def shards(config: TrainConfig, ranks: Ranks) -> bool:
    """Whether the model is divided among processes. It is loaded into host memory then, and goes to the devices in slices."""
    return config.parallel == "fsdp2" and ranks.num_ranks > 1


def find_base(config: TrainConfig) -> str | Path:
    """What `resume_ckpt` means: the embedded model, the project's latest checkpoint, or the value itself."""
    if config.resume_ckpt == EMBEDDED_MODEL:
        from everydream_kit.demo import base_model_path

        return base_model_path()
    if config.resume_ckpt == "findlast":
        return find_last_checkpoint(config.logdir, config.project_name)
    if is_run(Path(config.resume_ckpt)):
        raise ConfigError(
            f"resume_ckpt: {config.resume_ckpt} is a run folder. Continue the run with: everydream resume "
            f"{config.resume_ckpt}. Or start a new one from one of its checkpoints, in its folder ckpts."
        )
    return config.resume_ckpt


def select_trained(model: Model, config: TrainConfig, seed: int) -> list[TrainedPart]:
    """Choose what is trained, and freeze the rest: all weights, an adapter, or new tokens.

    A model that comes from such a run's checkpoint has its adapter or tokens already, and continues with them.

    Raises:
        ConfigError: the base is a LoRA's or learned word's checkpoint, and the settings ask for what that is not.
    """
    _refuse_another_adapter(model, config)
    if config.training_kind == "full":
        return select_parameters(
            model,
            train_unet=not config.disable_unet_training,
            train_text_encoder=trains_texts(model.family) and not config.disable_textenc_training,
            freezing=config,
            unet_patterns=config.unet_train_layers,
            unet_frozen_patterns=config.unet_freeze_layers,
        )
    if config.training_kind == "lora":
        import torch

        from everydream_kit.models.lora.injection import add_lora

        if model.lora is None:
            add_lora(
                model,
                config.lora_rank,
                alpha=config.lora_alpha,
                dropout=config.lora_dropout,
                targets=config.lora_targets,
                text_encoder=config.lora_text_encoder,
                dora=config.lora_dora,
                form=config.lora_form,
                seed=seed,
                dtype=torch.bfloat16 if config.weight_dtype == "bfloat16" else torch.float32,
            )
    elif missing := {name: words for name, words in (config.new_tokens or {}).items() if name not in model.new_tokens}:
        from everydream_kit.models.tokens import add_tokens

        add_tokens(model, missing)
    return parts_that_ask_for_gradients(model)


def _refuse_another_adapter(model: Model, config: TrainConfig) -> None:
    merging = f"merge it into its base first, and start from that: everydream export {model.source} merged.safetensors"
    if config.training_kind == "full" and (model.lora is not None or model.new_tokens):
        what, kind = ("a LoRA", "lora") if model.lora is not None else ("a learned word", "textual_inversion")
        raise ConfigError(
            f"training_kind full: {model.source} is {what}, whose checkpoints hold nothing else. Continue it with "
            f"training_kind {kind}" + (f", or {merging}" if model.lora is not None else ".")
        )
    if config.training_kind != "lora" or model.lora is None:
        return
    for setting, kept in model.lora.to_json().items():
        name = f"lora_{setting}"
        asked, own = getattr(config, name), list(kept) if isinstance(kept, tuple) else kept
        if name in config.model_fields_set and asked is not None and asked != own:
            raise ConfigError(
                f"{name}: the LoRA {model.source} was made with {own}, and {asked} was asked for. Leave it out to continue "
                f"this LoRA, or {merging}"
            )


def parts_that_ask_for_gradients(model: Model) -> list[TrainedPart]:
    """UNet and text encoders as parts, each with the parameters whose gradients are wanted."""
    parts = []
    for name, modules in ((UNET, [model.denoiser]), (TEXT_ENCODER, model.text_encoders)):
        named = [(key, p) for module in modules for key, p in module.named_parameters() if p.requires_grad]
        if named:
            parts.append(TrainedPart(name, list(modules), named))
    return parts


def prepare_modules(model: Model, config: TrainConfig, journal: Journal) -> None:
    """Modes and memory measures of the modules: training mode, checkpointing, attention, memory format."""
    denoiser: Any = model.denoiser  # diffusers' own methods
    text_encoders: list[Any] = list(model.text_encoders)
    for module in [denoiser, *text_encoders]:
        # a frozen text encoder drops nothing out: what is remembered of a caption would keep one chance forever
        module.train(module is denoiser or any(parameter.requires_grad for parameter in module.parameters()))
    if config.gradient_checkpointing:
        all_of_it = config.checkpointing_share == 1.0
        kept = blocks_to_keep(denoiser, model.family.denoiser.blocks, config.checkpointing_share)
        checkpoint_blocks(denoiser, text_encoders if trains_texts(model.family) and all_of_it else [], kept)
    if config.attn_type == "slice":
        denoiser.set_attention_slice("auto")
    prepare_speed(model, config)
    if config.blocks_to_swap:
        # the others, and what is trained, go to the device; before an optimizer sees it
        blocks = waiting_blocks(denoiser, model.family.denoiser.blocks, config.blocks_to_swap)
        model.block_swap = BlockSwap(denoiser, list(blocks.values()), model.device)
        if model.device.type == "cpu":
            journal.warn("blocks_to_swap: saves nothing on a CPU, where all memory is host memory.")


def prepare_speed(model: Model, config: TrainConfig) -> None:
    """Memory format and compilation of the denoiser, as they are set; what is so already stays."""
    import torch

    denoiser: Any = model.denoiser
    if config.channels_last:
        denoiser.to(memory_format=torch.channels_last)
    if config.torch_compile:
        compile_blocks(denoiser, model.family.denoiser.blocks)


def checkpoint_blocks(denoiser: Any, text_encoders: Sequence[Any], kept: Collection[Any] = ()) -> None:
    """Let the libraries compute their blocks again in the backward pass, as they mark them.

    What drops out must do the same the second time. Elsewhere the generators are left alone: reading them costs the host
    time, and a capture forbids it.

    Args:
        kept: blocks of the denoiser that are not computed again.
    """
    import torch

    for text_encoder in text_encoders:
        options = {"use_reentrant": False, "preserve_rng_state": drops_out(text_encoder)}
        text_encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    preserves, keeps = drops_out(denoiser), frozenset(map(id, kept))

    def run(block: Any, *inputs: Any) -> Any:
        if id(block) in keeps:
            return block(*inputs)
        return torch.utils.checkpoint.checkpoint(
            block.__call__, *inputs, use_reentrant=False, preserve_rng_state=preserves
        )

    denoiser.enable_gradient_checkpointing(run)


def blocks_to_keep(denoiser: torch.nn.Module, names: Sequence[str], share: float) -> list[torch.nn.Module]:
    """The blocks that are left when a share of them is recomputed.

    What a block holds grows with its width, and its arithmetic with its weights, each times the tokens. So a block with fewer
    weights holds more for each operation: in a UNet those of the highest resolution. Equal ones go in their order.

    Args:
        names: classes of the blocks (`Component.blocks`).
    """
    blocks = [m for m in denoiser.modules() if any(kind.__name__ in names for kind in type(m).__mro__)]
    blocks.sort(key=lambda block: sum(p.numel() for p in block.parameters()))
    return blocks[math.ceil(share * len(blocks)) :]


def drops_out(module: torch.nn.Module) -> bool:
    """Whether some layer drops out by chance: a Dropout, or an attention that has the share as a number."""
    import torch

    layers = list(module.modules())
    shares = [layer.p if isinstance(layer, torch.nn.Dropout) else vars(layer).get("dropout") for layer in layers]
    return any(isinstance(share, float) and share > 0 for share in shares)


def tile_large_images(model: Model, precision: Precision) -> None:
    """Let the VAE work on large images tile by tile, on GPUs whose mixed precision is float16.

    Those are the ones without bfloat16, which have 16 GiB or less. In float32, an image of 1024 px takes the VAE 3 GiB at
    once, more than a step of SDXL with gradient checkpointing takes above its weights. Tiles overlap by a quarter, and
    are blended; what the norms see is a tile, so latents differ slightly from those of the image as a whole.
    """
    import torch

    if precision.device_type == "cuda" and precision.dtype == torch.float16:
        vae: Any = model.vae
        vae.enable_tiling()
        vae.tile_sample_min_size = TILE_PIXELS
        vae.tile_latent_min_size = TILE_PIXELS // model.vae_scale_factor


def compile_blocks(denoiser: torch.nn.Module, blocks: Sequence[str]) -> None:
    """Compile the denoiser's transformer blocks in place: they repeat, so each shape is compiled once for all of them."""
    for module in denoiser.modules():
        if type(module).__name__ in blocks and "Transformer" in type(module).__name__:
            module.compile(dynamic=True)


def choose_idle_modules(
    config: TrainConfig,
    model: Model,
    journal: Journal,
    *,
    device_type: str,
    latents_cached: bool,
    texts_known: bool,
) -> list[torch.nn.Module]:
    """The modules that the steps do without, which are offloaded to host memory: if requested; large text encoders in any case.

    Args:
        latents_cached: images need not be encoded at every step.
        texts_known: all that the steps will ask for (`caching.texts_of_run`).
    """
    is_asked = config.offload_idle_models
    if device_type == "cpu":
        if is_asked:
            journal.warn("offload_idle_models: has no effect on a CPU, where all memory is host memory.")
        return []
    if not texts_known and has_large_texts(model.family):
        journal.warn(
            "The text encoder stays on the GPU: captions are drawn anew in every epoch and are too many to be encoded before "
            "the run, or a plug-in changes them. caption_variants 4 to 8 makes drawn ones few."
        )
    trains_text = any(p.requires_grad for encoder in model.text_encoders for p in encoder.parameters())
    modules = [model.vae] if is_asked and latents_cached else []
    if texts_known and not trains_text and (is_asked or has_large_texts(model.family)):
        modules += model.text_encoders
    return modules
