"""Where a tensor's values lie in a file, and reading them piece by piece.

A tensor that is written as it was read, or in another format, or next to others, is never complete in memory: it
is read, converted and written a megabyte at a time, which stays in the processor's cache. That costs a quarter of the
processor's time that whole tensors from a memory map take, and pages of a map would count as memory of this process.
"""

from __future__ import annotations

import json
import math
import os
import struct
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

PIECE_BYTES = 2**20
"""Of a piece in the file. From 256 kB to 1 MB it makes no difference; from 4 MB on pieces fall out of the cache."""
CAN_READ_AT = hasattr(os, "preadv")
"""Reading at a place without moving the file's own, so that threads may share it: not on Windows."""


class OpenedFile:
    """A file that stays readable for as long as somebody holds this, even if it is replaced or deleted meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer from a place in the file.

        Raises:
            OSError: the file ends before.
        """
        while buffer:
            num_read = os.preadv(self.descriptor, [buffer], offset)
            if not num_read:
                raise OSError(f"{self.path}: ends at byte {offset}, in the middle of a tensor.")
            buffer, offset = buffer[num_read:], offset + num_read


@dataclass(frozen=True, slots=True)
class Span:
    """Numbers that lie one after the other in a file.

    Attributes:
        offset: in bytes from the file's start.
        length: how many numbers.
        dtype: of the file.
    """

    file: OpenedFile
    offset: int
    length: int
    dtype: torch.dtype

    def part(self, start: int, stop: int) -> Span:
        """Numbers `start` to `stop` of this span."""
        return replace(self, offset=self.offset + start * self.dtype.itemsize, length=stop - start)


def spans_of_safetensors(path: Path, dtypes: dict[str, torch.dtype]) -> dict[str, Span]:
    """The span of each tensor of a safetensors file whose header was checked already; none where files cannot be read so."""
    if not CAN_READ_AT:
        return {}
    file = OpenedFile(path)
    start = bytearray(8)
    file.read_into(memoryview(start), 0)
    (length,) = struct.unpack("<Q", start)
    header = bytearray(length)
    file.read_into(memoryview(header), 8)
    entries: dict[str, Any] = json.loads(bytes(header))
    return {
        name: Span(file, 8 + length + entries[name]["data_offsets"][0], math.prod(entries[name]["shape"]), dtype)
        for name, dtype in dtypes.items()
    }


def _bytes_of(vector: torch.Tensor) -> memoryview:
    """A vector's own memory."""
    values: Any = vector.view(torch.uint8).numpy()  # numpy's stubs know the buffer protocol from Python 3.12 on
    return memoryview(values)


def read_pieces(spans: tuple[Span, ...], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """All numbers of the spans in order, in a format of choice: vectors of at most a piece, each with its own memory."""
    for span in spans:
        step = PIECE_BYTES // span.dtype.itemsize
        for start in range(0, span.length, step):
            part = span.part(start, min(start + step, span.length))
            piece = torch.empty(part.length, dtype=part.dtype)
            part.file.read_into(_bytes_of(piece), part.offset)
            yield piece.to(dtype)


def read_whole(spans: tuple[Span, ...], through: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    """All numbers of the spans in order, as one vector in memory.

    Args:
        through: the format that they are announced in. Another one than the file's rounds them first.
        dtype: the vector's format.
    """
    whole = torch.empty(sum(span.length for span in spans), dtype=dtype)
    start = 0
    for span in spans:
        part = whole[start : start + span.length]
        if span.dtype == through == dtype:
            span.file.read_into(_bytes_of(part), span.offset)
        else:
            filled = 0
            for piece in read_pieces((span,), through):
                part[filled : filled + len(piece)].copy_(piece)
                filled += len(piece)
        start += span.length
    return whole
