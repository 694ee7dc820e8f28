"""From a planned micro-batch to tensors: pixels decoded from files or moments from the latent cache, captions, weights.

This runs in the loader's workers and needs no dataset: a request carries what is known of its images. Every draw is
addressed by (seed, purpose, epoch, image key, repeat). Not here: order and processes (`loader`).

An image that breaks while it is decoded becomes gray with weight 0, so that shapes stay as planned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from everydream_kit import draws
from everydream_kit.config import default_of
from everydream_kit.data import pixels
from everydream_kit.data.captions import compose_caption
from everydream_kit.data.dataset import DatasetImage
from everydream_kit.data.reading_problems import Problem
from everydream_kit.data.records import Batch, MicroBatch, Size
from everydream_kit.data.workers import load_crop, problem_of
from everydream_kit.errors import DataError

if TYPE_CHECKING:
    from everydream_kit.data.cache import LatentCache

CaptionTransform = Callable[[str], str]
"""A plug-in's change to a composed caption."""

NEUTRAL_GRAY = 128


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """What the decoding of a micro-batch depends on, next to its addresses.

    Attributes:
        seed: of the run.
        crop_jitter: largest share of the shorter side that a random crop takes from each side.
        background: "#rrggbb" behind transparent images.
        fixed: nothing is drawn: center crop, no mirroring, no dropout, tags as written. For validation.
        caption_transform, image_transform: plug-ins; they must be picklable where workers are spawned.
        caption_variants: texts of each image over the run, where its caption is drawn; None: a new one at every use.
    """

    seed: int
    crop_jitter: float = default_of("crop_jitter")
    background: str = default_of("background")
    fixed: bool = False
    caption_transform: CaptionTransform | None = None
    image_transform: pixels.ImageTransform | None = None
    caption_variants: int | None = None


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A micro-batch and what a worker must know of its images, row by row."""

    planned: MicroBatch
    images: tuple[DatasetImage, ...]
    keys: tuple[str, ...]

    def address(self, row: int) -> tuple[int | str, ...]:
        """Address of all random draws of a row: epoch, image key, repeat."""
        return (self.planned.epoch, self.keys[row], self.planned.draws[row].repeat)


@dataclass(slots=True)
class LoadedBatch:
    """What a worker returns: the batch, and the images that could not be decoded."""

    batch: Batch
    problems: list[Problem] = field(default_factory=list)

    def pin_memory(self) -> LoadedBatch:
        """Called by torch's pinning thread: page-locked memory, from which copies to the GPU do not wait."""
        pinned = {
            name: tensor.pin_memory()
            for name in ("pixels", "moments", "mask", "loss_scale")
            if (tensor := getattr(self.batch, name)) is not None
        }
        return LoadedBatch(replace(self.batch, **pinned), self.problems)


def load_batch(request: BatchRequest, settings: LoadSettings, latent_cache: LatentCache | None = None) -> LoadedBatch:
    """Load one micro-batch: pixels decoded from the files, or moments from the cache."""
    if latent_cache is not None:
        return _load_moments(request, settings, latent_cache)
    rows: list[tuple[pixels.Crop, pixels.LoadedPixels | None]] = []
    problems: list[Problem] = []
    for row, image in enumerate(request.images):
        crop = crop_for(request, row, settings)
        try:
            rows.append(
                (crop, load_crop(image, request.planned.bucket, crop, settings.background, settings.image_transform))
            )
        except DataError as error:
            problems.append(problem_of(image.path, error))
            rows.append((crop, None))
    return LoadedBatch(_assemble_pixels(request, rows, settings), problems)


def crop_for(request: BatchRequest, row: int, settings: LoadSettings) -> pixels.Crop:
    """The crop of one row of a request."""
    planned, image = request.planned, request.images[row]
    if settings.fixed:
        return pixels.center_crop(image.width, image.height, planned.bucket)
    return pixels.draw_crop(
        image.width,
        image.height,
        planned.bucket,
        crop_jitter=settings.crop_jitter,
        flip_p=image.flip_p,
        seed=settings.seed,
        address=request.address(row),
    )


