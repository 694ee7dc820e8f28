"""From settings to a run: the one place where a config meets the components.

`build_run` checks what is cheap first (settings, dataset, optimizer file), so that a mistake costs seconds and no GPU. Its
steps are functions with plain arguments; starting, resuming and ending a run are in `sessions.py`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everydream_kit.config import TrainConfig
from everydream_kit.data.dataset import Dataset
from everydream_kit.data.files import scan_dataset
from everydream_kit.data.plan import PlanSettings, plan_epoch
from everydream_kit.errors import CheckpointError, ConfigError, DataError
from everydream_kit.models.loading import Model, load_model
from everydream_kit.models.saving import save_model
from everydream_kit.training import schedules
from everydream_kit.training.caching import build_latent_cache, build_text_cache
from everydream_kit.training.ema import Ema, decay_from_strength_target
from everydream_kit.training.journal import Journal
from everydream_kit.training.objectives import build_objective, rescale_zero_terminal_snr
from everydream_kit.training.offload import IdleModels, idle_modules
from everydream_kit.training.optimizer_config import OptimizerConfig, PartSettings, load_optimizer_config, part_settings
from everydream_kit.training.optimizers import build_optimizer_for_parts, default_optimizer_name
from everydream_kit.training.parameters import TrainedPart, select_parameters
from everydream_kit.training.plugins import caption_transform, load_plugins, picture_transform
from everydream_kit.training.precision import choose_precision
from everydream_kit.training.ranks import Ranks
from everydream_kit.training.run import Run
from everydream_kit.training.step import NoiseSettings
from everydream_kit.training.summary import summarise_captions
from everydream_kit.training.validating import split_dataset
from everydream_kit.training.validation_config import load_validation_config
from everydream_kit.workspace import RunFolder, find_last_checkpoint

if TYPE_CHECKING:
    import torch

UNET, TEXT_ENCODER = "unet", "text encoder"
PASSED_TO_OPTIMIZER = ("optimizer", "lr", "lr_scheduler", "lr_warmup_steps", "lr_decay_steps")
"""Settings that win over `optimizer_config`'s base where a person gave them."""


