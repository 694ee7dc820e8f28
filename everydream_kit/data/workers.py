"""What decoding processes have in common, whether they decode for the trainer (`loader`) or for the latent cache (`cache`)."""

from __future__ import annotations

import signal
from typing import Any

from everydream_kit.data.dataset import DatasetImage
from everydream_kit.data.pixels import Crop, ImageTransform, LoadedPixels, load_pixels
from everydream_kit.data.reading_problems import Problem
from everydream_kit.data.records import Size
from everydream_kit.errors import DataError

_OF_THE_TERMINAL = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
"""Windows has no SIGHUP."""


def leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C, a polite kill and a closed terminal reach the whole process group, but the trainer stops, saves, then closes us."""
    for number in _OF_THE_TERMINAL:
        signal.signal(number, signal.SIG_IGN)


def as_is(item: Any) -> Any:
    """Nothing is left to collate: a named function, so that it can be pickled."""
    return item


def load_crop(
    image: DatasetImage, bucket: Size, crop: Crop, background: str, transform: ImageTransform | None = None
) -> LoadedPixels:
    """One crop of an image of the dataset. Raises: DataError, as `load_pixels`."""
    size, mask = (image.width, image.height), image.mask_path
    return load_pixels(image.path, bucket, crop, size=size, background=background, mask_path=mask, transform=transform)


def problem_of(path: str, error: DataError) -> Problem:
    """What the person reads about an image that broke while it was decoded."""
    return Problem(path, str(error).removeprefix(f"{path}: ").removesuffix("."), "The run continues without it.")
