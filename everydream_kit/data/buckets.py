"""Buckets: the image sizes that are trained at, and which image goes into which.

Every bucket of a resolution holds about resolution² pixels at its own aspect ratio, so batches of different buckets
cost about the same. Tables are computed by one rule for every resolution. EveryDream 2 kept lists written by hand,
some with slips; `docs/differences.md` compares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from everydream_kit.data.records import Size
from everydream_kit.errors import ConfigError

MAX_ASPECT = 4.5
"""Longest bucket. Narrower images go into the longest one and lose their ends; EveryDream 2's tables end there
too."""


def default_bucket_step(resolution: int) -> int:
    """The grid of a resolution's buckets: 64 px from 256 up (whole cells of the deepest UNet layer), 16 px below it.

    16 px is two latent cells: fine enough for 17 aspect ratios at 128 px and 9 at 64 px, where 64 px would leave
    3 and 1. UNets of diffusers take latents that do not halve evenly.
    """
    return 64 if resolution >= 256 else 16


@lru_cache(maxsize=64)
def bucket_table(resolution: int, step: int | None = None) -> tuple[Size, ...]:
    """The buckets of an area class, from tallest to widest, each with its mirror image.

    For every width there is one height: the largest on the grid that keeps the area within resolution².

    Args:
        resolution: side of the square bucket before rounding down to the grid, in pixels.
        step: grid of the sides in pixels; by default `default_bucket_step(resolution)`.

    Raises:
        ConfigError: the resolution is smaller than one step, or the step is not positive.
    """
    step = default_bucket_step(resolution) if step is None else step
    if step < 1 or resolution < step:
        raise ConfigError(
            f"resolution {resolution}: buckets on a grid of {step} px need a resolution of at least one grid step; "
            f"raise the resolution or lower the step."
        )
    area = resolution * resolution
    sizes: set[Size] = set()
    for long in range(resolution // step * step, int(math.sqrt(area * MAX_ASPECT)) + step, step):
        short = min(area // long // step * step, long)
        if short and long <= MAX_ASPECT * short:
            sizes |= {(long, short), (short, long)}
    return tuple(sorted(sizes, key=lambda size: (size[0] / size[1], size)))


def largest_bucket(resolutions: tuple[int, ...]) -> Size:
    """The bucket with the most pixels of all that a run may use; of equal ones the nearest to the square."""
    return max(bucket_table(max(resolutions)), key=lambda size: (size[0] * size[1], -abs(size[0] - size[1])))


def assign_bucket(width: int, height: int, buckets: Sequence[Size]) -> Size:
    """Choose the bucket whose aspect ratio is nearest, in log ratio, so wide and tall err alike.

    Args:
        width, height: image size in pixels, after EXIF rotation.
        buckets: candidate sizes in pixels; must not be empty. `bucket_table` gives them.

    Raises:
        ConfigError: buckets is empty.
    """
    return buckets[int(assign_buckets(np.array([width]), np.array([height]), buckets)[0])]


def assign_buckets(widths: np.ndarray, heights: np.ndarray, buckets: Sequence[Size]) -> np.ndarray:
    """`assign_bucket` for many images at once.

    Of two equally near ones the one nearer to the square is taken, of two with the same aspect ratio the larger.

    Args:
        widths, heights: (n,) pixels.
        buckets: candidate sizes in pixels.

    Returns:
        (n,) int16 indices into `buckets`.

    Raises:
        ConfigError: buckets is empty.
    """
    if not buckets:
        raise ConfigError("buckets: the table is empty; take one from bucket_table(resolution).")
    best: dict[Fraction, int] = {}  # aspect ratio -> index of the largest bucket that has it
    for index, (width, height) in enumerate(buckets):
        aspect = Fraction(width, height)
        if aspect not in best or width * height > math.prod(buckets[best[aspect]]):
            best[aspect] = index
    order = np.array([best[aspect] for aspect in sorted(best)], np.int16)
    ratios = np.log([float(aspect) for aspect in sorted(best)])
    middles = (ratios[1:] + ratios[:-1]) / 2
    aspects = np.log(np.maximum(widths, 1) / np.maximum(heights, 1))
    # An image exactly on a border between two wide buckets belongs to the lower ratio, between two tall ones to the
    # upper: searchsorted's left side does the first, and mirroring does the second.
    wide = np.searchsorted(middles, aspects, side="left")
    tall = np.searchsorted(middles, aspects, side="right")
    chosen: np.ndarray = order[np.where(aspects > 0, wide, tall)]
    return chosen


def upscale_needed(
    widths: np.ndarray, heights: np.ndarray, bucket_widths: np.ndarray, bucket_heights: np.ndarray
) -> np.ndarray:
    """How much each image must be enlarged to cover its bucket; 1 or less means that it is large enough."""
    factors: np.ndarray = np.maximum(bucket_widths / np.maximum(widths, 1), bucket_heights / np.maximum(heights, 1))
    return factors
