"""Making a plan: memory, time, disk and cost of a run, before anything is spent, without a GPU and without weights.

`plan` puts the room's parts together: steps from the trainer's own epoch plan, memory from the rehearsal, seconds from
what was measured, published or can be computed, disk by going through the saves, cost from a price that is entered or
dated. Nothing is downloaded but the base's config files. `corrected` makes it right once real steps have been timed.

Not here: how a plan is shown (`plan`), and what to change so that it fits (`advice`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everydream_kit.config import TrainConfig, measures_losses, wants_auto_optimizer
from everydream_kit.data.cache_room import free_memory, possible_flips
from everydream_kit.data.epoch_plan import PlanSettings
from everydream_kit.data.image_files import count_images
from everydream_kit.errors import ConfigError, DataError, MemoryLimitError
from everydream_kit.hosts import detect_host
from everydream_kit.models.families import FAMILIES
from everydream_kit.preflight.advice import (
    MARGIN,
    Budget,
    Estimate,
    choose_optimizer,
    describe_blocks,
    fewest_blocks,
    largest_batch,
    largest_resolution,
    make_it_fit,
)
from everydream_kit.preflight.cost import Price, entered_price, find_price, read_prices
from everydream_kit.preflight.disk import (
    LATENT_CACHE,
    TEXT_CACHE,
    DiskUse,
    estimate_disk,
    latent_cache_bytes,
    num_samples,
)
from everydream_kit.preflight.gpus import GpuSpec, find_gpu, this_gpu
from everydream_kit.preflight.plan import Offer, Plan, StepCount, with_article
from everydream_kit.preflight.step_time import StepSeconds, estimate_step
from everydream_kit.runs import RunFolder
from everydream_kit.settings import load_config, read_settings, with_side_files
from everydream_kit.training.caching import texts_of_run
from everydream_kit.training.prompt_file import prompts_of
from everydream_kit.training.training_images import estimate_steps, make_plan_settings, scan

if TYPE_CHECKING:
    from everydream_kit.data.dataset import Dataset
    from everydream_kit.models.family import Family, SamplerSpec
    from everydream_kit.preflight.memory_records import MemoryEstimate

logger = logging.getLogger(__name__)

MOST_SCANNED = 50_000
"""Images up to which a dataset is scanned for a plan; of more only the files are counted."""
FORWARDS_IN_A_STEP = {"full": 3.0, "lora": 2.0, "textual_inversion": 2.0}
"""A training step of one image in forward passes of the UNet; one more with gradient checkpointing."""
ENCODING_IN_FORWARDS = 1.4
"""Encoding an image with the VAE, in forward passes of SD 1.5's UNet at the same size (1.1 to 0.8 teraflops at 512
px)."""


@dataclass(frozen=True)
class _Images:
    """What is known of the dataset."""

    count: int | None
    dataset: Dataset | None
    note: str = ""


def plan(
    config: TrainConfig | dict[str, Any] | str | Path | RunFolder,
    gpu: str | None = None,
    price: float | None = None,
    *,
    advise: bool = False,
    estimate: Estimate | None = None,
) -> Plan:
    """Say what a run will take.

    Args:
        config: settings, as an object, a mapping, or the path of a settings file; or a run folder: what it takes, and
            what is left of it.
        gpu: name of the GPU to plan for, such as `T4`; by default this machine's, or its CPU.
        price: of the GPU, US dollars an hour; by default from the dated table, where it has one.
        advise: ask for the largest batch and resolution as well (some seconds for each question).
        estimate: the memory model; by default `memory.estimate_memory`.

    Raises:
        ConfigError: a setting, the GPU's name or the price is wrong.
        ModelError, CheckpointError: the base model is not there.
    """
    entered = None if price is None else entered_price(price)
    config, run = _read_config(config)
    status = run.status() if run is not None else {}
    gpu_spec = find_gpu(gpu) if gpu is not None else this_gpu(config.gpuid)
    images = read_dataset(config)
    budget = Budget(gpu_spec, estimate or memory_model(config, images.dataset))
    assumptions, warnings = list(_assumptions(config, gpu_spec)), []
    config, notes = resolve_for_plan(config, budget)
    assumptions += notes
    logger.info("Estimating the memory; kept for the next time …")
    memory = budget(config)
    if images.note:
        assumptions.append(images.note)
    settings = make_plan_settings(config, max(0, config.seed), 1)
    steps = count_steps(config, images, settings)
    if status.get("num_steps"):  # of a run: settings that were changed on a resume do not say what went before
        steps = replace(steps, num_steps=status["num_steps"])
    if images.count == 0:
        warnings.append(f"data_root {config.data_root}: no image can be used there.")
    warnings += [f"sample_prompts {config.sample_prompts}: {problem}" for problem in prompts_of(config).problems]
    latents, latent_bytes = _latents(config, images, settings, _family_of(memory))
    num_texts = _count_texts(config, images, memory)
    step = estimate_step(config, gpu_spec, memory, launch_seconds=_launch_seconds(config, gpu_spec))
    made = Plan(
        config=config,
        gpu_spec=gpu_spec,
        steps=steps,
        memory=memory,
        room_bytes=budget.limit_bytes,
        device_bytes=gpu_spec.memory_bytes if gpu_spec is not None else free_memory(),
        step=step,
        seconds_of=_seconds_of(config, steps, step, memory, latents=latents, num_texts=num_texts),
        price=entered or _table_price(config, gpu_spec),
        latents=latents,
        steps_done=int(status.get("step") or 0),
        assumptions=tuple(assumptions),
    )
    disk = _disk(made, latent_bytes if latents == "disk" else 0, num_texts * memory.text_bytes)
    advice = None
    if not made.fits:
        warnings.append(_too_large(made))
        if gpu_spec is not None:
            logger.info(f"It does not fit the {gpu_spec.name}; looking for what does …")
            advice = make_it_fit(config, budget)
    offer = _offer(config, budget) if advise and gpu_spec is not None else None
    warnings += disk.warnings if disk is not None else ()
    return replace(made, disk=disk, advice=advice, offer=offer, warnings=tuple(warnings))


def corrected(plan: Plan, measured_seconds_per_step: float, *, steps_done: int = 0, source: str = "this run") -> Plan:
    """The plan after real steps have been timed: their time takes the place of what was estimated.

    Args:
        measured_seconds_per_step: of one optimizer step, saving and sampling not counted.
        steps_done: of the run so far.
        source: who measured.

    Raises:
        ConfigError: the time is not above 0.
    """
    if not (math.isfinite(measured_seconds_per_step) and measured_seconds_per_step > 0):
        raise ConfigError(f"measured_seconds_per_step: must be above 0 (got {measured_seconds_per_step!r})")
    step = StepSeconds(measured_seconds_per_step, "measured here", source)
    of = {item.name: item.most_bytes for item in plan.disk.items} if plan.disk else {}
    num_texts = of.get(TEXT_CACHE, 0) // max(1, plan.memory.text_bytes) if plan.memory is not None else 0
    seconds_of = _seconds_of(plan.config, plan.steps, step, plan.memory, latents=plan.latents, num_texts=num_texts)
    again = replace(plan, step=step, seconds_of=seconds_of, steps_done=steps_done)
    disk = _disk(again, of.get(LATENT_CACHE, 0), of.get(TEXT_CACHE, 0))
    short = plan.disk.warnings if plan.disk is not None else ()
    kept = tuple(warning for warning in plan.warnings if warning not in short)
    return replace(again, disk=disk, warnings=kept + (disk.warnings if disk is not None else ()))


def memory_model(config: TrainConfig, dataset: Dataset | None = None) -> Estimate:
    """`memory.estimate_memory` for this base, whose config files are read once for all questions, and for this dataset.

    Raises:
        ModelError, CheckpointError: the base is not there.
    """
    from everydream_kit.preflight.memory_estimate import architecture_of, estimate_memory

    return partial(estimate_memory, architecture=architecture_of(config), dataset=dataset)


def resolve_for_plan(config: TrainConfig, budget: Budget) -> tuple[TrainConfig, list[str]]:
    """A number or a name where `batch_size`, `optimizer` or `blocks_to_swap` is `auto`, and what was chosen, one line each.

    `speed: auto` stays plain, with a line on what it may choose.
    """
    notes: list[str] = []
    wants_optimizer = wants_auto_optimizer(config)
    if wants_optimizer:
        config = config.replace(optimizer=None)  # the batch is chosen with the device's own
    if config.batch_size == "auto":
        try:
            chosen, found = largest_batch(config, budget)
            why = f"{chosen}, the largest that fits, up to {budget.largest_batch} ({budget.figures(found)})"
        except MemoryLimitError:
            chosen, why = 1, "not even one image fits; planned with 1"
        config = config.replace(batch_size=chosen)
        notes.append(f"batch_size auto: {why}")
    if wants_optimizer:
        config, note = choose_optimizer(config, budget)
        notes.append(note)
    if config.blocks_to_swap == "auto":
        num_blocks, memory = fewest_blocks(config, budget)
        config = config.replace(blocks_to_swap=num_blocks)
        notes.append(describe_blocks(num_blocks, memory, budget))
    if config.speed == "auto":
        config = config.replace(speed="manual")
        notes.append(_describe_speed(config, budget))
    return config, notes


def _describe_speed(config: TrainConfig, budget: Budget) -> str:
    """What `speed: auto` may choose, in words; the plan itself is of plain passes."""
    graphs = "cuda_graphs needs a GPU"
    if budget.gpu_spec is not None:
        try:
            found = budget(config.replace(cuda_graphs="on"))
        except ConfigError as error:
            graphs = str(error)
        else:
            answer = "may be used" if found.peak_bytes <= budget.limit_bytes else "do not fit"
            graphs = f"cuda_graphs {answer} ({budget.figures(found)})"
    return (
        "speed auto: measured when the run starts; planned are plain passes. channels_last and torch_compile take no more "
        f"memory; {graphs}"
    )


def read_dataset(config: TrainConfig) -> _Images:
    """Scan what is on this machine and not huge; count the files of what is; say so where nothing can be looked at."""
    count = count_images(config.data_root)
    if count is None:
        return _Images(None, None, f"data_root {config.data_root}: not looked at: it is not a folder on this machine")
    if count > MOST_SCANNED:
        return _Images(count, None, f"{count:,} image files were counted and not opened: all are taken as usable")
    try:
        dataset = scan(config, config.data_root)
        if measures_losses(config):
            from everydream_kit.training.held_out_images import split_dataset

            dataset = split_dataset(dataset, config, partial(scan, config))[0]  # what validation leaves
    except DataError as problem:
        return _Images(0, None, str(problem))
    skipped = len(dataset.problems)
    note = f"{skipped:,} images or captions have problems; `everydream prepare` names them" if skipped else ""
    return _Images(len(dataset), dataset, note)


def count_steps(config: TrainConfig, images: _Images, settings: PlanSettings) -> StepCount:
    """Optimizer steps of an epoch and of the run, by the trainer's own plan where the dataset was scanned."""
    if images.dataset is not None and len(images.dataset):
        per_epoch = estimate_steps(images.dataset, settings, 1, None)
        num_steps = estimate_steps(images.dataset, settings, config.max_epochs, config.max_steps)
        return StepCount(images.count, config.max_epochs, per_epoch, num_steps, "planned")
    if images.count:
        in_a_step = settings.batch_size * settings.grad_accum
        per_epoch, basis = math.ceil(images.count * len(config.resolutions) / in_a_step), "counted"
    else:
        return StepCount(images.count, config.max_epochs, None, config.max_steps, "unknown")
    num_steps = min(per_epoch * config.max_epochs, config.max_steps or per_epoch * config.max_epochs)
    return StepCount(images.count, config.max_epochs, per_epoch, num_steps, basis)  # type: ignore[arg-type]


