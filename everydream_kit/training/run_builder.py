"""From settings to a run: the one place where a config meets the components.

`build_run` checks what is cheap first (settings, dataset, optimizer file), so that a mistake costs seconds and no GPU; then it
loads the model and hands both to `assemble_run`, which builds the rest: caches, averages, the learner, and the run. What a run
trains on is in `training_images.py`, the model it starts from in `base_model.py`; starting, resuming and ending a run are in
`sessions.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everydream_kit.config import TrainConfig, family_warnings, measures_losses
from everydream_kit.data.cache import CacheSettings
from everydream_kit.data.cache_room import CacheMode
from everydream_kit.data.dataset import Dataset
from everydream_kit.errors import ConfigError
from everydream_kit.models.adapters import AdapterBase
from everydream_kit.models.family import Conditioning, Model, has_large_texts
from everydream_kit.models.model_saving import save_model
from everydream_kit.runs import Checkpoint, RunFolder, layout
from everydream_kit.settings import with_side_files
from everydream_kit.training.base_model import (
    choose_idle_modules,
    load_base,
    precision_of,
    prepare_modules,
    refuse_float16,
    select_trained,
    shards,
    tile_large_images,
)
from everydream_kit.training.caching import (
    build_latent_cache,
    choose_latent_mode,
    fill_text_cache,
    fixed_captions,
    latent_folder,
    texts_of_run,
)
from everydream_kit.training.cuda_graphs import add_graphs, numbers_of_a_buffer
from everydream_kit.training.ema import Ema
from everydream_kit.training.ema_builder import build_ema
from everydream_kit.training.file_hashes import OpenFile
from everydream_kit.training.flat_weights_check import check_flat_weights, lays_flat
from everydream_kit.training.gradient_sums import GradientSums
from everydream_kit.training.held_out_images import ValidationSet, split_dataset
from everydream_kit.training.journal import Journal
from everydream_kit.training.objectives import OBJECTIVES
from everydream_kit.training.offload import IdleModels
from everydream_kit.training.optimizers import AnyOptimizer, build_optimizer_for_parts, parameters_of
from everydream_kit.training.parameters import TrainedPart
from everydream_kit.training.part_schedules import announce_schedules, resolve_part, schedules_of
from everydream_kit.training.parts import TEXT_ENCODER, PartSettings
from everydream_kit.training.plugins import caption_transform, image_transform, load_plugins
from everydream_kit.training.precision import Precision
from everydream_kit.training.prompt_file import sampled_texts
from everydream_kit.training.ranks import Ranks
from everydream_kit.training.run import Run
from everydream_kit.training.sharding import build_sharding
from everydream_kit.training.speed_choice import MeasuredRun, SpeedTrial, choose_speed
from everydream_kit.training.step import Learner, Schedules
from everydream_kit.training.summary import summarise_captions
from everydream_kit.training.sync import RankSync
from everydream_kit.training.training_images import (
    choose_num_workers,
    estimate_steps,
    make_plan_settings,
    read_dataset,
    resolve_seed,
    scan,
)

if TYPE_CHECKING:
    from everydream_kit.data.cache import LatentCache
    from everydream_kit.data.epoch_plan import PlanSettings
    from everydream_kit.data.text_cache import TextCache
    from everydream_kit.training.control import StopSignal


def build_run(
    config: TrainConfig,
    folder: RunFolder,
    journal: Journal,
    ranks: Ranks,
    *,
    seed: int | None = None,
    weights_from: Checkpoint | None = None,
    adapter_base: AdapterBase | None = None,
    stop: StopSignal | None = None,
    speed_trial: SpeedTrial | None = None,
) -> Run:
    """Build everything that a run consists of, standing at its beginning; listeners are added by the caller.

    Args:
        seed: of a resumed run; by default the config's, where -1 draws one.
        weights_from: checkpoint of a resumed run; by default `resume_ckpt`.
        adapter_base: base of a small checkpoint, in place of the one that it names.
        stop: ends what takes long here.
        speed_trial: chooses where `speed` is `auto`; the run's `config` has the choice. None: nothing is chosen.

    Raises:
        StopRequested: by `stop`.
        KitError: something cannot be used; the message names it and the cure.
    """
    seed = resolve_seed(config.seed) if seed is None else seed
    config, warnings = with_side_files(config)
    for warning in warnings:
        journal.warn(warning)
    if config.fused_backward and ranks.num_ranks > 1:
        raise ConfigError(
            "fused_backward: works on one process only, since gradients must be summed over all of them first"
        )
    if config.parallel == "fsdp2" and ranks.num_ranks == 1:
        journal.warn("parallel fsdp2: has no effect on one process; start several with accelerate launch or torchrun.")
    plugins = load_plugins(config.plugins)
    dataset, validation_sets = read_dataset(config, journal), list[ValidationSet]()
    if measures_losses(config):
        dataset, validation_sets = split_dataset(dataset, config, partial(scan, config))
    if not shards(config, ranks):
        config = check_flat_weights(config, ranks.device, journal)
    model = load_base(config, weights_from, ranks, adapter_base)
    for warning in family_warnings(config, model.family.name):
        journal.warn(warning)
    distilled = model.family.distilled(model.source)
    if distilled is not None:
        journal.warn(f"{model.source}: {distilled}")
    return assemble_run(
        config,
        folder,
        journal,
        ranks,
        model=model,
        dataset=dataset,
        seed=seed,
        validation_sets=validation_sets,
        plugins=plugins,
        resumes=weights_from is not None,
        stop=stop if ranks.num_ranks == 1 else None,  # alone: the others would wait for a process that has left
        speed_trial=speed_trial,
    )


def assemble_run(
    config: TrainConfig,
    folder: RunFolder,
    journal: Journal,
    ranks: Ranks,
    *,
    model: Model,
    dataset: Dataset,
    seed: int,
    validation_sets: Sequence[ValidationSet] = (),
    plugins: Sequence[Any] = (),
    resumes: bool = False,
    device_type: str | None = None,
    stop: StopSignal | None = None,
    encodes_ahead: bool = True,
    speed_trial: SpeedTrial | None = None,
) -> Run:
    """Build a run around a model and a dataset that are there already.

    Args:
        resumes: the model's weights are those of this very run, so an EMA model is not loaded over them.
        device_type: what optimizer and precision are chosen for, where that is not the device that the tensors are on:
            the pre-flight estimates a GPU's memory without one.
        stop: ends the encoding of images with a `StopRequested`.
        encodes_ahead: large text encoders encode all captions now, into a cache on disk.
        speed_trial: as in `build_run`.
    """
    device_type = device_type or ranks.device.type
    plan_settings = make_plan_settings(config, seed, ranks.num_ranks)
    num_steps = estimate_steps(dataset, plan_settings, config.max_epochs, config.max_steps)
    _report_dataset(dataset, num_steps, seed, journal)
    config, sync, latent_cache, make_schedules = build_learning(
        config,
        model,
        dataset,
        plan_settings,
        num_steps=num_steps,
        journal=journal,
        ranks=ranks,
        seed=seed,
        plugins=plugins,
        resumes=resumes,
        device_type=device_type,
        stop=stop,
        measured=[entry.dataset for entry in validation_sets] if encodes_ahead else None,
        speed_trial=speed_trial,
    )
    add_graphs(config, sync.learner, journal)
    return Run(
        config=config,
        folder=folder,
        journal=journal,
        ranks=ranks,
        seed=seed,
        dataset=dataset,
        plan_settings=plan_settings,
        num_steps=num_steps,
        make_schedules=make_schedules,
        learner=sync.learner,
        sync=sync,
        write_model=partial(_write_model, model),
        latent_cache=latent_cache,
        loader_options=_loader_options(config, plugins),
        validation_sets=list(validation_sets),
        plugins=list(plugins),
    )


def build_learning(
    config: TrainConfig,
    model: Model,
    dataset: Dataset,
    plan_settings: PlanSettings,
    *,
    num_steps: int,
    journal: Journal,
    ranks: Ranks,
    seed: int,
    plugins: Sequence[Any],
    resumes: bool,
    device_type: str,
    stop: StopSignal | None,
    measured: Sequence[Dataset] | None,
    speed_trial: SpeedTrial | None,
) -> tuple[TrainConfig, RankSync, LatentCache | None, Callable[[int], Schedules]]:
    """The settings with what was chosen, the learner and where its processes meet, the latent cache, and the learning rates.

    The order matters for memory: latents are encoded before the averages of the weights exist.
    """
    parts = select_trained(model, config, seed)
    settings = [resolve_part(part.name, config, device_type) for part in parts]
    make_schedules = partial(schedules_of, settings, config, ranks.num_ranks)
    announce_schedules(settings, make_schedules(num_steps), config, num_steps, journal, family=model.family)
    precision = precision_of(config, device_type)
    refuse_float16(config, model.family, precision)
    tile_large_images(model, precision)
    optimizers = [how.optimizer for how in settings]
    sharding = build_sharding(model, parts, optimizers, precision, ranks) if shards(config, ranks) else None
    latent_cache, text_cache, idle_models = build_caches(
        config,
        model,
        dataset,
        plan_settings,
        trains_text=any(part.name == TEXT_ENCODER for part in parts),
        precision=precision,
        journal=journal,
        ranks=ranks,
        plugins=plugins,
        stop=stop,
        measured=measured,
    )
    prepare_modules(model, config, journal)
    make_learner = partial(
        build_learner,
        model=model,
        parts=parts,
        dataset=dataset,
        ranks=ranks,
        seed=seed,
        text_cache=text_cache,
        idle_models=idle_models,
        is_sharded=sharding is not None,
    )
    passes = MeasuredRun(model, parts, ranks, make_learner, dataset, plan_settings, num_steps, journal)
    config = choose_speed(config, speed_trial, passes)
    optimizer = _build_optimizer(
        config, model, parts, settings, ranks, seed=seed, device_type=device_type, is_sharded=sharding is not None
    )
    ema = build_ema(config, model, parts, num_steps, resumes=resumes)
    sync = RankSync(ranks, make_learner(config, optimizer=optimizer, precision=precision, ema=ema), sharding)
    return config, sync, latent_cache, make_schedules


def _report_dataset(dataset: Dataset, num_steps: int, seed: int, journal: Journal) -> None:
    journal.report(
        "dataset",
        images=len(dataset),
        problems=len(dataset.problems),
        num_steps=num_steps,
        seed=seed,
        captions=summarise_captions(dataset),
    )


def build_caches(
    config: TrainConfig,
    model: Model,
    dataset: Dataset,
    plan_settings: PlanSettings,
    *,
    trains_text: bool,
    precision: Precision,
    journal: Journal,
    ranks: Ranks,
    plugins: Sequence[Any],
    stop: StopSignal | None,
    measured: Sequence[Dataset] | None,
) -> tuple[LatentCache | None, TextCache[Conditioning] | None, IdleModels]:
    """What is encoded once, and the models that wait in host memory for that.

    Args:
        measured: datasets of validation, whose captions are encoded with those that are trained on; None: large text
            encoders encode nothing now.
    """
    mode = _latent_mode(config, model, dataset, plan_settings, plugins)
    texts = None
    if caption_transform(plugins) is None:
        texts = texts_of_run(config, dataset, plan_settings, large_texts=has_large_texts(model.family))
    idle = choose_idle_modules(
        config,
        model,
        journal,
        device_type=ranks.device.type,
        latents_cached=mode != "off",
        texts_known=texts is not None,
    )
    idle_models = IdleModels(idle, ranks.device)
    _place_large_encoders(model, idle, ranks.device)
    ahead = None if measured is None else [*(texts or ()), *fixed_captions(measured), *sampled_texts(config)]
    text_cache = fill_text_cache(
        config,
        model,
        ahead,
        trains_text=trains_text,
        precision=precision,
        journal=journal,
        idle_models=idle_models,
    )
    latent_cache = build_latent_cache(
        model,
        dataset,
        plan_settings,
        journal,
        idle_models,
        mode=mode,
        settings=CacheSettings(
            config.cache_variants,
            config.crop_jitter,
            config.background,
            channels=model.family.latent_space.stored_channels,
        ),
        folder=latent_folder(config),
        num_workers=choose_num_workers(config.num_workers),
        stop=stop,
    )
    return latent_cache, text_cache, idle_models


def _latent_mode(
    config: TrainConfig, model: Model, dataset: Dataset, plan_settings: PlanSettings, plugins: Sequence[Any]
) -> CacheMode:
    return choose_latent_mode(
        config.cache_latents,
        dataset,
        plan_settings,
        variants=config.cache_variants,
        channels=model.family.latent_space.stored_channels,
        folder=latent_folder(config),
        transforms_images=image_transform(plugins) is not None,
    )


def _place_large_encoders(model: Model, idle: Collection[Any], device: Any) -> None:
    """Large text encoders that stay in use through the run go to its device."""
    for text_encoder in model.text_encoders if has_large_texts(model.family) else ():
        if text_encoder not in idle and next(text_encoder.parameters()).device != device:
            text_encoder.to(device)


def _build_optimizer(
    config: TrainConfig,
    model: Model,
    parts: list[TrainedPart],
    settings: Sequence[PartSettings],
    ranks: Ranks,
    *,
    seed: int,
    device_type: str,
    is_sharded: bool,
) -> AnyOptimizer:
    return build_optimizer_for_parts(
        parts,
        settings,
        device_type=device_type,
        rounding_seed=seed if config.weight_dtype == "bfloat16" else None,
        fused_backward=config.fused_backward,
        flat=lays_flat(config, device_type) and not is_sharded,
        buffer_numbers=numbers_of_a_buffer(config, model, ranks, device_type),
    )


def build_learner(
    config: TrainConfig,
    *,
    model: Model,
    parts: list[TrainedPart],
    optimizer: AnyOptimizer,
    dataset: Dataset,
    precision: Precision,
    ranks: Ranks,
    seed: int,
    text_cache: TextCache[Conditioning] | None,
    idle_models: IdleModels,
    is_sharded: bool,
    ema: Ema | None = None,
) -> Learner:
    """The model with what its steps need; its schedules come with the run's number of steps."""
    sums = GradientSums(parameters_of(optimizer), ranks) if ranks.num_ranks > 1 and not is_sharded else None
    return Learner(
        model=model,
        parts=parts,
        optimizer=optimizer,
        schedules={},
        objective=OBJECTIVES[model.family.objective](model.noise_scheduler, model.prediction_type, config),
        noise_settings=config,
        precision=precision,
        ranks=ranks,
        seed=seed,
        dataset=dataset,
        clip_skip=config.clip_skip,
        clip_grad_norm=config.clip_grad_norm,
        ema=ema,
        text_cache=text_cache,
        idle_models=idle_models,
        gradient_sums=sums,
        updates_in_backward=config.fused_backward,
        wants_gradient_norm=lambda step: step % config.log_step == 0,
        is_sharded=is_sharded,
        saves_components=config.training_kind == "full",
    )


def _loader_options(config: TrainConfig, plugins: Sequence[Any]) -> dict[str, Any]:
    return {
        "num_workers": choose_num_workers(config.num_workers),
        "crop_jitter": config.crop_jitter,
        "background": config.background,
        "caption_variants": config.caption_variants,
        "caption_transform": caption_transform(plugins),
        "image_transform": image_transform(plugins),
    }


def _write_model(model: Model, folder: Path, weights: dict[str, dict[str, Any]], open_file: OpenFile) -> None:
    save_model(model, folder, weights=weights, open_file=open_file, title=folder.name.removeprefix(layout.PARTIAL))
