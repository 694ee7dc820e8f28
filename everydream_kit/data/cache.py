"""The latent cache: images are encoded once, and crop jitter and mirroring survive.

For every image (and bucket) K crops are fixed by the image's contents, each also mirrored where the image may be;
every use of the image draws one of them by its own address. What is kept are the moments of the VAE's posterior, so
the sampling noise is drawn again at every use too.

On disk (`DiskCache`) every crop that can be drawn is encoded before the run: later runs find it, and the loader's
processes only read. In memory (`MemoryCache`) a crop is encoded when it is drawn for the first time: the first step
starts at once, and what no epoch draws is never encoded.

A wrong hit is impossible: an entry is named by the hash of file contents (mask included), bucket, crop and mirroring,
and on disk lives in a folder named by the hash of VAE weights and pixel settings. So a changed image, model or setting
is simply not found and encoded; a renamed image is found. Not here: how entries are stored (`latents`) and made
(`latent_encoding`), and how much room they take (`cache_room`).
"""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from everydream_kit import draws
from everydream_kit.config import default_of
from everydream_kit.data import pixels
from everydream_kit.data.cache_room import MOMENT_CHANNELS, check_room, possible_flips
from everydream_kit.data.dataset import Dataset, DatasetImage
from everydream_kit.data.epoch_plan import PlanSettings, possible_buckets
from everydream_kit.data.image_digests import digest_image, digest_images
from everydream_kit.data.latent_encoding import CropEncoder, EncodedCrops, EncodeMoments, EncodingJob
from everydream_kit.data.latents import DiskStore, Entry
from everydream_kit.data.reading_problems import Problem
from everydream_kit.data.records import Size

PIXEL_VERSION = 1
"""Raised when the same crop of the same file gives other pixels than before."""


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """What cached latents depend on next to the images and the VAE.

    Attributes:
        variants: crops for each image and bucket.
        crop_jitter: largest share of the shorter side that a crop takes from each side.
        background: "#rrggbb" behind transparent images.
        fixed: the center crop only, never mirrored: for validation.
        channels: of what the VAE gives for each cell.
    """

    variants: int = 4
    crop_jitter: float = default_of("crop_jitter")
    background: str = default_of("background")
    fixed: bool = False
    channels: int = MOMENT_CHANNELS

    def folder_name(self, identity: str) -> str:
        """Hash of what all entries of a folder have in common. Crops are in each entry's own name.

        Args:
            identity: hash of the VAE's weights (and of the precision it is run in).
        """
        text = "\x1f".join([identity, self.background.lower(), str(PIXEL_VERSION), str(pixels.DRAFT_FACTOR)])
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


@dataclass(frozen=True, slots=True)
class Use:
    """One use of an image that is to come.

    Attributes:
        index, image: of the dataset.
        bucket: that it is cropped to.
        address: of its random draws.
    """

    index: int
    image: DatasetImage
    bucket: Size
    address: tuple[int | str, ...]