def caption_for(request: BatchRequest, row: int, settings: LoadSettings) -> str:
    """The text of one row of a request: drawn from alternatives, shuffled, dropped out."""
    image, address = request.images[row], request.address(row)
    if settings.fixed:
        caption, shuffle = replace(image.caption, alternatives=()), False
    elif draws.generator(settings.seed, "dropout", *address).random() < image.cond_dropout:
        return ""
    else:
        caption, shuffle = image.caption, image.shuffle_tags
    if settings.caption_variants is not None:
        epoch, *others = address
        address = (int(epoch) % settings.caption_variants, *others)
    text = compose_caption(caption, draws.generator(settings.seed, "caption", *address), shuffle, image.keep_tags)
    return text if settings.caption_transform is None else settings.caption_transform(text)


def _assemble_pixels(
    request: BatchRequest, rows: list[tuple[pixels.Crop, pixels.LoadedPixels | None]], settings: LoadSettings
) -> Batch:
    """Stack decoded rows; a row that is None becomes gray with weight 0."""
    width, height = request.planned.bucket
    stacked = np.full((len(rows), 3, height, width), NEUTRAL_GRAY, np.uint8)
    for row, (_, loaded) in enumerate(rows):
        if loaded is not None:
            stacked[row] = loaded.pixels.transpose(2, 0, 1)
    masks = [None if loaded is None else loaded.mask for _, loaded in rows]
    broken = [loaded is None for _, loaded in rows]
    crops = [crop for crop, _ in rows]
    batch = _assemble(request, settings, crops, masks, broken)
    batch.pixels = torch.from_numpy(stacked)
    return batch


def _load_moments(request: BatchRequest, settings: LoadSettings, cache: LatentCache) -> LoadedBatch:
    """Look every row up in the latent cache. An image that could not be encoded has weight 0."""
    width, height = request.planned.bucket
    channels = cache.settings.channels
    stacked = torch.zeros(
        len(request.images), channels, height // pixels.LATENT_CELL_PIXELS, width // pixels.LATENT_CELL_PIXELS
    )
    problems, crops, masks, broken = [], [], [], []
    for row, image in enumerate(request.images):
        index = request.planned.draws[row].image
        crop = cache.draw_crop(index, image, request.planned.bucket, seed=settings.seed, address=request.address(row))
        entry = cache.find(index, image, request.planned.bucket, crop)
        if entry is None:
            problems.append(cache.problem(image))
        else:
            stacked[row] = entry.moments
        crops.append(crop)
        masks.append(None if entry is None or entry.mask is None else entry.mask.numpy() / np.float32(255))
        broken.append(entry is None)
    batch = _assemble(request, settings, crops, masks, broken)
    batch.moments = stacked
    return LoadedBatch(batch, problems)


def _assemble(
    request: BatchRequest,
    settings: LoadSettings,
    crops: list[pixels.Crop],
    masks: list[np.ndarray | None],
    broken: list[bool],
) -> Batch:
    """Everything of a batch but its pixels or moments."""
    planned, images = request.planned, request.images
    weights = [
        0.0 if draw.filler or is_broken else image.loss_scale
        for draw, image, is_broken in zip(planned.draws, images, broken, strict=True)
    ]
    return Batch(
        planned=planned,
        captions=[caption_for(request, row, settings) for row in range(len(images))],
        loss_scale=torch.tensor(weights, dtype=torch.float32),
        pixels=None,
        moments=None,
        mask=_stack_masks(masks, planned.bucket),
        original_sizes=[(image.width, image.height) for image in images],
        crop_top_lefts=[
            crop.top_left_in_bucket(image.width, planned.bucket) for crop, image in zip(crops, images, strict=True)
        ],
        paths=[image.path for image in images],
    )


def _stack_masks(masks: list[np.ndarray | None], bucket: Size) -> torch.Tensor | None:
    """(B, 1, H/8, W/8) float32; images without a mask count everywhere. None where no image has one."""
    if all(mask is None for mask in masks):
        return None
    shape = (len(masks), 1, bucket[1] // pixels.LATENT_CELL_PIXELS, bucket[0] // pixels.LATENT_CELL_PIXELS)
    stacked = np.ones(shape, np.float32)
    for row, mask in enumerate(masks):
        if mask is not None:
            stacked[row, 0] = mask
    return torch.from_numpy(stacked)