def _read_config(given: TrainConfig | dict[str, Any] | str | Path | RunFolder) -> tuple[TrainConfig, RunFolder | None]:
    """Settings, and the run where they are one's."""
    run = None
    if isinstance(given, TrainConfig | dict) or (not isinstance(given, RunFolder) and not Path(given).is_dir()):
        config = read_settings(given)[0]
    else:
        run = given if isinstance(given, RunFolder) else RunFolder.open(given)
        config = load_config(run.config_path)[0]
    return with_side_files(config)[0], run


def _family_of(memory: MemoryEstimate | None) -> Family:
    """The model's family; Stable Diffusion where no estimate says it."""
    return FAMILIES[memory.family if memory is not None and memory.family else "sd1"]


def _latents(config: TrainConfig, images: _Images, settings: PlanSettings, family: Family) -> tuple[str, int]:
    if images.dataset is None or not len(images.dataset):
        return "off", 0
    return latent_cache_bytes(config, images.dataset, settings, family.latent_space.stored_channels)


def _seconds_of(
    config: TrainConfig,
    steps: StepCount,
    step: StepSeconds | None,
    memory: MemoryEstimate | None,
    *,
    latents: str,
    num_texts: int,
) -> dict[str, float]:
    """Seconds by part of the run; nothing where the steps or their time are not known.

    Sampling and encoding images are counted in forward passes, whose time is a share of a step's; encoding captions in its
    operations.

    Args:
        latents: where they are kept.
        num_texts: captions that a large text encoder encodes before the run.
    """
    if step is None or not steps.num_steps:
        return {}
    assert isinstance(config.batch_size, int)
    passes = FORWARDS_IN_A_STEP[config.training_kind] + config.gradient_checkpointing * config.checkpointing_share
    forward = step.seconds / (passes * config.batch_size * config.grad_accum)
    parts = {"training": step.seconds * steps.num_steps}
    sampler = _family_of(memory).sampler
    samples, (drawn, _) = num_samples(config, steps.num_steps), _grids(config, sampler)
    if samples:
        predictions = 2 if sampler.guidance == "cfg" else 1
        num_steps = prompts_of(config, sampler).settings.num_inference_steps
        parts["samples"] = samples * drawn * num_steps * predictions * forward
    if latents != "off" and steps.num_images:
        crops = steps.num_images * config.cache_variants * len(possible_flips(config.flip_p))
        if latents == "memory":  # what is never drawn is never encoded
            crops = min(crops, steps.num_steps * config.batch_size * config.grad_accum)
        parts["latents"] = crops * ENCODING_IN_FORWARDS * forward
    if memory is not None and num_texts:
        parts["captions"] = num_texts * step.seconds * memory.text_flops / memory.step_flops
    return parts


