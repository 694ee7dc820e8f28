"""Nested containers of tensors in one safetensors file: optimizer state, scaler, averages.

The tensors are the file's own; the containers around them are JSON in its header. Reading runs no code, unlike a pickle, and a
file of thousands of small tensors is written several times faster than by `torch.save` (docs/experiments.md).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from everydream_kit.errors import CheckpointError
from everydream_kit.models.tensors import LazyTensor, OpenFile, write_safetensors
from everydream_kit.runs.resume_state import RESTORE_ERRORS
from everydream_kit.strict_json import parse_json

STRUCTURE = "structure"
MAX_HEADER_BYTES = 100_000_000
"""safetensors' own bound on a header."""
SMALL_NUMBERS = 16_384
"""Tensors up to this size are laid end to end in one: a file's cost is by tensor as well as by byte."""


def write_nested(path: Path, value: Any, *, open_file: OpenFile | None = None) -> None:
    """Write dicts, lists, tuples, tensors, numbers, texts and None.

    Args:
        open_file: see `write_safetensors`.
    """
    packer = _Packer()
    structure = packer.flatten(value)
    tensors = {name: LazyTensor.of(tensor) for name, tensor in packer.tensors().items()}
    write_safetensors(path, tensors, {STRUCTURE: json.dumps(structure)}, open_file=open_file)


def read_nested(path: Path) -> Any:
    """What `write_nested` wrote, on the CPU.

    Raises:
        CheckpointError: the file is damaged, or not one of these.
    """
    with _opened(path) as (file, structure):
        return _rebuild(structure, lru_cache(maxsize=8)(file.get_tensor))


def check_nested(path: Path) -> None:
    """Make sure that a file can be read, by its header alone.

    Raises:
        CheckpointError: as `read_nested`.
    """
    with _opened(path) as (file, structure):
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
        _rebuild(structure, lambda name: torch.empty(shapes[name], device="meta"))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """A file and the structure in its header; what is wrong with either, or found out inside, is a CheckpointError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text, most = (file.metadata() or {})[STRUCTURE], MAX_HEADER_BYTES
            yield file, parse_json(text, str(path), expect=None, error=CheckpointError, max_bytes=most, allow_nan=True)
    except (SafetensorError, OSError, *RESTORE_ERRORS) as error:
        raise CheckpointError(f"{path}: damaged, or no resume state ({error}).") from error


class _Packer:
    """Takes the tensors out of nested containers, and remembers where each went."""

    def __init__(self) -> None:
        self._large: dict[str, torch.Tensor] = {}
        self._small: dict[str, list[torch.Tensor]] = {}
        self._offsets: dict[str, int] = {}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {**self._large, **{name: torch.cat(parts) for name, parts in self._small.items()}}

    def flatten(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._place(value.detach())
        if isinstance(value, dict):
            return {"dict": [[self.flatten(key), self.flatten(entry)] for key, entry in value.items()]}
        if isinstance(value, (list, tuple)):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [self.flatten(entry) for entry in value]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"cannot be kept in a checkpoint: {type(value).__name__}")

    def _place(self, tensor: torch.Tensor) -> dict[str, Any]:
        if tensor.numel() <= SMALL_NUMBERS:
            name = f"small {tensor.dtype} {tensor.device.type}"
            offset = self._offsets.get(name, 0)
            self._small.setdefault(name, []).append(tensor.reshape(-1))
            self._offsets[name] = offset + tensor.numel()
            return {"slice": [name, offset, list(tensor.shape)]}
        name = str(len(self._large))
        self._large[name] = tensor
        return {"tensor": name}


def _rebuild(structure: Any, get_tensor: Any) -> Any:
    if not isinstance(structure, dict):
        return structure
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return get_tensor(content)
    if kind == "slice":
        name, offset, shape = content
        return get_tensor(name)[offset : offset + math.prod(shape)].view(shape).clone()
    if kind == "dict":
        return {_rebuild(key, get_tensor): _rebuild(value, get_tensor) for key, value in content}
    entries = [_rebuild(entry, get_tensor) for entry in content]
    return tuple(entries) if kind == "tuple" else entries
