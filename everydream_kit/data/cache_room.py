"""How much room the latent cache takes, estimated before anything is encoded, and how much there is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import psutil

from everydream_kit.data.dataset import Dataset
from everydream_kit.data.epoch_plan import PlanSettings, possible_buckets
from everydream_kit.data.pixels import LATENT_CELL_PIXELS
from everydream_kit.data.records import Size
from everydream_kit.disk_space import free_disk, lack_of_room
from everydream_kit.errors import DiskSpaceError

CacheMode = Literal["off", "memory", "disk"]

MOMENT_CHANNELS = 8
"""Of SD's VAEs: mean and log-variance of four channels. Others say their own."""
BYTES_PER_VALUE = 2
"""float16: the moments of SD's VAEs stay within ±30, and its rounding is far below the posterior's own noise."""

HEADER_BYTES = 128
"""Of one tensor in a shard's header, generously."""


def possible_flips(flip_p: float) -> tuple[bool, ...]:
    """What mirroring can come out as."""
    if flip_p <= 0:
        return (False,)
    return (True,) if flip_p >= 1 else (False, True)


def entry_bytes(bucket: Size, has_mask: bool, channels: int = MOMENT_CHANNELS) -> int:
    """Size of one entry of so many channels, with its line in the shard's header."""
    cells = bucket[0] * bucket[1] // LATENT_CELL_PIXELS**2
    return cells * (channels * BYTES_PER_VALUE + has_mask) + HEADER_BYTES * (1 + has_mask)


def estimate_bytes(
    dataset: Dataset,
    plan_settings: PlanSettings,
    *,
    variants: int = 4,
    fixed: bool = False,
    channels: int = MOMENT_CHANNELS,
) -> int:
    """Most bytes that the cache of a dataset can take. Equal crops and duplicate images take them once only."""
    total = 0
    for index, bucket in possible_buckets(dataset, plan_settings):
        image = dataset.image(index)
        crops = 1 if fixed else variants * len(possible_flips(image.flip_p))
        total += crops * entry_bytes(bucket, image.mask_path is not None, channels)
    return total


def choose_cache_mode(
    needed_bytes: int,
    folder: Path,
    *,
    free_memory_bytes: int | None = None,
    free_disk_bytes: int | None = None,
) -> CacheMode:
    """What `cache_latents: auto` means here: memory up to a quarter of what is free, disk up to half, else off.

    Args:
        needed_bytes: what `estimate_bytes` says.
        folder: where the disk cache would be.
        free_memory_bytes, free_disk_bytes: measured unless given.
    """
    memory = free_memory() if free_memory_bytes is None else free_memory_bytes
    if needed_bytes <= memory / 4:
        return "memory"
    disk = free_disk(folder) if free_disk_bytes is None else free_disk_bytes
    return "disk" if needed_bytes <= disk / 2 else "off"


def free_memory() -> int:
    """Bytes of memory that this process can still take: the machine's, or the container's where that is less."""
    available = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # files that were read count as used until someone needs the room
        return min(available, limit - used + int(statistics.get("inactive_file", 0)))
    except (OSError, ValueError):  # no container, or no limit ("max")
        return available


def check_room(folder: Path, entries: Iterable[tuple[Size, bool]], channels: int = MOMENT_CHANNELS) -> None:
    """Refuse to start what would not fit.

    Args:
        folder: of the cache.
        entries: bucket of each entry that is to be written, and whether it has a mask.
        channels: of an entry.

    Raises:
        DiskSpaceError: the disk has not enough space.
    """
    needed = sum(entry_bytes(bucket, has_mask, channels) for bucket, has_mask in entries)
    lack = lack_of_room(folder, needed) if needed else None
    if lack is not None:
        raise DiskSpaceError(
            f"{folder}: the latent cache {lack}. Lower cache_variants, set latent_cache_dir to a larger disk, or set "
            f"cache_latents to off."
        )
