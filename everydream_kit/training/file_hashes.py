"""Size and hash of a checkpoint's files, taken while they are written, and their way to the disk.

A file's bytes are hashed in a thread next to the writing, and the disk is made to confirm each file in threads behind
it, while the next is written. So a file is neither read again nor waited for alone: a save takes about as long as
writing the same bytes (docs/experiments.md). Files that were written in other ways, which are small, are hashed from
the disk.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

PIECE_BYTES = 1 << 20
"""Smaller writes are gathered until they come to this: handing one to another thread costs as much as hashing 50 kB."""
READ_BYTES = 1 << 22
NUM_SYNCS = 4
"""Files that wait for the disk at the same time; a journal confirms them together."""


class Sink(Protocol):
    """What the bytes of a file are given to."""

    def write(self, values: bytes | memoryview, /) -> Any: ...


OpenFile = Callable[[Path], AbstractContextManager[Sink]]
"""Opens a new file. It is complete when the context ends, and durable when the receipts are."""


class Receipts:
    """Everything that is written into one folder. Use as a context; ask for `facts` at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._hashing = ThreadPoolExecutor(2, "hash")
        self._syncing = ThreadPoolExecutor(NUM_SYNCS, "sync")
        self._digests: dict[Path, Future[str]] = {}
        self._syncs: list[Future[None]] = []

    def __enter__(self) -> Receipts:
        return self

    def __exit__(self, *_: object) -> None:
        self._hashing.shutdown()
        self._syncing.shutdown()

    @contextmanager
    def open(self, path: Path) -> Iterator[Sink]:
        """A new file whose bytes are hashed on their way to the disk."""
        with path.open("wb") as file:
            sink = _HashedFile(file, self._hashing)
            yield sink
            sink.pass_gathered()
        self._digests[path] = self._hashing.submit(sink.hexdigest)
        self._syncs.append(self._syncing.submit(sync, path))

    def facts(self) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of every file in the folder, by its path from there. All of them are on the disk then.

        Raises:
            OSError: the disk could not take them.
        """
        files = self.resolve()
        for path in files:
            if path not in self._digests:
                self._digests[path] = self._hashing.submit(digest_of, path)
        return {
            path.relative_to(self.folder).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": self._digests[path].result(),
            }
            for path in files
        }

    def resolve(self) -> list[Path]:
        """Wait until every file and folder is on the disk. Returns the files, sorted. Raises: OSError."""
        paths = sorted(self.folder.rglob("*"))
        waiting = [path for path in paths if path not in self._digests]
        self._syncs += [self._syncing.submit(sync, path) for path in [*waiting, self.folder]]
        for one in self._syncs:
            one.result()
        self._syncs.clear()
        return [path for path in paths if path.is_file()]


class _HashedFile:
    """Hands every piece to the hashing thread and writes it meanwhile; one piece behind at most, so nothing piles up."""

    def __init__(self, file: BinaryIO, threads: ThreadPoolExecutor) -> None:
        self._file, self._threads = file, threads
        self._digest = hashlib.sha256()
        self._behind: Future[None] | None = None
        self._gathered = bytearray()

    def write(self, values: bytes | memoryview) -> None:
        if len(values) < PIECE_BYTES:
            self._gathered += values
        if len(values) >= PIECE_BYTES or len(self._gathered) >= PIECE_BYTES:
            self.pass_gathered()
        if len(values) >= PIECE_BYTES:
            self._pass_on(values)

    def pass_gathered(self) -> None:
        """Write what was gathered."""
        gathered, self._gathered = self._gathered, bytearray()
        self._pass_on(gathered)

    def hexdigest(self) -> str:
        self._wait()
        return self._digest.hexdigest()

    def _pass_on(self, values: bytes | bytearray | memoryview) -> None:
        self._wait()
        self._behind = self._threads.submit(self._digest.update, values)
        self._file.write(values)

    def _wait(self) -> None:
        if self._behind is not None:
            self._behind.result()


def digests_of(paths: Iterable[Path]) -> list[str]:
    """SHA-256 of files, two at a time: hashing releases the interpreter's lock."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(digest_of, paths))


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's or folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
