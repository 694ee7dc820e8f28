"""The torch loader: from planned micro-batches to tensors, ahead of the trainer, over the whole run.

One torch `DataLoader` lives as long as the run. Its sampler walks the epochs' plans in the main process (one plan in
memory at a time) and sends each micro-batch to a worker together with what is known of its images, so a worker needs
no dataset of its own: it starts quickly, also where processes are spawned, and stays small. Workers return uint8; the
conversion to float is the device's.

Every draw is addressed by (seed, purpose, epoch, image key, repeat), so neither the number of workers nor the step
at which a run starts changes anything, and no global generator is read. Latents kept in memory are looked up in the
main process; the sampler announces each epoch's uses to their cache, which encodes what is new in that order.

An image that breaks while it is decoded does not end the run: its row becomes gray with weight 0, shapes and the
loss's divisor stay as planned (so all ranks agree and a resumed run equals an uninterrupted one), and it is listed
once in `Loader.problems`. What such an image would have contributed is then zero.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from everydream_kit.config import default_of
from everydream_kit.data.batches import (
    BatchRequest,
    CaptionTransform,
    LoadedBatch,
    LoadSettings,
    caption_for,
    load_batch,
)
from everydream_kit.data.cache import LatentCache, MemoryCache, Use
from everydream_kit.data.dataset import Dataset
from everydream_kit.data.epoch_plan import EpochPlan, PlanSettings, num_empty_epochs, plan_epoch
from everydream_kit.data.pixels import ImageTransform
from everydream_kit.data.reading_problems import Problem
from everydream_kit.data.records import MicroBatch, StepBatches
from everydream_kit.data.workers import as_is, leave_signals_to_the_parent
from everydream_kit.errors import ConfigError

logger = logging.getLogger(__name__)

PREFETCH_PER_WORKER = 4
"""Micro-batches that a worker may be ahead of the trainer."""


def make_loader(
    dataset: Dataset,
    plan_settings: PlanSettings,
    *,
    seed: int,
    start_epoch: int = 0,
    start_step: int = 0,
    num_epochs: int = 1,
    rank: int = 0,
    num_workers: int = 0,
    crop_jitter: float = default_of("crop_jitter"),
    background: str = default_of("background"),
    caption_variants: int | None = None,
    latent_cache: LatentCache | None = None,
    caption_transform: CaptionTransform | None = None,
    image_transform: ImageTransform | None = None,
    pin_memory: bool = False,
    fixed: bool = False,
) -> Loader:
    """Make the iterator over a run's steps.

    Args:
        dataset: the images.
        plan_settings: how epochs are planned.
        seed: of the run: address of crops, mirroring and captions.
        start_epoch, start_step: where the run (re)starts. Nothing before it is planned or loaded.
        num_epochs: how many epochs, `start_epoch` (or what is left of it) included.
        rank: which share of each micro-batch.
        num_workers: decoding processes; 0 decodes in this one. Changes no result.
        crop_jitter: largest share of the shorter side that a random crop takes from each side.
        background: "#rrggbb" behind transparent images.
        caption_variants: texts of each image over the run, where its caption is drawn; None: a new one at every use.
        latent_cache: moments come from here instead of pixels from the files.
        caption_transform: changes each composed caption (not the empty ones that dropout makes).
        image_transform: changes each cropped image.
        pin_memory: page-locked memory, where there is a GPU.
        fixed: nothing is drawn, for validation: center crop, no mirroring, no dropout, tags as written.
    """
    if latent_cache is not None:
        _check_cache(latent_cache, dataset, fixed, image_transform)
    settings = LoadSettings(
        seed, crop_jitter, background, fixed, caption_transform, image_transform, caption_variants=caption_variants
    )
    sampler = _RunSampler(dataset, plan_settings, rank, range(start_epoch, start_epoch + num_epochs), start_step)
    memory = latent_cache if isinstance(latent_cache, MemoryCache) else None
    if memory is not None:
        num_workers = 0  # a look-up costs less than passing its result between processes
        sampler.announce = partial(memory.expect, seed=seed)
    return Loader(sampler, _BatchDecoder(settings, latent_cache), num_workers, pin_memory, memory)


def captions_of_run(
    dataset: Dataset, plan_settings: PlanSettings, settings: LoadSettings, *, num_epochs: int, most: int, rank: int = 0
) -> list[str] | None:
    """Every caption that a run's steps will ask for, in the order of first use; None where there are more than `most`.

    Captions are addressed, so what a step will draw is known before the run.

    Args:
        settings: as `make_loader` has them; no pixels are read.
    """
    found: dict[str, None] = {}
    for request in _RunSampler(dataset, plan_settings, rank, range(num_epochs), 0):
        found.update((caption_for(request, row, settings), None) for row in range(len(request.images)))
        if len(found) > most:
            return None
    return list(found)


def _check_cache(cache: LatentCache, dataset: Dataset, fixed: bool, image_transform: ImageTransform | None) -> None:
    """Refuse combinations in which the cache would silently give something else than what was asked for."""
    if image_transform is not None:
        raise ConfigError("cache_latents, plugins: a plug-in changes images, cached latents would not: switch one off.")
    if cache.settings.fixed != fixed or cache.num_images != len(dataset):
        raise ConfigError(
            f"latent_cache: built for {cache.num_images} images with fixed={cache.settings.fixed}, "
            f"used for {len(dataset)} with fixed={fixed}; build one for this dataset."
        )


class Loader(Iterator[StepBatches]):
    """Iterates over the steps of a run. `close()` ends its workers; so does the end of the run.

    Attributes:
        problems: images that broke while they were decoded, each once.
    """

    def __init__(
        self,
        sampler: _RunSampler,
        decoder: _BatchDecoder,
        num_workers: int,
        pin_memory: bool,
        memory_cache: MemoryCache | None = None,
    ) -> None:
        self.problems: list[Problem] = []
        self._memory_cache = memory_cache
        self._known_problems: set[str] = set()
        self._heads = sampler.heads
        self._loader: DataLoader[LoadedBatch] | None = DataLoader(
            decoder,
            sampler=sampler,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=as_is,
            worker_init_fn=leave_signals_to_the_parent,
            pin_memory=pin_memory,
            prefetch_factor=PREFETCH_PER_WORKER if num_workers else None,
            # torch draws a seed for its workers: from here, not from the global generator
            generator=torch.Generator().manual_seed(0),
        )
        self._batches: Iterator[LoadedBatch] | None = None

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> StepBatches:
        if self._loader is None:
            raise StopIteration
        if self._batches is None:  # workers start when the first step is requested
            self._batches = iter(self._loader)
        encoding_before = self._encoding_seconds()
        first = next(self._batches, None)
        if first is None:
            self.close()
            raise StopIteration
        head, num_batches = self._heads.popleft()
        loaded = [first, *(next(self._batches) for _ in range(num_batches - 1))]
        for item in loaded:
            self._note(item.problems)
        spent = self._encoding_seconds() - encoding_before
        return replace(head, batches=[item.batch for item in loaded], encoding_seconds=spent)

    def close(self) -> None:
        """End the workers. Iteration ends; calling it again does nothing."""
        if self._memory_cache is not None:
            self._memory_cache.close()
        batches, self._batches, self._loader = self._batches, None, None
        shutdown = getattr(batches, "_shutdown_workers", None)  # torch has no public name for it
        if shutdown is not None:
            shutdown()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _encoding_seconds(self) -> float:
        return 0.0 if self._memory_cache is None else self._memory_cache.encoding_seconds

    def _note(self, problems: list[Problem]) -> None:
        for problem in problems:
            if problem.path not in self._known_problems:
                self._known_problems.add(problem.path)
                self.problems.append(problem)
                logger.warning("%s", problem)


class _RunSampler(Sampler[BatchRequest]):
    """Walks over the plans of a run's epochs, in the main process.

    Attributes:
        heads: of the steps whose batches have been asked for, and which nobody has taken yet: each without its batches, and
            their number.
        announce: called at each epoch's beginning with the uses that it will request, in their order.
    """

    def __init__(
        self, dataset: Dataset, plan_settings: PlanSettings, rank: int, epochs: range, start_step: int
    ) -> None:
        self.heads: deque[tuple[StepBatches, int]] = deque()
        self.announce: Callable[[Iterator[Use]], None] | None = None
        self._dataset = dataset
        self._plan_settings = plan_settings
        self._rank = rank
        self._epochs = epochs
        self._start_step = start_step

    def __iter__(self) -> Iterator[BatchRequest]:
        for epoch in self._epochs:
            plan = plan_epoch(self._dataset, self._plan_settings, epoch)
            first = self._start_step if epoch == self._epochs.start else 0
            if self.announce is not None:
                self.announce(self._uses(plan, first))
            divisor = plan.images_in_fullest_step
            after = range(epoch + 1, self._epochs.stop)
            num_empty_after = num_empty_epochs(self._dataset, self._plan_settings, after)
            for step in range(first, plan.num_steps):
                batches = plan.step(step, self._rank)
                images = plan.images_in_step(step)
                head = StepBatches(epoch, step, plan.num_steps, images, divisor, [], num_empty_after)
                self.heads.append((head, len(batches)))
                for planned in batches:
                    yield self._request(planned)

    def _uses(self, plan: EpochPlan, first: int) -> Iterator[Use]:
        """Every use of an image from a step on, drawn on demand."""
        for step in range(first, plan.num_steps):
            for request in map(self._request, plan.step(step, self._rank)):
                for row, draw in enumerate(request.planned.draws):
                    yield Use(draw.image, request.images[row], request.planned.bucket, request.address(row))

    def _request(self, planned: MicroBatch) -> BatchRequest:
        indices = [draw.image for draw in planned.draws]
        return BatchRequest(planned, tuple(map(self._dataset.image, indices)), tuple(map(self._dataset.key, indices)))


class _BatchDecoder(TorchDataset[LoadedBatch]):
    """Makes tensors of a request. Lives in the workers; holds settings only."""

    def __init__(self, settings: LoadSettings, latent_cache: LatentCache | None = None) -> None:
        self._settings = settings
        self._latent_cache = latent_cache

    def __getitem__(self, request: BatchRequest) -> LoadedBatch:
        return load_batch(request, self._settings, self._latent_cache)
