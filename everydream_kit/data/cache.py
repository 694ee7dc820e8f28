"""The latent cache: pictures are encoded once, and crop jitter and mirroring survive.

For every picture (and bucket) K crops are fixed by the picture's contents, each also mirrored where the picture may be;
every use of the picture draws one of them by its own address. What is kept are the moments of the VAE's posterior, so
the sampling noise is drawn anew at every use too.

A wrong hit is impossible: an entry is named by the hash of file contents (mask included), bucket, crop and mirroring,
and lives in a folder named by the hash of VAE weights and pixel settings. So a changed picture, model or setting is
simply not found and encoded; a renamed picture is found. Not here: how entries are stored (`latents`), how much room
they take (`cache_room`), and the VAE itself, which comes in as a function.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from everydream_kit import draws
from everydream_kit.data import pixels
from everydream_kit.data.cache_room import check_room, possible_flips
from everydream_kit.data.contents import digest_pictures
from everydream_kit.data.dataset import Dataset, Picture, Problem
from everydream_kit.data.latents import DiskStore, Entry, LatentStore, MemoryStore
from everydream_kit.data.plan import PlanSettings, possible_buckets
from everydream_kit.data.records import Size
from everydream_kit.data.workers import as_is, leave_signals_to_the_parent, problem_of
from everydream_kit.errors import DataError

EncodeMoments = Callable[[torch.Tensor], torch.Tensor]
"""(B, 3, H, W) uint8 on the CPU -> (B, 8, H/8, W/8) mean and log-variance, on any device."""

PIXEL_VERSION = 1
"""Raised when the same crop of the same file gives other pixels than before."""


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """What cached latents depend on beside the pictures.

    Attributes:
        identity: hash of the VAE's weights (and of the precision it is run in).
        variants: crops for each picture and bucket.
        crop_jitter: largest share of the shorter side that a crop takes from each side.
        background: "#rrggbb" behind transparent pictures.
        fixed: the centre crop only, never mirrored: for validation.
    """

    identity: str
    variants: int = 4
    crop_jitter: float = 0.02
    background: str = "#ffffff"
    fixed: bool = False

    @property
    def folder_name(self) -> str:
        """Hash of what all entries of a folder have in common. Crops are in each entry's own name."""
        text = "\x1f".join([self.identity, self.background.lower(), str(PIXEL_VERSION), str(pixels.DRAFT_FACTOR)])
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