class LatentCache(ABC):
    """Cached moments of one dataset; the loader asks it.

    Attributes:
        settings: what the latents depend on.
        num_images: of the dataset.
        problems: of images that could not be encoded, by path; their weight will be 0.
    """

    def __init__(self, settings: CacheSettings, num_images: int) -> None:
        self.settings = settings
        self.num_images = num_images
        self.problems: dict[str, Problem] = {}

    def draw_crop(
        self, index: int, image: DatasetImage, bucket: Size, *, seed: int, address: tuple[int | str, ...]
    ) -> pixels.Crop:
        """Which of an image's cached crops one use of it gets."""
        if self.settings.fixed:
            return pixels.center_crop(image.width, image.height, bucket)
        # two draws: which of the K crops is of the run's seed and the use, the crop itself of the image's contents alone
        variant = int(draws.generator(seed, "crop", *address).integers(self.settings.variants))
        crop = self._variant(index, image, bucket, variant)
        return replace(crop, flip=pixels.draw_flip(image.flip_p, seed=seed, address=address))

    @abstractmethod
    def find(self, index: int, image: DatasetImage, bucket: Size, crop: pixels.Crop) -> Entry | None:
        """The entry of a crop, or None where the image could not be encoded; `problem` says why."""

    def problem(self, image: DatasetImage) -> Problem:
        """What is wrong with an image that `find` has no entry of."""
        unknown = Problem(image.path, "it could not be encoded for the latent cache", "Replace or remove it.")
        return self.problems.get(image.path, unknown)

    @abstractmethod
    def _digest(self, index: int, image: DatasetImage) -> bytes:
        """Of the image's contents; zeros for a file that cannot be read."""

    def _variant(self, index: int, image: DatasetImage, bucket: Size, variant: int) -> pixels.Crop:
        """A crop that depends on the image's contents alone: on no seed, so that all runs share it."""
        address = ("cached", self._digest(index, image).hex(), variant)
        size, jitter = (image.width, image.height), self.settings.crop_jitter
        return pixels.draw_crop(*size, bucket, crop_jitter=jitter, flip_p=0.0, seed=0, address=address)

    def _name(self, index: int, image: DatasetImage, bucket: Size, crop: pixels.Crop) -> bytes:
        # repr of a float is exact, so two crops that differ in the last bit have two names
        box = ",".join(map(repr, (*bucket, crop.left, crop.top, crop.width, crop.height, crop.flip)))
        return hashlib.blake2b(self._digest(index, image) + box.encode(), digest_size=16).digest()

    def _is_readable(self, index: int, image: DatasetImage) -> bool:
        """Whether the file can be read; if not, that is noted."""
        if any(self._digest(index, image)):
            return True
        unreadable = Problem(image.path, "the file cannot be read", "The run continues without it.")
        self.problems.setdefault(image.path, unreadable)
        return False

    def _note(self, encoded: EncodedCrops) -> None:
        for problem in encoded.problems.values():
            self.problems.setdefault(problem.path, problem)


class MemoryCache(LatentCache):
    """Latents in this process's memory, each encoded when it is drawn for the first time.

    Crops go through the VAE one by one, so a run that continues has the latents of one that never stopped, to the bit.

    Attributes:
        encoding_seconds: spent on encoding so far, with what was waited for decoding.
    """

    def __init__(
        self,
        dataset: Dataset,
        encode_moments: EncodeMoments,
        settings: CacheSettings | None = None,
        *,
        num_workers: int = 0,
    ) -> None:
        """An empty cache.

        Args:
            dataset: the images.
            encode_moments: the VAE.
            settings: what the latents depend on.
            num_workers: processes that decode ahead, where an epoch has many new crops.
        """
        super().__init__(settings or CacheSettings(), len(dataset))
        self.encoding_seconds = 0.0
        self._encoder = CropEncoder(encode_moments, self.settings.background, num_workers)
        self._digests: dict[int, bytes] = {}
        self._entries: dict[bytes, Entry] = {}
        self._broken: set[bytes] = set()
        self._ahead: Iterator[EncodedCrops] = iter(())

    def __len__(self) -> int:
        return len(self._entries)

    def expect(self, uses: Iterable[Use], seed: int) -> None:
        """Announce what will be requested next, in that order, so that images are decoded ahead. Replaces the last
        announcement."""
        self._ahead = self._encoder.encode(self._new_jobs(uses, seed))

    def close(self) -> None:
        """End the processes that decode ahead."""
        self._ahead = iter(())

    def find(self, index: int, image: DatasetImage, bucket: Size, crop: pixels.Crop) -> Entry | None:
        """The entry of a crop, encoded now if it is new; None where the image cannot be decoded.

        Raises:
            DataError: the VAE gave values that are not finite.
        """
        if not self._is_readable(index, image):
            return None
        name = self._name(index, image, bucket, crop)
        if name not in self._entries and name not in self._broken:
            began = time.perf_counter()
            self._encode(EncodingJob(name, image, bucket, crop))
            self.encoding_seconds += time.perf_counter() - began
        return self._entries.get(name)

    def _encode(self, job: EncodingJob) -> None:
        """Encode what was announced up to this crop, and this crop alone if it was not."""
        for encoded in self._ahead:
            self._note(encoded)
            if job.name in self._entries or job.name in self._broken:
                return
        for encoded in self._encoder.encode([job]):
            self._note(encoded)

    def _note(self, encoded: EncodedCrops) -> None:
        super()._note(encoded)
        self._entries.update(encoded.entries)
        self._broken.update(encoded.problems)

    def _new_jobs(self, uses: Iterable[Use], seed: int) -> Iterator[EncodingJob]:
        asked: set[bytes] = set()  # images that are in the dataset twice, uses that drew the same crop
        for use in uses:
            if not self._is_readable(use.index, use.image):
                continue
            crop = self.draw_crop(use.index, use.image, use.bucket, seed=seed, address=use.address)
            name = self._name(use.index, use.image, use.bucket, crop)
            if name not in asked and name not in self._entries and name not in self._broken:
                asked.add(name)
                yield EncodingJob(name, use.image, use.bucket, crop)

    def _digest(self, index: int, image: DatasetImage) -> bytes:
        if index not in self._digests:
            self._digests[index] = digest_image(image.path, image.mask_path)
        return self._digests[index]


