"""Tensors that stay on disk until they are requested, and a safetensors writer that holds one of them at a time.

A `LazyTensor` knows its name's shape and format, and how to get its values. Files are opened as mappings from names to
lazy tensors, converters rename and reshape lazily, and the writer pulls them through one by one: converting a model
takes the memory of its largest tensor, not of the model.

The writer is our own because safetensors' `save_file` wants all tensors in memory. Its layout is the published one:
8 bytes of header length, a JSON header, the bytes of each tensor in header order without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from everydream_kit.atomic import open_atomic
from everydream_kit.errors import ModelError
from everydream_kit.models.spans import Span, read_pieces, read_whole, spans_of_safetensors

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

HASH_KEY = "modelspec.hash_sha256"
"""Metadata key that the writer fills with the SHA-256 of all tensor bytes, where the metadata names it."""


EARLY_SYNC_BYTES = 2**27
"""Written bytes that are sent to the disk while the rest is still being made, so that the sync at the end is short."""
MAX_HEADER_BYTES = 2**24
"""Of a safetensors header. SDXL's has 400 kB; a LoRA's with all tags of its dataset has a few MB. The library's own limit,
100 MB, takes it a minute to read."""


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is read when `read` is called, and not kept.

    Attributes:
        spans: where its values lie in files, in order, for as long as they only need another format: then they can be
            read in pieces. None where they are computed.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    spans: tuple[Span, ...] | None = None

    @classmethod
    def of(cls, tensor: torch.Tensor) -> LazyTensor:
        """A tensor that is in memory already."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.detach)

    def reshaped(self, *shape: int) -> LazyTensor:
        return LazyTensor(shape, self.dtype, lambda: self.read().reshape(shape), self.spans)

    def transposed(self) -> LazyTensor:
        """A matrix with its two axes exchanged."""
        rows, columns = self.shape
        return LazyTensor((columns, rows), self.dtype, lambda: self.read().t().contiguous())

    def rows(self, start: int, stop: int) -> LazyTensor:
        """Rows start to stop of the first axis."""
        shape = (stop - start, *self.shape[1:])
        width = math.prod(self.shape[1:])
        one = self.spans is not None and len(self.spans) == 1
        spans = (self.spans[0].part(start * width, stop * width),) if self.spans and one else None
        return LazyTensor(shape, self.dtype, lambda: self.read()[start:stop].clone(), spans)  # noqa: PLW0108

    def cast(self, dtype: torch.dtype) -> LazyTensor:
        """In another floating-point format; integers and booleans stay as they are."""
        if dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return LazyTensor(self.shape, dtype, lambda: self.read().to(dtype), self.spans)

    def load(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
        """Its values in a format, on a device, in memory of their own: the file may change or go afterwards.

        What lies in a file is read straight into its final format: no second copy, and no page of a memory map, which
        would count as memory of this process.
        """
        if self.spans is None:
            return self.read().to(device=device, dtype=dtype, copy=True).contiguous()
        return read_whole(self.spans, self.dtype, dtype).reshape(self.shape).to(device)

    def pieces(self) -> Iterator[torch.Tensor]:
        """Its values in order, as vectors: small ones, each with its own memory, or the tensor whole where it is computed."""
        if self.spans is None:
            yield self.read().reshape(-1)
        else:
            yield from read_pieces(self.spans, self.dtype)


def concatenated(parts: list[LazyTensor]) -> LazyTensor:
    """Several tensors joined along their first axis."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    spans = None
    if all(part.spans is not None and part.dtype == parts[0].dtype for part in parts):
        spans = tuple(span for part in parts for span in part.spans or ())
    return LazyTensor(shape, parts[0].dtype, lambda: torch.cat([part.read() for part in parts]), spans)


def halves_swapped(value: LazyTensor) -> LazyTensor:
    """A tensor whose second half of rows stands before the first."""
    half = value.shape[0] // 2
    return concatenated([value.rows(half, 2 * half), value.rows(0, half)])


def row_shares(num_rows: int, shares: Sequence[int]) -> list[tuple[int, int]]:
    """(start, stop) of the rows that each part of a tensor has."""
    unit, found, start = num_rows // sum(shares), list[tuple[int, int]](), 0
    for share in shares:
        found.append((start, start + share * unit))
        start += share * unit
    return found


Tensors = dict[str, LazyTensor]
OpenFile = Callable[[Path], AbstractContextManager[Any]]
"""Opens a new file to write bytes into."""


def open_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Open a `.safetensors` file; its header is checked against its length, no weight is read.

    Returns:
        The lazy tensors by name, and the metadata.

    Raises:
        ModelError: the file is truncated, its header lies about sizes, or it is not a safetensors file at all.
    """
    from safetensors import SafetensorError, safe_open

    try:
        _check_header_size(path)
        handle = safe_open(path, framework="pt", device="cpu")
        metadata = dict(handle.metadata() or {})
        tensors: Tensors = {}
        for name in handle.keys():  # noqa: SIM118
            part = handle.get_slice(name)
            dtype = _DTYPES.get(part.get_dtype())
            if dtype is None:
                raise ModelError(f"{path}: tensor {name} has the format {part.get_dtype()}, which is not supported.")
            tensors[name] = LazyTensor(tuple(part.get_shape()), dtype, _reader(handle, name))
        spans = spans_of_safetensors(path, {name: tensor.dtype for name, tensor in tensors.items()})
        return {
            name: _read_from(spans[name], tensor) if name in spans else tensor for name, tensor in tensors.items()
        }, metadata
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{path}: not a complete safetensors file ({error}). It is damaged, or its download was cut short; "
            f"it has {path.stat().st_size if path.exists() else 0:,} bytes. Fetch it again."
        ) from error


