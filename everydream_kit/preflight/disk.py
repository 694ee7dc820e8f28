"""How much disk a run fills: checkpoints as they are saved and pruned, single files, latents, samples, on which file
system.

The saves are gone through one by one, in the saver's own order: a new checkpoint is complete before an older one goes,
so the most that is there at once is more than what is left at the end. Both are reported; what must fit is the peak.

Not here: the size of one checkpoint (`memory_estimate`), and how long the run takes (`planning`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from everydream_kit.data.cache_room import estimate_bytes
from everydream_kit.disk_space import compare_sizes, existing_folder, free_disk
from everydream_kit.preflight.memory_estimate import has_ema
from everydream_kit.preflight.units import size
from everydream_kit.training.caching import choose_latent_mode, latent_folder, text_folder
from everydream_kit.training.checkpoint_saving import SavingRules
from everydream_kit.training.checkpoints import RESUMABLE_KEPT

if TYPE_CHECKING:
    from everydream_kit.config import TrainConfig
    from everydream_kit.data.dataset import Dataset
    from everydream_kit.data.epoch_plan import PlanSettings
    from everydream_kit.preflight.memory_records import MemoryEstimate

BYTES_PER_SAMPLE_PIXEL = 2.0
"""A grid is kept as a JPEG of quality 95 (about half a byte) and as a PNG for TensorBoard (about one and a half)."""
LATENT_CACHE, TEXT_CACHE = "latent cache", "text cache"
MOST_SAVES = 100_000
"""Saves that are gone through; a run with more is wrong in other ways."""


@dataclass(frozen=True)
class DiskItem:
    """One kind of file that a run writes.

    Attributes:
        name: in words.
        folder: where.
        most_bytes: the most that is there at once.
        last_bytes: what is left when the run has ended.
        note: how many of what.
    """

    name: str
    folder: Path
    most_bytes: int
    last_bytes: int
    note: str = ""


@dataclass(frozen=True)
class Place:
    """A file system that a run writes to: what it must hold at once, and what it has."""

    folder: Path
    needed_bytes: int
    free_bytes: int

    @property
    def is_short(self) -> bool:
        return self.needed_bytes > self.free_bytes


@dataclass(frozen=True)
class DiskUse:
    """What a run writes, by kind and by file system."""

    items: tuple[DiskItem, ...]
    places: tuple[Place, ...]

    @property
    def most_bytes(self) -> int:
        return sum(item.most_bytes for item in self.items)

    @property
    def last_bytes(self) -> int:
        return sum(item.last_bytes for item in self.items)

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for each file system that will not do."""
        return tuple(
            f"{place.folder}: the run {compare_sizes(place.needed_bytes, place.free_bytes)} there. Keep fewer "
            "checkpoints (keep_last_n), write no single files (no_save_ckpt), or put logdir on a larger disk."
            for place in self.places
            if place.is_short
        )


def estimate_disk(
    config: TrainConfig,
    estimate: MemoryEstimate,
    *,
    num_steps: int,
    steps_per_epoch: int,
    seconds: float | None,
    latent_bytes: int = 0,
    text_bytes: int = 0,
    grid_pixels: int = 0,
    free: Mapping[Path, int] | None = None,
) -> DiskUse:
    """Estimate what a run writes.

    Args:
        estimate: for the sizes of what is saved.
        seconds: of the whole run, for saving by the minute; None leaves that rule's saves out.
        latent_bytes: of the latent cache on disk, see `latent_cache_bytes`.
        text_bytes: of the captions that are encoded before the run.
        grid_pixels: of all sample grids of one sampling.
        free: free bytes by folder, measured unless given.
    """
    saves = save_steps(config, num_steps, steps_per_epoch, seconds)
    run = Path(config.logdir)
    items = [_checkpoints(config, estimate, saves, run)]
    if not config.no_save_ckpt:
        one = single_file_bytes(config, estimate) * (2 if has_ema(config) else 1)
        folder = Path(config.save_ckpt_dir or ".")
        kept = min(config.keep_last_n or len(saves), len(saves))
        most = min(kept + 1, len(saves))  # the next is written before the oldest is removed
        note = f"{len(saves)} saved, {kept} kept, {size(one)} each"
        items.append(DiskItem("single files", folder, most * one, kept * one, note))
    if latent_bytes:
        items.append(
            DiskItem(LATENT_CACHE, latent_folder(config), latent_bytes, latent_bytes, "stays for the next run")
        )
    if text_bytes:
        note = f"{text_bytes // estimate.text_bytes:,} captions, about {size(estimate.text_bytes)} each; stay for the next run"
        items.append(DiskItem(TEXT_CACHE, text_folder(config), text_bytes, text_bytes, note))
    samples = num_samples(config, num_steps)
    if samples and grid_pixels:
        total = int(samples * grid_pixels * BYTES_PER_SAMPLE_PIXEL)
        items.append(DiskItem("samples", run, total, total, f"generated {samples} times"))
    return DiskUse(tuple(items), _places(items, free))