@dataclass
class LatentCache:
    """Cached moments of one dataset. `LatentCache.build` makes it; the loader asks it.

    Attributes:
        settings: what the latents depend on.
        digests: (n, 16) uint8 of the dataset's pictures, in its order.
        store: the entries.
        in_memory: whether they are this process's own.
        problems: pictures that could not be encoded; their weight will be 0.
    """

    settings: CacheSettings
    digests: np.ndarray
    store: LatentStore
    in_memory: bool
    problems: list[Problem] = field(default_factory=list)

    @property
    def fixed(self) -> bool:
        return self.settings.fixed

    @property
    def num_pictures(self) -> int:
        return len(self.digests)

    @classmethod
    def build(
        cls,
        dataset: Dataset,
        plan_settings: PlanSettings,
        encode_moments: EncodeMoments,
        identity: str,
        *,
        folder: Path | None = None,
        variants: int = 4,
        crop_jitter: float = 0.02,
        background: str = "#ffffff",
        fixed: bool = False,
        batch_size: int = 4,
        num_workers: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> LatentCache:
        """Encode what is not in the cache yet. Interrupted and called again, it goes on where it was.

        Args:
            dataset, plan_settings: which pictures, and which buckets each can be put into.
            encode_moments: the VAE.
            identity: hash of the VAE's weights.
            folder: of the disk cache (several models may share it); None keeps the latents in memory.
            variants, crop_jitter, background, fixed: see `CacheSettings`.
            batch_size: crops encoded together.
            num_workers: decoding processes.
            progress: called with the number of crops encoded, and how many there are to encode.

        Raises:
            DiskSpaceError: what is missing would not fit on the disk; nothing has been written.
            DataError: the VAE gave values that are not finite.
        """
        settings = CacheSettings(identity, variants, crop_jitter, background, fixed)
        digests = digest_pictures(
            ((p.path, p.mask_path) for p in map(dataset.picture, range(len(dataset)))),
            len(dataset),
            memo_file=None if folder is None else Path(folder) / "contents.bin",
        )
        store: LatentStore = (
            MemoryStore() if folder is None else DiskStore(Path(folder) / settings.folder_name, settings.folder_name)
        )
        cache = cls(settings, digests, store, in_memory=folder is None)
        jobs = list(cache._missing(dataset, plan_settings))
        if folder is not None:
            check_room(Path(folder), ((job.bucket, job.mask_path is not None) for job in jobs))
        try:
            cache._encode(jobs, encode_moments, batch_size, num_workers, progress)
        finally:  # an interruption keeps what is done
            store.flush()
        return cache

    def draw_crop(
        self, index: int, picture: Picture, bucket: Size, *, seed: int, address: tuple[int | str, ...]
    ) -> pixels.Crop:
        """Which of a picture's cached crops one use of it gets."""
        if self.fixed:
            return pixels.centre_crop(picture.width, picture.height, bucket)
        variant = int(draws.generator(seed, "crop", *address).integers(self.settings.variants))
        crop = self._variant(index, (picture.width, picture.height), bucket, variant)
        return replace(crop, flip=pixels.draw_flip(picture.flip_p, seed=seed, address=address))

    def find(self, index: int, bucket: Size, crop: pixels.Crop) -> Entry | None:
        """The entry of a crop, or None where the picture could not be encoded."""
        return self.store.get(self._name(index, bucket, crop)) if self.digests[index].any() else None

    def _variant(self, index: int, size: Size, bucket: Size, variant: int) -> pixels.Crop:
        """A crop that depends on the picture's contents alone: on no seed, so that all runs share it."""
        address = ("cached", self.digests[index].tobytes().hex(), variant)
        return pixels.draw_crop(
            *size, bucket, crop_jitter=self.settings.crop_jitter, flip_p=0.0, seed=0, address=address
        )

    def _name(self, index: int, bucket: Size, crop: pixels.Crop) -> bytes:
        box = ",".join(map(repr, (*bucket, crop.left, crop.top, crop.width, crop.height, crop.flip)))
        return hashlib.blake2b(self.digests[index].tobytes() + box.encode(), digest_size=16).digest()

    def _crops(self, index: int, picture: Picture, bucket: Size) -> list[pixels.Crop]:
        """Every crop of a picture that `draw_crop` can give."""
        size = (picture.width, picture.height)
        if self.fixed:
            return [pixels.centre_crop(*size, bucket)]
        crops = [self._variant(index, size, bucket, variant) for variant in range(self.settings.variants)]
        return [replace(crop, flip=flip) for crop in crops for flip in possible_flips(picture.flip_p)]

    def _missing(self, dataset: Dataset, plan_settings: PlanSettings) -> Iterator[_Job]:
        """What is still to be encoded, bucket after bucket."""
        asked: set[bytes] = set()  # pictures that are in the dataset twice, variants that fell on the same crop
        for bucket, indices in _by_bucket(dataset, plan_settings).items():
            for index in indices:
                picture = dataset.picture(index)
                if not self.digests[index].any():
                    self.problems.append(
                        Problem(picture.path, "the file cannot be read.", "The run goes on without it.")
                    )
                    continue
                for crop in self._crops(index, picture, bucket):
                    name = self._name(index, bucket, crop)
                    if name not in self.store and name not in asked:
                        asked.add(name)
                        size = (picture.width, picture.height)
                        yield _Job(name, picture.path, size, picture.mask_path, bucket, crop)

    def _encode(
        self,
        jobs: list[_Job],
        encode_moments: EncodeMoments,
        batch_size: int,
        num_workers: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        decoder = DataLoader(
            _JobDecoder(self.settings.background),
            sampler=list(_batches(jobs, batch_size)),
            batch_size=None,
            num_workers=num_workers,
            collate_fn=as_is,
            worker_init_fn=leave_signals_to_the_parent,
            generator=torch.Generator().manual_seed(0),
        )
        done = 0
        broken: set[str] = set()
        for batch in decoder:
            if batch.names:
                with torch.no_grad():
                    moments = encode_moments(batch.pixels)
                self._put(batch, moments)
            for problem in batch.problems:
                if problem.path not in broken:
                    broken.add(problem.path)
                    self.problems.append(problem)
            done += len(batch.names) + len(batch.problems)
            if progress is not None:
                progress(done, len(jobs))

    def _put(self, batch: _DecodedJobs, moments: torch.Tensor) -> None:
        moments = moments.detach().to("cpu", torch.float32)
        for name, path, value, mask in zip(batch.names, batch.paths, moments, batch.masks, strict=True):
            if not torch.isfinite(value).all():
                raise DataError(
                    f"{path}: the VAE encodes it to values that are not finite. Run the VAE in float32 or bfloat16 "
                    f"(some overflow in float16), or set cache_latents to off and look at the picture."
                )
            kept = None if mask is None else torch.from_numpy(np.round(mask * 255).astype(np.uint8))
            self.store.put(name, Entry(value.to(torch.float16), kept))


@dataclass(frozen=True, slots=True)
class _Job:
    """One crop to encode."""

    name: bytes
    path: str
    size: Size
    mask_path: str | None
    bucket: Size
    crop: pixels.Crop


@dataclass(slots=True)
class _DecodedJobs:
    """Crops of one bucket that were decoded, and those that were not."""

    names: list[bytes]
    paths: list[str]
    pixels: torch.Tensor  # (B, 3, H, W) uint8
    masks: list[np.ndarray | None]
    problems: list[Problem]


class _JobDecoder(TorchDataset[_DecodedJobs]):
    """Decodes crops, in the workers."""

    def __init__(self, background: str) -> None:
        self._background = background

    def __getitem__(self, jobs: tuple[_Job, ...]) -> _DecodedJobs:
        names, paths, loaded, problems = [], [], [], []
        for job in jobs:
            try:
                item = pixels.load_pixels(
                    job.path, job.bucket, job.crop, size=job.size, background=self._background, mask_path=job.mask_path
                )
            except DataError as error:
                problems.append(problem_of(job.path, error))
                continue
            names.append(job.name)
            paths.append(job.path)
            loaded.append(item)
        width, height = jobs[0].bucket
        stacked = np.empty((len(loaded), 3, height, width), np.uint8)
        for row, item in enumerate(loaded):
            stacked[row] = item.pixels.transpose(2, 0, 1)
        return _DecodedJobs(names, paths, torch.from_numpy(stacked), [item.mask for item in loaded], problems)


def _batches(jobs: list[_Job], batch_size: int) -> Iterator[tuple[_Job, ...]]:
    """Jobs of one bucket together; they come bucket after bucket."""
    start = 0
    while start < len(jobs):
        end = start
        while end < len(jobs) and end - start < batch_size and jobs[end].bucket == jobs[start].bucket:
            end += 1
        yield tuple(jobs[start:end])
        start = end


def _by_bucket(dataset: Dataset, plan_settings: PlanSettings) -> dict[Size, list[int]]:
    """The pictures that can be put into each bucket, in any epoch."""
    indices: dict[Size, list[int]] = {}
    for index, bucket in possible_buckets(dataset, plan_settings):
        indices.setdefault(bucket, []).append(index)
    return indices
