"""What is in an image file, as a 16-byte digest: the same image has the same digest under any name.

Reading every file costs what the disk gives, so digests are remembered by the file's identity: path, size, times of
change (of contents and of inode: the second cannot be set back by a program) and inode number. The memo is a file of
32-byte records, only ever appended to: a torn last record is cut off by its length.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")
Result = TypeVar("Result")
DIGEST_BYTES = 16
_CHUNK_BYTES = 2**20
_MAX_WAITING = 256
"""Files that are read ahead of the one that is requested."""

PathPair = tuple[str, str | None]
"""An image, and its mask file if it has one (the image's own path where its transparency is the mask)."""

_Memo = dict[bytes, bytes]
"""Stamp of a file -> digest of its contents."""


def digest_file(path: str) -> bytes:
    """BLAKE2b of a file's bytes, 16 bytes.

    Raises:
        OSError: the file cannot be read.
    """
    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            state.update(chunk)
    return state.digest()


def digest_images(
    pairs: Iterable[PathPair],
    count: int,
    *,
    memo_file: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Digest images with their masks.

    Args:
        pairs: `count` images with their masks.
        count: how many.
        memo_file: where digests are remembered between runs, or None.
        progress: called with the number of images done.

    Returns:
        (count, 16) uint8; zeros for a file that cannot be read.
    """
    digests = np.zeros((count, DIGEST_BYTES), np.uint8)
    memo = _read_memo(memo_file)
    learned: _Memo = {}
    try:
        with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
            read = map_in_order(pool, lambda pair: _digest_pair(pair, memo), pairs, ahead=_MAX_WAITING)
            for index, (_, (digest, new)) in enumerate(read):
                digests[index] = np.frombuffer(digest, np.uint8)
                learned |= new
                if progress is not None:
                    progress(index + 1)
    finally:  # interrupted: what was read is still known next time
        _append_memo(memo_file, learned)
    return digests


def digest_image(path: str, mask_path: str | None = None) -> bytes:
    """Digest one image with its mask, as `digest_images` does; zeros for a file that cannot be read."""
    return _digest_pair((path, mask_path), {})[0]


def _read_memo(path: Path | None) -> _Memo:
    data = path.read_bytes() if path is not None and path.is_file() else b""
    size = 2 * DIGEST_BYTES
    starts = range(0, len(data) // size * size, size)
    return {data[i : i + DIGEST_BYTES]: data[i + DIGEST_BYTES : i + size] for i in starts}


def _append_memo(path: Path | None, learned: _Memo) -> None:
    if path is None or not learned:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        torn = file.tell() % (2 * DIGEST_BYTES)
        file.truncate(file.tell() - torn)
        file.write(b"".join(stamp + digest for stamp, digest in learned.items()))


def map_in_order(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], *, ahead: int
) -> Iterator[tuple[Item, Result]]:
    """Each item with its result, in order; at most so many are worked on ahead of the one that is requested."""
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(work, item)))
        if len(waiting) > ahead:
            first, result = waiting.popleft()
            yield first, result.result()
    yield from ((first, result.result()) for first, result in waiting)


def _digest_pair(pair: PathPair, memo: _Memo) -> tuple[bytes, _Memo]:
    """The digest of image and mask together, and what was newly learned of single files."""
    path, mask = pair
    learned: _Memo = {}
    try:
        state = hashlib.blake2b(_digest_known(path, memo, learned), digest_size=DIGEST_BYTES)
        if mask is not None:
            state.update(b"alpha" if mask == path else b"mask" + _digest_known(mask, memo, learned))
    except OSError:
        return bytes(DIGEST_BYTES), learned
    return state.digest(), learned


def _digest_known(path: str, memo: _Memo, learned: _Memo) -> bytes:
    stamp = stamp_file(path)
    digest = memo.get(stamp)
    if digest is None:
        digest = digest_file(path)
        if stamp_file(path) == stamp:  # it did not change while it was read
            learned[stamp] = digest
    return digest


def stamp_file(path: str) -> bytes:
    """The state of a file (path, size, times), without reading it; 16 bytes."""
    stat = os.stat(path)
    text = f"{os.path.abspath(path)}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}\0{stat.st_ino}"
    return hashlib.blake2b(os.fsencode(text), digest_size=DIGEST_BYTES).digest()