def build_run(
    config: TrainConfig,
    folder: RunFolder,
    journal: Journal,
    ranks: Ranks,
    *,
    seed: int | None = None,
    weights_from: Path | None = None,
) -> Run:
    """Build everything that a run consists of, standing at its beginning; listeners are added by the caller.

    Args:
        seed: of a run that goes on; by default the config's, where -1 draws one.
        weights_from: checkpoint of a run that goes on; by default `resume_ckpt`.

    Raises:
        KitError: something cannot be used; the message names it and the cure.
    """
    seed = resolve_seed(config.seed) if seed is None else seed
    optimizer_config = load_optimizer_config(config.optimizer_config)
    for warning in optimizer_config.warnings:
        journal.warn(warning)
    validation_config = None if config.validation_config is None else load_validation_config(config.validation_config)
    plugins = load_plugins(config.plugins)
    dataset, validation_sets = read_dataset(config, journal), []
    if validation_config is not None:
        for warning in validation_config.warnings:
            journal.warn(warning)
        dataset, validation_sets = split_dataset(dataset, validation_config, partial(scan, config))
    plan_settings = make_plan_settings(config, seed, ranks.num_ranks)
    num_steps = foretell_steps(dataset, plan_settings, config.max_epochs, config.max_steps)
    journal.tell(
        "dataset",
        pictures=len(dataset),
        problems=len(dataset.problems),
        num_steps=num_steps,
        seed=seed,
        captions=summarise_captions(dataset),
    )

    model = load_base(config, weights_from, ranks)
    parts = select_trained(model, config, optimizer_config, seed)
    settings = [settle_part(part.name, config, optimizer_config, ranks.device.type) for part in parts]
    precision = choose_precision(
        ranks.device,
        amp=config.amp and not config.disable_amp,
        amp_dtype=config.amp_dtype,
        weight_dtype=config.weight_dtype,
        fused_backward=config.fused_backward,
    )
    num_workers = choose_num_workers(config.num_workers)
    latent_cache = build_latent_cache(
        model,
        dataset,
        plan_settings,
        journal,
        mode=config.cache_latents,
        variants=config.cache_variants,
        crop_jitter=config.crop_jitter,
        background=config.background,
        folder=Path(config.latent_cache_dir or Path(config.logdir) / ".edk_cache" / "latents"),
        num_workers=num_workers,
        transforms_pictures=picture_transform(plugins) is not None,
    )
    if config.fused_backward and ranks.num_ranks > 1:
        raise ConfigError(
            "fused_backward: works on one process only, since gradients must be summed over all of them first"
        )
    prepare_modules(model, config)
    idle = choose_idle_modules(
        config,
        model,
        dataset,
        journal,
        device_type=ranks.device.type,
        latents_cached=latent_cache is not None,
        transforms_captions=caption_transform(plugins) is not None,
    )
    return Run(
        config=config,
        folder=folder,
        journal=journal,
        ranks=ranks,
        seed=seed,
        dataset=dataset,
        plan_settings=plan_settings,
        num_steps=num_steps,
        model=model,
        parts=parts,
        optimizer=build_optimizer_for_parts(
            parts,
            settings,
            device_type=ranks.device.type,
            rounding_seed=seed if config.weight_dtype == "bfloat16" else None,
            fused_backward=config.fused_backward,
        ),
        schedules={how.part: make_schedule(how, config, num_steps, ranks.num_ranks) for how in settings},
        objective=build_objective(
            model.noise_scheduler,
            model.prediction_type,
            loss_type=config.loss_type,
            min_snr_gamma=config.min_snr_gamma,
            debiased_estimation=config.debiased_estimation,
        ),
        noise_settings=NoiseSettings(
            zero_frequency_noise_ratio=config.zero_frequency_noise_ratio,
            pyramid_noise_discount=config.pyramid_noise_discount,
            input_perturbation=config.input_perturbation,
            embedding_perturbation=config.embedding_perturbation,
            timestep_start=config.timestep_start,
            timestep_end=config.timestep_end,
            timestep_sampling=config.timestep_sampling,
        ),
        precision=precision,
        write_model=partial(_write_model, model),
        ema=build_ema(config, model, parts, num_steps, resumes=weights_from is not None),
        ema_update_interval=config.ema_update_interval,
        latent_cache=latent_cache,
        text_cache=build_text_cache(model, config.clip_skip, trains_text=any(p.name == TEXT_ENCODER for p in parts)),
        loader_options={
            "num_workers": 0 if latent_cache is not None and latent_cache.in_memory else num_workers,
            "crop_jitter": config.crop_jitter,
            "background": config.background,
            "caption_transform": caption_transform(plugins),
            "picture_transform": picture_transform(plugins),
        },
        updates_in_backward=config.fused_backward,
        validation_sets=validation_sets,
        validation_config=validation_config,
        plugins=plugins,
        idle_models=IdleModels(idle, ranks.device),
        wants_gradient_norm=lambda step: step % config.log_step == 0,
    )


def resolve_seed(seed: int) -> int:
    """The seed itself, or a fresh one for -1."""
    return secrets.randbelow(2**31) if seed == -1 else seed


def scan(config: TrainConfig, data_root: Any) -> Dataset:
    """Scan a dataset under the run's settings."""
    return scan_dataset(
        data_root,
        cond_dropout=config.cond_dropout,
        flip_p=config.flip_p,
        shuffle_tags=config.shuffle_tags,
        keep_tags=config.keep_tags,
        caption_lines=config.caption_lines,
        loss_mask=config.loss_mask,
        cache_dir=Path(config.logdir) / ".edk_cache",
    )


def read_dataset(config: TrainConfig, journal: Journal) -> Dataset:
    """Scan the run's dataset and report what cannot be used.

    Raises:
        DataError: no picture can be used.
    """
    dataset = scan(config, config.data_root)
    for problem in dataset.problems:
        journal.warn(f"{problem.path}: {problem.cause} {problem.cure}".strip())
    if not len(dataset):
        raise DataError(f"data_root {config.data_root}: no picture can be used; the log names each problem.")
    return dataset


def make_plan_settings(config: TrainConfig, seed: int, num_ranks: int) -> PlanSettings:
    """What the epoch plan depends on."""
    if config.batch_size == "auto":
        raise ConfigError(
            "batch_size: auto: this version does not have it yet; give a number (4 to 8 at 512 px on a 24 GB card)"
        )
    return PlanSettings(
        batch_size=config.batch_size,
        grad_accum=config.grad_accum,
        resolutions=config.resolutions,
        seed=seed,
        num_ranks=num_ranks,
        rated_dropout_percent=config.rated_dataset_target_dropout_percent if config.rated_dataset else None,
        max_epochs=config.max_epochs,
    )


