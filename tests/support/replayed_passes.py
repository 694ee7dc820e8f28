"""A CPU's stand-in for CUDA graphs: the operators of a call are recorded with their tensors, and run again on the same memory.

As on a GPU, a replay runs no Python, so that whatever the call read of Python's, or of tensors that are no static input, stays
as it was; reading a value is an error; and a capture changes nothing that was there before.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rehearsals import square_images
from tiny_models import tiny_folder
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from everydream_kit.training import cuda_graphs
from everydream_kit.training.step import Learner
from everydream_kit.training.step_inputs import StepInputs

READS_VALUES = {"aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero", "aten.masked_select"}
INDEXES = {"aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"}
"""By a mask, they ask how many it chooses."""


class Recording(TorchDispatchMode):
    """Every operator while it is entered, with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[torch.Tensor]]] = []
        self.born: set[int] = set()
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # what was there, and a copy of it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, str(func.overloadpacket)
        by_mask = name in INDEXES and any(one.dtype == torch.bool for one in tensors_of(args[1]))
        if name in READS_VALUES or by_mask:
            raise RuntimeError(f"{func} during a capture: the host asks for a value")
        taken = tensors_of((args, kwargs))
        if func._schema.is_mutable:
            self.keep_what_was([one for one in taken if id_of(one) not in self.born])
        result = func(*args, **kwargs)
        known = set(map(id_of, taken))
        made = [one for one in tensors_of(result) if id_of(one) not in known]
        self.born.update(map(id_of, made))
        if made or func._schema.is_mutable:
            self.operators.append((func, args, kwargs, made))
        return result

    def keep_what_was(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            self.before.setdefault(id_of(tensor), (whole, whole.clone()))


class Replayed:
    """What a recording found, to be run again."""

    def __init__(self, recording: Recording, result: torch.Tensor) -> None:
        self.operators, self.result = recording.operators, result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, made in self.operators:
            again = func(*args, **kwargs)
            taken = set(map(id_of, tensors_of((args, kwargs))))
            new = [one for one in tensors_of(again) if id_of(one) not in taken]
            for old, one in zip(made, new, strict=True):
                old.untyped_storage().copy_(one.untyped_storage())


def settings_of_a_run(folder: Path) -> dict[str, Any]:
    """Settings of a run of SD 1 on four images, all of it below a folder; captions are dropped and images cropped as usual."""
    return {
        "resume_ckpt": str(tiny_folder("sd1")),
        "data_root": str(square_images(folder / "images")),
        "resolution": 64,
        "batch_size": 2,
        "lr": 1e-3,
        "max_epochs": 20,
        "logdir": str(folder / "logs"),
        "sample_steps": None,
        "seed": 7,
        "num_workers": 0,
        "cache_variants": 1,
        "no_save_ckpt": True,
    }


def record(call: Callable[[], torch.Tensor]) -> Replayed:
    """Capture a call, which computes nothing that stays."""
    recording = Recording()
    with recording:
        result = call()
    for whole, copy in recording.before.values():
        whole.copy_(copy)
    return Replayed(recording, result)


def allow_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cuda_graphs on` replays on a CPU, and what a pass is given is worthless as soon as it has been copied."""
    monkeypatch.setitem(cuda_graphs.CAPTURES, "cpu", lambda: record)
    take = StepInputs.take

    def take_and_poison(self: StepInputs, other: StepInputs) -> None:
        take(self, other)
        for tensor in other.tensors():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)

    def draw_apart(self: Learner, batch: Any, work: Any) -> StepInputs:
        return draw_inputs(self, batch, work).clone()  # the caches and the report of the step keep what is theirs

    draw_inputs = Learner.draw_inputs
    monkeypatch.setattr(Learner, "draw_inputs", draw_apart)
    monkeypatch.setattr(StepInputs, "take", take_and_poison)


def tensors_of(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def id_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
