"""A run's state at one moment, ready to be written while training continues.

With `copy`, tensors are cloned to host memory, so the writer sees the moment and not what came after. Without, it
refers to the live tensors and must be written before the next step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from everydream_kit.training.file_hashes import OpenFile


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint is written from.

    Attributes:
        step: optimizer steps done.
        copied: it stands on its own, and may be written later.
        write_model, write_ema: write the live or the averaged weights as a model folder; no EMA, no writer.
        resume_tensors: optimizer, scaler, EMA: nested containers of tensors.
        state: position, listeners' state and what else a resume compares, as JSON values.
        model_bytes, num_bytes: of the model folder, and of everything.
    """

    step: int
    copied: bool
    write_model: Callable[[Path, OpenFile], None]
    write_ema: Callable[[Path, OpenFile], None] | None
    resume_tensors: dict[str, Any]
    state: dict[str, Any]
    model_bytes: int
    num_bytes: int


def clone_to_host(value: Any) -> Any:
    """A copy of nested containers, with every tensor cloned to host memory."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: clone_to_host(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(clone_to_host(entry) for entry in value)
    return value


def count_bytes(value: Any) -> int:
    """Bytes of all tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(count_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(count_bytes, value))
    return 0