def foretell_steps(dataset: Dataset, settings: PlanSettings, max_epochs: int, max_steps: int | None) -> int:
    """Optimizer steps of the whole run, from the first epoch's plan."""
    steps = plan_epoch(dataset, settings, 0).num_steps * max_epochs
    return steps if max_steps is None else min(steps, max_steps)


def load_base(config: TrainConfig, weights_from: Path | None, ranks: Ranks) -> Model:
    """Load the base model, or the weights of a run that goes on, onto the device.

    Raises:
        ModelError, CheckpointError: it is not there or cannot be used.
        ConfigError: zero terminal SNR is asked of an epsilon model.
    """
    import torch

    model = load_model(
        weights_from or find_base(config),
        dtype=torch.bfloat16 if config.weight_dtype == "bfloat16" else torch.float32,
        device=ranks.device,
        revision=config.base_revision,
        subfolder=config.base_subfolder if weights_from is None else None,
        variant=config.base_variant if weights_from is None else None,
        family=config.family,
        prediction_type=config.prediction_type,
    )
    if config.enable_zero_terminal_snr and not model.zero_terminal_snr:
        model.noise_scheduler = rescale_zero_terminal_snr(model.noise_scheduler, model.prediction_type)
        model.zero_terminal_snr = True
    return model


def find_base(config: TrainConfig) -> str | Path:
    """What `resume_ckpt` means: the embedded model, the project's newest checkpoint, or what it says."""
    if config.resume_ckpt == "embedded":
        from everydream_kit.demo import base_model_path

        return base_model_path()
    if config.resume_ckpt == "findlast":
        return find_last_checkpoint(config.logdir, config.project_name)
    return config.resume_ckpt


def select_trained(
    model: Model, config: TrainConfig, optimizer_config: OptimizerConfig, seed: int
) -> list[TrainedPart]:
    """Choose what is trained, and freeze the rest: all weights, an adapter, or new tokens.

    A model that comes from such a run's checkpoint has its adapter or tokens already, and goes on with them.
    """
    if config.training_kind == "full":
        unet_freezing = optimizer_config.unet_freezing
        return select_parameters(
            model,
            train_unet=not config.disable_unet_training,
            train_text_encoder=not config.disable_textenc_training,
            freezing=optimizer_config.text_encoder_freezing,
            unet_patterns=unet_freezing.train if unet_freezing else None,
            unet_frozen_patterns=unet_freezing.freeze if unet_freezing else None,
        )
    if config.training_kind == "lora":
        from everydream_kit.models.lora import add_lora

        if model.lora is None:
            add_lora(
                model,
                config.lora_rank,
                alpha=config.lora_alpha,
                dropout=config.lora_dropout,
                targets=config.lora_targets,
                text_encoder=config.lora_text_encoder,
                dora=config.lora_dora,
                seed=seed,
            )
    elif not model.new_tokens:
        from everydream_kit.models.tokens import add_tokens

        add_tokens(model, config.new_tokens or {})
    return parts_that_ask_for_gradients(model)


def parts_that_ask_for_gradients(model: Model) -> list[TrainedPart]:
    """UNet and text encoders as parts, each with the parameters whose gradients are wanted."""
    parts = []
    for name, modules in ((UNET, [model.unet]), (TEXT_ENCODER, model.text_encoders)):
        named = [(key, p) for module in modules for key, p in module.named_parameters() if p.requires_grad]
        if named:
            parts.append(TrainedPart(name, list(modules), named))
    return parts


def prepare_modules(model: Model, config: TrainConfig) -> None:
    """Modes and memory measures of the modules: training mode, checkpointing, attention, memory format."""
    import torch

    for module in [model.unet, *model.text_encoders]:
        module.train()
    if config.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
        for text_encoder in model.text_encoders:
            text_encoder.gradient_checkpointing_enable()
    if config.attn_type == "slice":
        model.unet.set_attention_slice("auto")
    if config.channels_last:
        model.unet.to(memory_format=torch.channels_last)
    if config.torch_compile:
        compile_blocks(model.unet)