def _check_header_size(path: Path) -> None:
    """Raises: ModelError: the header is larger than any model's. What is too short is for the library to say."""
    with path.open("rb") as file:
        start = file.read(8)
    if len(start) == 8 and MAX_HEADER_BYTES < struct.unpack("<Q", start)[0] <= path.stat().st_size:
        raise ModelError(
            f"{path}: its header is larger than {MAX_HEADER_BYTES:,} bytes; no model has one of that size."
        )


def _reader(handle: Any, name: str) -> Callable[[], torch.Tensor]:
    return lambda: handle.get_tensor(name)


def _read_from(span: Span, tensor: LazyTensor) -> LazyTensor:
    """A tensor that is read at its place in the file: pages of a memory map would count as memory of this process."""
    shape, dtype = tensor.shape, tensor.dtype
    return LazyTensor(shape, dtype, lambda: read_whole((span,), dtype, dtype).reshape(shape), (span,))


def write_safetensors(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str] | None = None,
    *,
    open_file: OpenFile | None = None,
    finite: bool = False,
) -> None:
    """Write a `.safetensors` file tensor by tensor: next to its final name, synced, then renamed, so it is complete or
    absent.

    Args:
        path: file to write; replaced if it is there.
        tensors: in any order; wide formats come first in the file, so that every tensor is aligned.
        metadata: text by key. A `modelspec.hash_sha256` among the keys is filled in.
        open_file: opens the file instead; for a caller that answers for the whole folder, as checkpoints do.
        finite: refuse NaN and infinity; for exports, where a strength or a narrow format can make them.

    Raises:
        ModelError: a weight is not finite, and `finite` is set; nothing was written.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header, hash_offset = _header(names, tensors, dict(metadata or {}))
    if open_file is not None and hash_offset is None:
        with open_file(path) as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for name in names:
                for values in _checked_bytes(name, tensors[name], finite):
                    file.write(values)
        return
    digest, sync, num_unsynced = hashlib.sha256(), getattr(os, "fdatasync", os.fsync), 0
    with open_atomic(path) as file, _Behind() as hashing, _Behind() as syncing:
        file.write(struct.pack("<Q", len(header)) + header)
        for name in names:
            for values in _checked_bytes(name, tensors[name], finite):
                if hash_offset is not None:
                    hashing.start(digest.update, values)
                file.write(values)
                num_unsynced += len(values)
                if num_unsynced >= EARLY_SYNC_BYTES and not syncing.is_busy():
                    syncing.start(sync, file.fileno())
                    num_unsynced = 0
        if hash_offset is not None:
            hashing.wait()
            file.seek(hash_offset)
            file.write(digest.hexdigest().encode())


class _Behind:
    """One task at a time, in a thread of its own, while further bytes are made and written."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        self.wait()

    def is_busy(self) -> bool:
        return self._pending is not None and not self._pending.done()

    def wait(self) -> None:
        """Wait for the task before, and raise what it raised."""
        if self._pending is not None:
            self._pending.result()

    def start(self, task: Callable[..., None], *arguments: Any) -> None:
        self.wait()
        self._pending = self._thread.submit(task, *arguments)


def require_finite(name: str, values: torch.Tensor) -> None:
    """Refuse a weight that no app can use.

    Raises:
        ModelError: it holds NaN or infinity.
    """
    if values.numel() and values.is_floating_point():
        low, high = torch.aminmax(values)  # a seventh of the time of isfinite; NaN comes through
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ModelError(
                f"{name}: NaN or infinite as {str(values.dtype).removeprefix('torch.')}. Nothing was written. "
                "Give a smaller strength or weight, or precision fp32; if it stays so, the model itself is damaged."
            )


def _checked_bytes(name: str, lazy: LazyTensor, finite: bool) -> Iterator[memoryview]:
    """A tensor's bytes in order; what is written must be what the header announces."""
    num_values = 0
    for piece in lazy.pieces():
        if piece.dtype != lazy.dtype:
            raise AssertionError(f"{name}: announced {lazy.dtype}, read {piece.dtype}")
        if finite:
            require_finite(name, piece)
        num_values += piece.numel()
        yield tensor_bytes(piece)
    if num_values != math.prod(lazy.shape):
        raise AssertionError(f"{name}: announced {lazy.shape}, read {num_values} values")


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's values, little-endian and row by row, without a copy where it lies so already."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    values: Any = flat.view(torch.uint8).numpy()
    return memoryview(values)


def _header(names: list[str], tensors: Mapping[str, LazyTensor], metadata: dict[str, str]) -> tuple[bytes, int | None]:
    """The JSON header, and where in the file the hash goes (None: no hash wanted)."""
    placeholder = "0" * 64
    if HASH_KEY in metadata:
        metadata[HASH_KEY] = "0x" + placeholder
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name in names:
        lazy = tensors[name]
        size = lazy.dtype.itemsize
        for length in lazy.shape:
            size *= length
        entries[name] = {
            "dtype": DTYPE_NAMES[lazy.dtype],
            "shape": list(lazy.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if HASH_KEY not in metadata:
        return text, None
    mark = f'"{HASH_KEY}":"0x{placeholder}"'.encode()
    return text, 8 + text.index(mark) + len(mark) - 1 - len(placeholder)


def widest(dtypes: list[torch.dtype]) -> torch.dtype | None:
    """The floating-point format that holds all of these exactly; None where there is no floating-point one.

    float16 and bfloat16 hold neither the other: float32 does.
    """
    floating = {dtype for dtype in dtypes if dtype.is_floating_point}
    if not floating:
        return None
    together = floating.pop()
    for dtype in floating:
        together = torch.promote_types(together, dtype)
    return together
