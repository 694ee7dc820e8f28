"""What a frozen text encoder makes of each caption, remembered.

Worth its memory where captions repeat: the text encoder is frozen and captions are not shuffled. `captions_vary` says
whether they are; the cache is right either way, because it is keyed by the text itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from everydream_kit.atomic import put_in_place, temporary_path
from everydream_kit.data.cache_room import free_memory
from everydream_kit.data.dataset import Dataset
from everydream_kit.transfers import send

Encoded = TypeVar("Encoded")
"""A dataclass whose fields are tensors with the captions along the first dimension, or anything else that is small."""

MEMORY_SHARE = 0.25
"""Of what is free when the cache is made: the most it takes by default."""


class TextCache(Generic[Encoded]):
    """Encodes captions, each only once as long as there is space.

    A caption is encoded alone, so that what is remembered does not depend on its neighbors.
    """

    def __init__(
        self,
        encode: Callable[[list[str]], Encoded],
        max_bytes: int | None = None,
        *,
        join: Callable[[list[Encoded]], Encoded],
        store: TextStore | None = None,
        make: Callable[..., Encoded] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make an empty cache.

        Args:
            encode: the text encoder: captions -> dataclass of tensors with one row for each.
            join: rows of one caption each, of any lengths -> one batch.
            store: keeps every caption on disk, in bfloat16; so does the cache then, whether a caption is new or not.
            make: the dataclass, of its tensors by name; needed with a store.
            device: where batches are given, until the encoder says it.
            max_bytes: nothing is added beyond this; by default a quarter of the memory that is free now.
        """
        self._encode = encode
        self._join = join
        self._max_bytes = int(free_memory() * MEMORY_SHARE) if max_bytes is None else max_bytes
        self._known: dict[str, Encoded] = {}
        self._device = torch.device(device)
        self._store, self._make = store, make
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._known)

    def knows(self, captions: Sequence[str]) -> bool:
        """Whether `encode` needs no text encoder for them."""
        return all(self._has(caption) for caption in captions)

    def _has(self, caption: str) -> bool:
        return caption in self._known or (self._store is not None and caption in self._store)

    def encode(self, captions: Sequence[str]) -> Encoded:
        """One row for each caption, on the device and of the type that the encoder gives."""
        rows = {caption: self._row(caption) for caption in dict.fromkeys(captions)}
        together: Any = self._join([rows[caption] for caption in captions])
        moved = {f.name: _moved(getattr(together, f.name), self._device) for f in fields(together)}
        result: Encoded = replace(together, **moved)
        return result

    def _row(self, caption: str) -> Encoded:
        """One caption, from memory or freshly encoded; on the CPU, so that the device's memory stays the model's."""
        if caption in self._known:
            return self._known[caption]
        row = self._stored(caption)
        if row is None:
            row = self._encoded(caption)
        size = sum(tensor.nbytes for tensor in _tensors(row))
        if self.num_bytes + size <= self._max_bytes:
            self._known[caption] = row
            self.num_bytes += size
        return row

    def _stored(self, caption: str) -> Encoded | None:
        kept = None if self._store is None else self._store.get(caption)
        return None if kept is None or self._make is None else self._make(**kept)

    def _encoded(self, caption: str) -> Encoded:
        encoded: Any = self._encode([caption])
        self._device = next(iter(_tensors(encoded))).device
        row: Encoded = replace(encoded, **{f.name: _moved(getattr(encoded, f.name), "cpu") for f in fields(encoded)})
        if self._store is None:
            return row
        names = [f.name for f in fields(encoded)]
        kept = {name: value for name in names if isinstance(value := getattr(row, name), torch.Tensor)}
        kept = {name: value.to(torch.bfloat16) for name, value in kept.items()}
        self._store.put(caption, kept)
        result: Encoded = replace(encoded, **{**{name: getattr(row, name) for name in names}, **kept})
        return result


class TextStore:
    """Encoded captions on disk, for text encoders that are too large to stay: one safetensors file for each caption.

    A folder belongs to one text encoder, template and set of layers, which its name is a hash of; a file's name is a hash
    of the caption. So nothing needs to be invalidated. Only valid tokens are kept, in bfloat16, in which such encoders are
    published.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def __contains__(self, caption: str) -> bool:
        return self._path(caption).is_file()

    def get(self, caption: str) -> dict[str, torch.Tensor] | None:
        """What was kept of a caption; None where nothing was, or where its file is damaged."""
        try:
            with safe_open(self._path(caption), framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError):
            return None

    def put(self, caption: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep a caption's tensors; complete or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = temporary_path(self.folder)
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
            put_in_place(partial, self._path(caption))
        finally:
            partial.unlink(missing_ok=True)

    def _path(self, caption: str) -> Path:
        return self.folder / f"{hashlib.blake2b(caption.encode(), digest_size=16).hexdigest()}.safetensors"


def _moved(value: Any, device: torch.device | str) -> Any:
    return send(value.detach(), device) if isinstance(value, torch.Tensor) else value


def _tensors(row: Any) -> list[torch.Tensor]:
    values = (getattr(row, f.name) for f in fields(row))
    return [value for value in values if isinstance(value, torch.Tensor)]


def captions_vary(dataset: Dataset) -> bool:
    """Whether some image's caption is composed again at every use (shuffled, or drawn from several)."""
    images = map(dataset.image, range(len(dataset)))
    return any(p.caption.alternatives or (p.shuffle_tags and len(p.caption.tags) > p.keep_tags) for p in images)