def compile_blocks(unet: torch.nn.Module) -> None:
    """Compile the UNet's transformer blocks in place: they repeat, so each shape is compiled once for all of them."""
    for module in unet.modules():
        if type(module).__name__ == "BasicTransformerBlock":
            module.compile(dynamic=True)


def choose_idle_modules(
    config: TrainConfig,
    model: Model,
    dataset: Dataset,
    journal: Journal,
    *,
    device_type: str,
    latents_cached: bool,
    transforms_captions: bool,
) -> list[torch.nn.Module]:
    """What waits in host memory, where that is asked for and there is something to save."""
    if not config.offload_idle_models:
        return []
    if device_type == "cpu":
        journal.warn("offload_idle_models: has no effect on a CPU, where all memory is host memory.")
        return []
    trains_text = any(p.requires_grad for encoder in model.text_encoders for p in encoder.parameters())
    return idle_modules(
        model,
        dataset,
        latents_cached=latents_cached,
        trains_text=trains_text,
        transforms_captions=transforms_captions,
    )


def settle_part(name: str, config: TrainConfig, optimizer_config: OptimizerConfig, device_type: str) -> PartSettings:
    """How one part is trained, from the settings that were given and the optimizer file."""
    given = {key: getattr(config, key) for key in PASSED_TO_OPTIMIZER if key in config.model_fields_set}
    return part_settings(
        optimizer_config,
        name,
        given=given,
        default_optimizer=default_optimizer_name(device_type),
        default_lr=config.lr,
        default_lr_scheduler=config.lr_scheduler,
    )


def make_schedule(how: PartSettings, config: TrainConfig, num_steps: int, num_ranks: int) -> Callable[[int], float]:
    """The learning rate of one part as a function of the optimizer step."""
    peak = how.lr
    if config.scale_lr:
        assert isinstance(config.batch_size, int)
        peak = schedules.scaled_lr(peak, config.batch_size * num_ranks, config.grad_accum)
    decay_steps = schedules.default_decay_steps(num_steps) if how.lr_decay_steps is None else how.lr_decay_steps
    warmup_steps = how.lr_warmup_steps
    if warmup_steps is None:
        warmup_steps = schedules.default_warmup_steps(decay_steps, how.lr_scheduler)
    return partial(
        schedules.learning_rate,
        peak=peak,
        kind=how.lr_scheduler,
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
    )


def build_ema(
    config: TrainConfig, model: Model, parts: list[TrainedPart], num_steps: int, *, resumes: bool
) -> Ema | None:
    """The average of the trained weights, or None where it is off."""
    parameters = [parameter for part in parts for _, parameter in part.parameters]
    device = None if config.ema_device == "cuda" else config.ema_device
    if config.ema_strength_target is not None:
        decay = decay_from_strength_target(config.ema_strength_target, num_steps, config.ema_update_interval)
        ema = Ema(parameters, decay, device)
    elif config.ema_decay_rate is not None:
        ema = Ema(parameters, config.ema_decay_rate, device, warmup=True)
    else:
        return None
    if config.ema_resume_model is not None and not resumes:
        ema.load_averages(averages_of(config, model, parameters))
    return ema


def averages_of(config: TrainConfig, model: Model, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """The weights of the checkpoint that `ema_resume_model` names, in the order of the trained parameters.

    Raises:
        CheckpointError, ModelError: it is not there, or is another model's.
    """
    source = config.ema_resume_model
    if source == "findlast":
        source = str(find_last_checkpoint(config.logdir, config.project_name, averaged=True))
    other = {name: module.state_dict() for name, module in load_model(str(source)).modules().items()}
    places = {id(p): (name, key) for name, module in model.modules().items() for key, p in module.named_parameters()}
    averages = []
    for parameter in parameters:
        name, key = places[id(parameter)]
        if key not in other.get(name, {}) or other[name][key].shape != parameter.shape:
            raise CheckpointError(
                f"ema_resume_model {source}: has no {name}.{key} of the shape {tuple(parameter.shape)}."
            )
        averages.append(other[name][key])
    return averages


def choose_num_workers(num_workers: int | None) -> int:
    """Loader processes: as asked, or one fewer than there are cores, at most 8."""
    import os

    return max(0, min(8, (os.cpu_count() or 1) - 1)) if num_workers is None else num_workers


def _write_model(model: Model, folder: Path, weights: dict[str, dict[str, Any]]) -> None:
    save_model(model, folder, weights=weights)