class DiskCache(LatentCache):
    """Latents in a folder, encoded before the run; `DiskCache.build` makes it. Picklable: the loader's processes read too."""

    def __init__(self, settings: CacheSettings, digests: np.ndarray, store: DiskStore) -> None:
        """A cache whose entries are there.

        Args:
            settings: what the latents depend on.
            digests: (n, 16) uint8 of the dataset's images, in its order.
            store: the entries.
        """
        super().__init__(settings, len(digests))
        self._digests = digests
        self._store = store

    @classmethod
    def build(
        cls,
        dataset: Dataset,
        plan_settings: PlanSettings,
        encode_moments: EncodeMoments,
        *,
        identity: str,
        folder: Path,
        settings: CacheSettings | None = None,
        batch_size: int = 4,
        num_workers: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> DiskCache:
        """Encode what is not in the folder yet. Interrupted and called again, it continues where it was.

        Args:
            dataset, plan_settings: which images, and which buckets each can be put into.
            encode_moments: the VAE.
            identity: hash of the VAE's weights.
            folder: of the cache; several models may share it.
            settings: what the latents depend on.
            batch_size: crops encoded together.
            num_workers: decoding processes.
            progress: called with the number of crops encoded, and how many there are to encode.

        Raises:
            DiskSpaceError: what is missing would not fit on the disk; nothing has been written.
            DataError: the VAE gave values that are not finite.
        """
        settings = settings or CacheSettings()
        digests = digest_images(
            ((p.path, p.mask_path) for p in map(dataset.image, range(len(dataset)))),
            len(dataset),
            memo_file=Path(folder) / "contents.bin",
        )
        name = settings.folder_name(identity)
        cache = cls(settings, digests, DiskStore(Path(folder) / name, name))
        jobs = list(cache._missing(dataset, plan_settings))
        check_room(Path(folder), ((job.bucket, job.image.mask_path is not None) for job in jobs), settings.channels)
        encoder = CropEncoder(encode_moments, settings.background, num_workers, batch_size)
        done = 0
        try:
            for encoded in encoder.encode(jobs):
                cache._note(encoded)
                done += len(encoded.entries) + len(encoded.problems)
                if progress is not None:
                    progress(done, len(jobs))
        finally:  # an interruption keeps what is done
            cache._store.flush()
        return cache

    def find(self, index: int, image: DatasetImage, bucket: Size, crop: pixels.Crop) -> Entry | None:
        """The entry of a crop, or None where the image could not be encoded."""
        if not self._digests[index].any():
            return None
        return self._store.get(self._name(index, image, bucket, crop))

    def _digest(self, index: int, image: DatasetImage) -> bytes:
        return bytes(self._digests[index].tobytes())

    def _note(self, encoded: EncodedCrops) -> None:
        super()._note(encoded)
        for name, entry in encoded.entries.items():
            self._store.put(name, entry)

    def _crops(self, index: int, image: DatasetImage, bucket: Size) -> list[pixels.Crop]:
        """Every crop of an image that `draw_crop` can give."""
        if self.settings.fixed:
            return [pixels.center_crop(image.width, image.height, bucket)]
        crops = [self._variant(index, image, bucket, variant) for variant in range(self.settings.variants)]
        return [replace(crop, flip=flip) for crop in crops for flip in possible_flips(image.flip_p)]

    def _missing(self, dataset: Dataset, plan_settings: PlanSettings) -> Iterator[EncodingJob]:
        """What is still to be encoded, bucket after bucket."""
        asked: set[bytes] = set()  # images that are in the dataset twice, variants that fell on the same crop
        for index, bucket in sorted(possible_buckets(dataset, plan_settings), key=lambda possible: possible[1]):
            image = dataset.image(index)
            if not self._is_readable(index, image):
                continue
            for crop in self._crops(index, image, bucket):
                name = self._name(index, image, bucket, crop)
                if name not in self._store and name not in asked:
                    asked.add(name)
                    yield EncodingJob(name, image, bucket, crop)
