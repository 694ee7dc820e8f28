"""Which bytes are alive when: the life of every storage while code runs on tensors without values.

`StorageTracker` is a dispatch mode that stands before torch's FakeTensorMode. It notes the birth and the death of each storage
and the floating-point operations of each operator; nothing is decided while the code runs. What a storage was (a weight, a
gradient, an optimizer's state ...) may be said afterwards, and `Lives` then answers how much of what was alive at the worst
moment of a stretch of time.

Not here: what runs (`rehearsal`), and how a GPU's or a CPU's kernels differ from what is traced (`imitation`).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

FORWARD, BACKWARD, RECOMPUTED, OPTIMIZER = "forward", "backward", "recomputed", "optimizer"
"""Phases of a step; "recomputed" is what gradient checkpointing computes again within the backward pass."""
ACTIVATIONS, SCRATCH = "activations", "other"
"""What a storage is unless somebody says otherwise, and what a kernel takes for itself while it runs."""


def _attention_flops(query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any) -> int:
    """Two products of (length of q) x (length of k) x (size of a head), two operations each."""
    batch, heads, length, size = query.shape
    return 4 * batch * heads * length * key.shape[2] * size


def _attention_backward_flops(_: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *__: Any, **___: Any) -> int:
    """Five products, since the scores are computed again (arXiv 2205.14135, algorithm 4)."""
    return _attention_flops(query, key) * 5 // 2


FLOP_FORMULAS: dict[Any, Callable[..., Any]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
"""torch's own formulas, and the CPU's fused attention, for which it has none."""


@cache
def starts_kernel(func: Any) -> bool:
    """Whether an operator starts a kernel: not one that only allocates, nor a view, whose results all alias an argument."""
    if func.namespace == "prim" or func._overloadpacket.__name__.startswith(("empty", "new_empty")):
        return False
    results = [result.alias_info for result in func._schema.returns]
    return not results or any(alias is None or alias.is_write for alias in results)


def phase_of_backward() -> str:
    """`BACKWARD` or `RECOMPUTED` where autograd's engine calls, else nothing: it works through a node, and without gradients."""
    if torch._C._current_autograd_node() is None:
        return ""
    return RECOMPUTED if torch.is_grad_enabled() else BACKWARD


@dataclass
class Life:
    """One storage: its size, its category, and the moments between which it is alive (None: still is)."""

    num_bytes: int
    category: str
    birth: int
    death: int | None = None


@dataclass
class Stretch:
    """A part of the trace, by name.

    Attributes:
        start, end: moments; the end does not belong to it.
        flops: floating-point operations in it.
        launches: operators that start a kernel, by phase; views and allocations start none.
    """

    name: str
    start: int
    end: int = 0
    flops: int = 0
    launches: Counter[str] = field(default_factory=Counter)


@dataclass
class Peak:
    """The worst moment of a stretch: bytes alive in all, and by category."""

    num_bytes: int
    by_category: dict[str, int]


@dataclass
class Lives:
    """Everything that was traced. Moments count births and deaths from 0."""

    lives: list[Life] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)

    def peak(self, stretch: Stretch, *, always: Iterable[str] = (), never: Iterable[str] = ()) -> Peak:
        """The moment of a stretch at which most is alive.

        Args:
            always: categories that are alive all the time, though the trace saw them born on the way: optimizer states,
                which the first step creates, and which every further step finds.
            never: categories that do not count here: what is offloaded to host memory.
        """
        always, never = frozenset(always), frozenset(never)
        changes: dict[int, list[tuple[str, int]]] = {}
        alive: dict[str, int] = {}
        for life in self.lives:
            if life.category in never or not life.num_bytes:
                continue
            if life.category in always or life.birth < stretch.start:
                if life.category in always or life.death is None or life.death >= stretch.start:
                    alive[life.category] = alive.get(life.category, 0) + life.num_bytes
                    _note_death(changes, life, stretch, life.category in always)
            elif life.birth < stretch.end:
                changes.setdefault(life.birth, []).append((life.category, life.num_bytes))
                _note_death(changes, life, stretch, False)
        best, total = Peak(sum(alive.values()), dict(alive)), sum(alive.values())
        for moment in sorted(changes):
            for category, num_bytes in changes[moment]:
                alive[category] = alive.get(category, 0) + num_bytes
                total += num_bytes
            if total > best.num_bytes:
                best = Peak(total, dict(alive))
        best.by_category = {name: size for name, size in best.by_category.items() if size}
        return best

    def named(self, name: str) -> Stretch:
        """The stretch of this name."""
        return next(stretch for stretch in self.stretches if stretch.name == name)


