"""What a frozen text encoder makes of each caption, remembered.

Worth its memory where captions repeat: the text encoder is frozen and captions are not shuffled. `captions_vary` says
whether they are; the cache is right either way, because it is keyed by the text itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, Generic, TypeVar

import torch

from everydream_kit.data.cache_room import free_memory
from everydream_kit.data.dataset import Dataset

Encoded = TypeVar("Encoded")
"""A dataclass whose fields are tensors with the captions along the first dimension, or None."""

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
    ) -> None:
        """Make an empty cache.

        Args:
            encode: the text encoder: captions -> dataclass of tensors with one row for each.
            join: rows of one caption each, of any lengths -> one batch.
            max_bytes: nothing is added beyond this; by default a quarter of the memory that is free now.
        """
        self._encode = encode
        self._join = join
        self._max_bytes = int(free_memory() * MEMORY_SHARE) if max_bytes is None else max_bytes
        self._known: dict[str, Encoded] = {}
        self._device = torch.device("cpu")
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._known)

    def knows(self, captions: Sequence[str]) -> bool:
        """Whether `encode` needs no text encoder for them."""
        return all(caption in self._known for caption in captions)

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
        encoded: Any = self._encode([caption])
        self._device = next(iter(_tensors(encoded))).device
        row: Encoded = replace(encoded, **{f.name: _moved(getattr(encoded, f.name), "cpu") for f in fields(encoded)})
        size = sum(tensor.nbytes for tensor in _tensors(row))
        if self.num_bytes + size <= self._max_bytes:
            self._known[caption] = row
            self.num_bytes += size
        return row


def _moved(value: torch.Tensor | None, device: torch.device | str) -> torch.Tensor | None:
    return None if value is None else value.detach().to(device)


def _tensors(row: Any) -> list[torch.Tensor]:
    values = (getattr(row, f.name) for f in fields(row))
    return [value for value in values if value is not None]


def captions_vary(dataset: Dataset) -> bool:
    """Whether some image's caption is composed again at every use (shuffled, or drawn from several)."""
    images = map(dataset.image, range(len(dataset)))
    return any(p.caption.alternatives or (p.shuffle_tags and len(p.caption.tags) > p.keep_tags) for p in images)
