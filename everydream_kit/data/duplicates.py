"""Finding images that are exact duplicates: byte for byte, or looking alike.

Exact duplicates share their bytes; only files of equal length are read. Near duplicates (another size, another
compression, a light retouch) share their perceptual hash (ImageHash's pHash, 64 bits) to within a few bits
(`MAX_DISTANCE`), and their colors; every image is decoded for that, at a small scale where the format allows. Crops
and mirrored copies are not found.
"""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from everydream_kit.data.dataset import Dataset
from everydream_kit.data.image_digests import digest_file
from everydream_kit.data.image_files import IMAGE_ERRORS, open_header
from everydream_kit.data.reading_problems import Problem
from everydream_kit.plain_text import printable

MAX_DISTANCE = 4
"""Bits of 64 in which the hashes of near duplicates may differ; unrelated photographs differ in about 32."""

MAX_COLOR_DIFFERENCE = 12
"""Mean difference of the 8 x 8 thumbnails' colors, of 255. pHash sees brightness only, and nothing in flat
images."""

_HASH_SIDE = 128
"""Images are hashed at about this size."""

_THUMBNAIL = (8, 8)


@dataclass(frozen=True)
class Duplicates:
    """Groups of indices into the dataset, each of two or more, in the dataset's order.

    Attributes:
        exact: files with the same bytes.
        near: images that look alike. Exact duplicates are in here too, if another image looks like them.
        unreadable: images that turned out to be broken when they were decoded.
    """

    exact: tuple[tuple[int, ...], ...]
    near: tuple[tuple[int, ...], ...]
    unreadable: tuple[Problem, ...]


def find_duplicates(
    dataset: Dataset,
    *,
    near: bool = True,
    max_distance: int = MAX_DISTANCE,
    num_threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Duplicates:
    """Find duplicates in a dataset.

    Args:
        dataset: the images.
        near: look for near duplicates as well, which decodes every image.
        max_distance: bits in which the hashes of near duplicates may differ.
        num_threads: readers; by default one for each core.
        progress: called with the number of images decoded so far.
    """
    exact = _exact_groups(dataset)
    if not near or not len(dataset):
        return Duplicates(exact, (), ())
    hashes = np.zeros(len(dataset), np.uint64)
    thumbnails = np.zeros((len(dataset), *_THUMBNAIL, 3), np.int16)
    unreadable = []
    with warnings.catch_warnings(), ThreadPoolExecutor(num_threads or os.cpu_count() or 1) as pool:
        warnings.filterwarnings("ignore", module=r"PIL\b")  # of damaged EXIF and of large images
        found = pool.map(_read_thumbnail, (dataset.path(index) for index in range(len(dataset))))
        for index, look in enumerate(found):
            if isinstance(look, Problem):
                unreadable.append(look)
                hashes[index] = np.uint64(index)  # no image: its thumbnail keeps it apart
                thumbnails[index] = -1000 * (index + 1) % 32_000
            else:
                hashes[index], thumbnails[index] = look
            if progress is not None:
                progress(index + 1)
    groups = _near_groups(hashes, thumbnails, max_distance)
    already = set(exact)
    return Duplicates(exact, tuple(group for group in groups if group not in already), tuple(unreadable))


def _exact_groups(dataset: Dataset) -> tuple[tuple[int, ...], ...]:
    by_size = defaultdict(list)
    for index, size in enumerate(dataset.numbers["file_bytes"].tolist()):
        by_size[size].append(index)
    by_contents = defaultdict(list)
    for size, indices in by_size.items():
        if len(indices) < 2:
            continue
        for index in indices:
            try:
                by_contents[size, digest_file(dataset.path(index))].append(index)
            except OSError:
                continue  # gone since the scan; the loader will name it
    return tuple(sorted(tuple(group) for group in by_contents.values() if len(group) > 1))


def _read_thumbnail(path: str) -> tuple[np.uint64, np.ndarray] | Problem:
    """Perceptual hash and small thumbnail of an image."""
    import imagehash

    try:
        with open_header(path, with_trailer=True) as image:
            image.draft("RGB", (_HASH_SIDE, _HASH_SIDE))
            small = ImageOps.exif_transpose(image)
            small.thumbnail((_HASH_SIDE, _HASH_SIDE), Image.Resampling.BOX)
            small = small.convert("RGBA").convert("RGB") if small.mode == "P" else small.convert("RGB")
    except IMAGE_ERRORS as error:
        return Problem(printable(path), f"cannot be decoded: {error}", "Save or download it again, or delete it.")
    bits = imagehash.phash(small).hash.flatten()
    thumbnail = np.asarray(small.resize(_THUMBNAIL, Image.Resampling.BOX), np.int16)
    return np.uint64(int.from_bytes(np.packbits(bits).tobytes(), "big")), thumbnail


def _near_groups(hashes: np.ndarray, thumbnails: np.ndarray, max_distance: int) -> tuple[tuple[int, ...], ...]:
    """Connected groups of images that are alike pair by pair.

    Two hashes that differ in at most d bits agree wholly in one of d + 1 bands of bits, so only images that share a
    band are compared.
    """
    parent = list(range(len(hashes)))
    for band in range(max_distance + 1):
        low, high = (64 * band // (max_distance + 1)), (64 * (band + 1) // (max_distance + 1))
        keys = (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        for members in _runs(keys):
            _join_alike(members, hashes, thumbnails, parent, max_distance)
    groups = defaultdict(list)
    for index in range(len(hashes)):
        groups[_root(parent, index)].append(index)
    return tuple(sorted(tuple(group) for group in groups.values() if len(group) > 1))


def _runs(keys: np.ndarray) -> Iterable[np.ndarray]:
    """Indices of equal keys, for every key that there is more than once."""
    order = np.argsort(keys, kind="stable")
    borders = np.flatnonzero(np.diff(keys[order])) + 1
    return (run for run in np.split(order, borders) if len(run) > 1)


def _join_alike(
    members: np.ndarray, hashes: np.ndarray, thumbnails: np.ndarray, parent: list[int], max_distance: int
) -> None:
    for position, index in enumerate(members[:-1].tolist()):
        others = members[position + 1 :]
        others = others[_count_bits(hashes[others] ^ hashes[index]) <= max_distance]
        if not len(others):
            continue
        difference = np.abs(thumbnails[others] - thumbnails[index]).mean(axis=(1, 2)).max(axis=1)
        for other in others[difference <= MAX_COLOR_DIFFERENCE].tolist():
            parent[_root(parent, other)] = _root(parent, index)


def _count_bits(words: np.ndarray) -> np.ndarray:
    counts: np.ndarray = np.unpackbits(words[:, None].view(np.uint8), axis=1).sum(axis=1)
    return counts


def _root(parent: list[int], index: int) -> int:
    while parent[index] != index:
        parent[index] = parent[parent[index]]
        index = parent[index]
    return index