def _note_death(changes: dict[int, list[tuple[str, int]]], life: Life, stretch: Stretch, stays: bool) -> None:
    if not stays and life.death is not None and life.death < stretch.end:
        changes.setdefault(life.death, []).append((life.category, -life.num_bytes))


class LaunchCounter(TorchDispatchMode):
    """Counts the launches of real or fake tensors while it is entered, and every operator by whether it is one.

    Attributes:
        launches: operators that start a kernel, by phase.
        operations: all dispatched operators, views and allocations too, by phase.
        phase: what operators outside of a backward pass are counted as.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.phase = FORWARD

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        phase = phase_of_backward() or self.phase
        self.operations[phase] += 1
        self.launches[phase] += starts_kernel(func)
        return func(*args, **(kwargs or {}))


class StorageTracker(TorchDispatchMode):
    """Follows storages while it is entered. Enter torch's FakeTensorMode first, and this inside it.

    Operators whose inputs all have values run for real: a noise schedule, a tokenizer's table. Where code asks for a value
    that does not exist (a norm, a loss), it gets 1.

    Args:
        granule: sizes are rounded up to this, as the device's allocator does.
    """

    def __init__(self, *, granule: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = Lives()
        self._granule = granule
        self._moment = 0
        self._known: dict[int, Life] = {}
        self._category = ACTIVATIONS
        self._open: list[Stretch] = []
        self._phase = FORWARD

    @contextmanager
    def stretch(self, name: str) -> Iterator[Stretch]:
        """What happens inside is one stretch of the trace."""
        stretch = Stretch(name, self._moment)
        self.record.stretches.append(stretch)
        self._open.append(stretch)
        try:
            yield stretch
        finally:
            self._open.remove(stretch)
            stretch.end = self._moment

    @contextmanager
    def births_are(self, category: str) -> Iterator[None]:
        """Storages born inside are of this category until they are called something else."""
        before, self._category = self._category, category
        try:
            yield
        finally:
            self._category = before

    def label(self, tensors: Iterable[torch.Tensor], category: str, *, unless: str = "") -> None:
        """Say what these tensors' storages are, but for those of the category `unless`; those not met before are born now."""
        for tensor in tensors:
            life = self._life_of(tensor)
            if not unless or life.category != unless:
                life.category = category

    def alive(self) -> dict[str, int]:
        """Bytes that are alive now, by category."""
        sums: dict[str, int] = {}
        for life in self._known.values():
            sums[life.category] = sums.get(life.category, 0) + life.num_bytes
        return sums

    def add_launches(self, number: int) -> None:
        """Count kernels that no operator of the trace stands for."""
        phase = phase_of_backward() or self._phase
        for stretch in self._open:
            stretch.launches[phase] += number

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Launches inside belong to this phase."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def add_scratch(self, num_bytes: int) -> None:
        """Note bytes that are taken and given back at once."""
        if num_bytes > 0:
            self.record.lives.append(Life(self._rounded(num_bytes), SCRATCH, self._moment, self._moment + 1))
            self._moment += 2

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # optimizers ask it of every tensor, thousands of times a step
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return {torch.bool: False}.get(args[0].dtype, 1)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._life_of(leaf)
        self._count(func, args, kwargs, result)
        return result

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        if starts_kernel(func):
            self.add_launches(1)
        formula = FLOP_FORMULAS.get(func._overloadpacket)
        if formula is not None and self._open:
            flops = int(formula(*args, **kwargs, out_val=result))
            for stretch in self._open:
                stretch.flops += flops

    def _life_of(self, tensor: torch.Tensor) -> Life:
        storage = tensor.untyped_storage()
        address = storage._cdata
        life = self._known.get(address)
        if life is None:
            life = Life(self._rounded(storage.nbytes()), self._category, self._moment)
            self._moment += 1
            self.record.lives.append(life)
            self._known[address] = life
            weakref.finalize(storage, self._bury, address).atexit = False
        return life

    def _bury(self, address: int) -> None:
        life = self._known.pop(address)
        life.death = self._moment
        self._moment += 1

    def _rounded(self, num_bytes: int) -> int:
        return -(-num_bytes // self._granule) * self._granule