def save_steps(config: TrainConfig, num_steps: int, steps_per_epoch: int, seconds: float | None) -> list[int]:
    """Optimizer steps after which a checkpoint is saved, the last one included, by the rules of `training.checkpoint_saving`."""
    rules = SavingRules.of(config)
    steps: set[int] = {num_steps}
    if rules.every_n_minutes is not None and seconds:
        between = rules.every_n_minutes * 60 * num_steps / seconds
        steps |= {round(between * n) for n in range(1, min(MOST_SAVES, int(num_steps / between)) + 1)}
    if config.save_every_n_steps is not None:
        steps |= set(range(config.save_every_n_steps, num_steps, config.save_every_n_steps))
    if config.save_every_n_epochs is not None:
        last_epoch = num_steps // max(1, steps_per_epoch)
        epochs = range(config.save_every_n_epochs, last_epoch + 1, config.save_every_n_epochs)
        steps |= {epoch * steps_per_epoch for epoch in epochs if epoch >= config.save_ckpts_from_n_epochs}
    return sorted(step for step in steps if 0 < step <= num_steps)


def single_file_bytes(config: TrainConfig, estimate: MemoryEstimate) -> int:
    """Of one single-file checkpoint, in half or full precision: all that apps load from it, an adapter merged into it."""
    return estimate.num_file_parameters * (4 if config.save_full_precision else 2)


def num_samples(config: TrainConfig, num_steps: int) -> int:
    """How often samples are generated: every `sample_steps`, at the end, and before the first step if requested."""
    if config.sample_steps is None:
        return int(config.sample_before_training)
    at_steps, rest = divmod(num_steps, config.sample_steps)
    return at_steps + bool(rest) + config.sample_before_training


def latent_cache_bytes(
    config: TrainConfig, dataset: Dataset, plan_settings: PlanSettings, channels: int
) -> tuple[str, int]:
    """Where the latents will be kept (`off`, `memory` or `disk`), and how many bytes they take there.

    Args:
        channels: of what the model's family keeps for each cell.
    """
    mode = choose_latent_mode(
        config.cache_latents,
        dataset,
        plan_settings,
        variants=config.cache_variants,
        channels=channels,
        folder=latent_folder(config),
        transforms_images=bool(config.plugins),  # one of them may
    )
    if mode == "off":
        return mode, 0
    return mode, estimate_bytes(dataset, plan_settings, variants=config.cache_variants, channels=channels)


def _checkpoints(config: TrainConfig, estimate: MemoryEstimate, saves: Sequence[int], folder: Path) -> DiskItem:
    """Go through the saves: the latest two stay resumable (or all), `keep_last_n` stay at all, and the best next to
    them."""
    weights = estimate.weight_bytes_written + estimate.side_bytes_written
    best = (
        0 if config.validation_split_mode == "none" else weights // (2 if has_ema(config) else 1)
    )  # live weights only
    kept = most = 0  # the most grows with every save until pruning holds it
    for number in range(1, len(saves) + 1):
        before, resumable_before = kept, min(number - 1, RESUMABLE_KEPT)
        if config.save_optimizer:
            resumable_before = before
        most = (before + 1) * weights + (resumable_before + 1) * estimate.state_bytes_written + best
        kept = min(before + 1, config.keep_last_n or number)
    resumable = kept if config.save_optimizer else min(kept, RESUMABLE_KEPT)
    last = kept * weights + resumable * estimate.state_bytes_written + best
    one = size(weights)
    note = f"{len(saves)} saved, {kept} kept, {one} each; {resumable} with {size(estimate.state_bytes_written)} of resume state"
    return DiskItem("checkpoints", folder, most, last, note)


def _places(items: Sequence[DiskItem], free: Mapping[Path, int] | None) -> tuple[Place, ...]:
    """Needs by file system: folders on the same one share its free bytes."""
    needs: dict[int | Path, tuple[Path, int]] = {}
    for item in items:
        key: int | Path = item.folder if free is not None else existing_folder(item.folder).stat().st_dev
        folder, needed = needs.get(key, (item.folder, 0))
        needs[key] = (folder, needed + item.most_bytes)
    return tuple(
        Place(folder, needed, free_disk(folder) if free is None else free[folder]) for folder, needed in needs.values()
    )
