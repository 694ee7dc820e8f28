"""From crops to latents: decoded from their files, in processes next to this one where there are many, and encoded
here.

Whoever keeps the results (`cache`) says which crops, in which order; they come back in that order. The VAE comes in as
a function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, groupby, islice

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from everydream_kit.data import pixels
from everydream_kit.data.dataset import DatasetImage
from everydream_kit.data.latents import Entry
from everydream_kit.data.reading_problems import Problem
from everydream_kit.data.records import Size
from everydream_kit.data.workers import as_is, leave_signals_to_the_parent, load_crop, problem_of
from everydream_kit.errors import DataError

EncodeMoments = Callable[[torch.Tensor], torch.Tensor]
"""(B, 3, H, W) uint8 on the CPU -> (B, 8, H/8, W/8) mean and log-variance, on any device."""

WORTH_PROCESSES = 64
"""Crops from which on decoding is given to other processes: to start them costs as much as decoding a few dozen."""


@dataclass(frozen=True, slots=True)
class EncodingJob:
    """One crop to encode, and the name that it is kept under."""

    name: bytes
    image: DatasetImage
    bucket: Size
    crop: pixels.Crop


@dataclass(slots=True)
class EncodedCrops:
    """What became of some jobs: entries by name, and the names of those whose image could not be decoded, with why."""

    entries: dict[bytes, Entry] = field(default_factory=dict)
    problems: dict[bytes, Problem] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CropEncoder:
    """Encodes crops.

    Attributes:
        encode_moments: the VAE.
        background: "#rrggbb" behind transparent images.
        num_workers: decoding processes, where there are enough crops.
        batch_size: neighbors of one bucket that go through the VAE together. With 1, an entry's last digits depend on
            no other crop.
    """

    encode_moments: EncodeMoments
    background: str
    num_workers: int = 0
    batch_size: int = 1

    def encode(self, jobs: Iterable[EncodingJob]) -> Iterator[EncodedCrops]:
        """Encode one batch after the other, on demand.

        Raises:
            DataError: the VAE gave values that are not finite.
        """
        jobs = iter(jobs)
        first = list(islice(jobs, WORTH_PROCESSES))
        loader = DataLoader(
            _Decoder(self.background),
            sampler=_batches(chain(first, jobs), self.batch_size),
            batch_size=None,
            num_workers=self.num_workers if len(first) == WORTH_PROCESSES else 0,
            collate_fn=as_is,
            worker_init_fn=leave_signals_to_the_parent,
            # torch draws a seed for its workers: from here, not from the global generator
            generator=torch.Generator().manual_seed(0),
        )
        for decoded in loader:
            yield self._encode_batch(decoded)

    def _encode_batch(self, decoded: _DecodedCrops) -> EncodedCrops:
        encoded = EncodedCrops(problems=decoded.problems)
        if decoded.jobs:
            with torch.no_grad():
                moments = self.encode_moments(decoded.pixels).to("cpu", torch.float32)
            for job, value, mask in zip(decoded.jobs, moments, decoded.masks, strict=True):
                encoded.entries[job.name] = _entry(job, value, mask)
        return encoded


@dataclass(slots=True)
class _DecodedCrops:
    """Crops of one bucket that were decoded, and those that were not."""

    jobs: list[EncodingJob]
    pixels: torch.Tensor  # (B, 3, H, W) uint8
    masks: list[np.ndarray | None]
    problems: dict[bytes, Problem]


class _Decoder(TorchDataset[_DecodedCrops]):
    """Decodes crops, in the workers."""

    def __init__(self, background: str) -> None:
        self._background = background

    def __getitem__(self, jobs: tuple[EncodingJob, ...]) -> _DecodedCrops:
        done, loaded, problems = [], [], {}
        for job in jobs:
            try:
                item = load_crop(job.image, job.bucket, job.crop, self._background)
            except DataError as error:
                problems[job.name] = problem_of(job.image.path, error)
            else:
                done.append(job)
                loaded.append(item)
        width, height = jobs[0].bucket
        stacked = np.empty((len(loaded), 3, height, width), np.uint8)
        for row, item in enumerate(loaded):
            stacked[row] = item.pixels.transpose(2, 0, 1)
        return _DecodedCrops(done, torch.from_numpy(stacked), [item.mask for item in loaded], problems)


def _batches(jobs: Iterable[EncodingJob], batch_size: int) -> Iterator[tuple[EncodingJob, ...]]:
    """Neighbors of one bucket together."""
    for _, neighbors in groupby(jobs, key=lambda job: job.bucket):
        while batch := tuple(islice(neighbors, batch_size)):
            yield batch


def _entry(job: EncodingJob, moments: torch.Tensor, mask: np.ndarray | None) -> Entry:
    if not torch.isfinite(moments).all():
        raise DataError(
            f"{job.image.path}: the VAE encodes it to values that are not finite. Run the VAE in float32 or bfloat16 "
            f"(some overflow in float16), or set cache_latents to off and look at the image."
        )
    kept = None if mask is None else torch.from_numpy(np.round(mask * 255).astype(np.uint8))
    # A copy: a row of a batch would keep the whole batch alive.
    return Entry(moments.to(torch.float16), kept)