def _launch_seconds(config: TrainConfig, gpu_spec: GpuSpec | None) -> float | None:
    """The launch cost of this machine's host, if it has that GPU."""
    from everydream_kit.preflight.host_speed import launch_seconds_here

    return None if gpu_spec is None else launch_seconds_here(gpu_spec, Path(config.logdir) / ".edk_cache" / "preflight")


def _grids(config: TrainConfig, sampler: SamplerSpec) -> tuple[int, int]:
    """Images of one sampling, and the pixels of all of them."""
    from everydream_kit.training.sampling_listener import sample_grids

    grids = sample_grids(config, sampler)
    return sum(number for _, number in grids), sum(number * width * height for (width, height), number in grids)


def _count_texts(config: TrainConfig, images: _Images, memory: MemoryEstimate) -> int:
    """Captions that a large text encoder encodes before the run, and keeps on disk."""
    if images.dataset is None or not memory.text_bytes:
        return 0
    settings = make_plan_settings(config, max(0, config.seed), 1)
    return len(set(texts_of_run(config, images.dataset, settings, large_texts=True) or ()))


def _disk(made: Plan, latent_bytes: int, text_bytes: int) -> DiskUse | None:
    if made.memory is None or not made.steps.num_steps:
        return None
    return estimate_disk(
        made.config,
        made.memory,
        num_steps=made.steps.num_steps,
        steps_per_epoch=made.steps.per_epoch or made.steps.num_steps,
        seconds=made.seconds,
        latent_bytes=latent_bytes,
        text_bytes=text_bytes,
        grid_pixels=_grids(made.config, _family_of(made.memory).sampler)[1],
    )


