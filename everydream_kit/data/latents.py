"""Encoded latents, and where they are kept on disk: in safetensors shards.

The store maps a 16-byte name to an `Entry`. A name is a hash of everything that determines the entry, so the store
never needs to be invalidated: what changed has another name. Not here: what the names are made of and what is encoded
(`cache`).

A shard is written next to its final name and renamed when complete, so an interrupted build leaves only complete shards, and
the next one continues from them. Shards are memory-mapped: what is read often stays in the system's page cache, and
many processes share it.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from everydream_kit.atomic import put_in_place, sweep, temporary_path

logger = logging.getLogger(__name__)

SHARD_BYTES = 64 * 2**20
"""Written to disk at a time: about 1000 latents of 512 px; what an interruption can lose."""

_MASK_SUFFIX = ".mask"


@dataclass(frozen=True, slots=True)
class Entry:
    """One encoded crop.

    Attributes:
        moments: (8, H/8, W/8) float16, mean and log-variance of the VAE's posterior, unscaled.
        mask: (H/8, W/8) uint8 loss mask, 255 counts fully; None where the image has none.
    """

    moments: torch.Tensor
    mask: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        return self.moments.nbytes + (0 if self.mask is None else self.mask.nbytes)


class DiskStore:
    """Entries in safetensors shards of one folder. Picklable: another process opens the shards itself."""

    def __init__(self, folder: Path, identity: str) -> None:
        """Open a folder, which need not exist.

        Args:
            folder: of this identity alone.
            identity: written into every shard and compared when it is opened.
        """
        self._folder = Path(folder)
        self._identity = identity
        self._shards: list[Path] = []
        self._shard_of: dict[bytes, int] = {}
        self._open: dict[int, Any] = {}  # memory maps, by shard
        self._pending: dict[bytes, Entry] = {}
        self._pending_bytes = 0
        for path in sorted(self._folder.glob("*.safetensors")):
            self._add_shard(path)
        sweep(self._folder)  # of a build that was killed while it wrote

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __contains__(self, name: bytes) -> bool:
        return name in self._shard_of or name in self._pending

    def get(self, name: bytes) -> Entry | None:
        """The entry of this name, from the pending writes or from its shard; None if there is none."""
        if name in self._pending:
            return self._pending[name]
        shard = self._shard_of.get(name)
        if shard is None:
            return None
        if shard not in self._open:
            self._open[shard] = safe_open(self._shards[shard], framework="pt")
        key = name.hex()
        opened = self._open[shard]
        has_mask = (name + b"m") in self._shard_of
        return Entry(opened.get_tensor(key), opened.get_tensor(key + _MASK_SUFFIX) if has_mask else None)

    def put(self, name: bytes, entry: Entry) -> None:
        """Add an entry; it may be lost until `flush`."""
        self._pending[name] = entry
        self._pending_bytes += entry.num_bytes
        if self._pending_bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as one shard."""
        if not self._pending:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        tensors = {name.hex(): entry.moments.contiguous() for name, entry in self._pending.items()}
        masks = {n.hex() + _MASK_SUFFIX: e.mask.contiguous() for n, e in self._pending.items() if e.mask is not None}
        # Named after its contents: two processes that build the same cache do not write over each other's work.
        title = hashlib.blake2b(b"".join(sorted(self._pending)), digest_size=12).hexdigest()
        final = self._folder / f"{title}.safetensors"
        partial = temporary_path(self._folder)
        try:
            save_file({**tensors, **masks}, partial, metadata={"identity": self._identity})
            put_in_place(partial, final)
        finally:
            partial.unlink(missing_ok=True)
        self._pending, self._pending_bytes = {}, 0
        self._add_shard(final)

    def _add_shard(self, path: Path) -> None:
        """Learn a shard's names. One that is damaged, or of another identity, is left alone."""
        try:
            with safe_open(path, framework="pt") as shard:
                keys = list(shard.keys())
                identity = (shard.metadata() or {}).get("identity")
        except (OSError, SafetensorError) as error:
            logger.warning("%s: damaged (%s); its latents are encoded again. It can be deleted.", path, error)
            return
        if identity != self._identity:
            logger.warning("%s: made for another model or setting; it is not used. It can be deleted.", path)
            return
        self._shards.append(path)
        for key in keys:
            name = bytes.fromhex(key.removesuffix(_MASK_SUFFIX))
            self._shard_of[name + (b"m" if key.endswith(_MASK_SUFFIX) else b"")] = len(self._shards) - 1