def _table_price(config: TrainConfig, gpu_spec: GpuSpec | None) -> Price | None:
    if gpu_spec is None:
        return None
    host = detect_host()
    return find_price(gpu_spec.name, read_prices(config.logdir), host.name if host.is_rented else None)


def _offer(config: TrainConfig, budget: Budget) -> Offer:
    try:
        batch: int | None = largest_batch(config, budget)[0]
    except MemoryLimitError:
        batch = None
    resolution = largest_resolution(config, budget)
    return Offer(batch, None if resolution is None else resolution[0])


def _too_large(made: Plan) -> str:
    assert made.memory is not None
    need, there = made.memory.peak_bytes / 2**30, made.room_bytes / 2**30
    where = f"the {made.device}" if made.gpu_spec is not None else made.device
    return f"It does not fit {where}: {need:.1f} GiB are estimated; {there:.1f} GiB are available."


def _assumptions(config: TrainConfig, gpu_spec: GpuSpec | None) -> Iterator[str]:
    where = with_article(gpu_spec.name) if gpu_spec is not None else "a CPU"
    yield f"memory is estimated by rehearsing the trainer's own step for {where}, with {MARGIN:.0%} of the memory kept free"
    yield "time counts training, samples and encoding; not downloads, set-up, validation and loading"
    if config.cuda_graphs == "on":
        yield "cuda_graphs: what they gain was not measured on a GPU yet; the time is that of eager steps"
    if config.max_steps is None:
        yield "every epoch has as many steps as the first"
    if config.seed == -1:
        yield "the seed is drawn when the run starts; the number of steps may differ by a few"


__all__ = ["Plan", "corrected", "plan"]
