"""Flat weights: the trained tensors of one format as views into a few large buffers, which the optimizer steps.

A model has about 900 trained tensors, and an optimizer that steps them one by one launches as many kernels; bitsandbytes also
waits for the GPU after each. On a fast GPU that host time is a third of the step (docs/gpu.md). With flat weights, the update
takes two kernels for each buffer. Gradients stay tensors of their own: autograd hands them over without a copy, and they are
freed before the next forward pass, so flat weights need no more memory than one buffer of gradients, which all buffers share.

Only for optimizers whose update of a number depends on that number's own gradient and state (`OptimizerKind.elementwise`).
bitsandbytes quantises its states in blocks of 256 numbers, so every tensor begins at a multiple of that: each block then holds
numbers of one tensor, as without buffers, and the states are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from everydream_kit.training.chunks import cut

Group = dict[str, Any]
State = dict[str, Any]

BLOCK_NUMBERS = 256
"""Numbers that share a scale in bitsandbytes' 8-bit states."""

BUFFER_NUMBERS = 2**27
"""Numbers of a buffer, 512 MiB in float32: few kernels, and little memory for the gradients that are laid next to each other."""

NEVER_8BIT = 2**62
"""bitsandbytes' `min_8bit_size` for tensors that are small by themselves and large together."""


@dataclass
class _Buffer:
    """Some parameters that lie one behind the other.

    Attributes:
        whole: (sum of the padded sizes,) what the optimizer steps.
        optimizer: of `whole` alone.
        pieces: (parameter, its first number in `whole`).
        gradient: (as `whole`,) the memory that the buffers' gradients share.
        gradient_pieces: the parameters' places in `gradient`.
        gaps: the numbers of `gradient` between the pieces.
        keeps: `gradient` is this buffer's own, and the parameters' gradients live there (`kept_gradients`).
    """

    whole: torch.nn.Parameter
    optimizer: Any
    pieces: list[tuple[torch.nn.Parameter, int]]
    gradient: torch.Tensor
    gradient_pieces: list[torch.Tensor]
    gaps: list[torch.Tensor]
    keeps: bool = False

    def step(self) -> None:
        pieces = zip(self.pieces, self.gradient_pieces, strict=True)
        if not (self.keeps and all(parameter.grad is place for (parameter, _), place in pieces)):
            # None: of a process without an image, or of a path that was not taken
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p, _ in self.pieces]
            torch._foreach_copy_(self.gradient_pieces, gradients)
            if self.gaps:
                torch._foreach_zero_(self.gaps)
        self.whole.grad = self.gradient
        self.optimizer.step()
        self.whole.grad = None


class FlatOptimizer:
    """An optimizer that steps a few buffers in place of many tensors.

    A parameter that has no gradient at the first `step` is taken out of its buffer, since it would be decayed there.
    States are saved and loaded by parameter, exactly as without buffers, so a checkpoint of either kind continues as the
    other. Has what a training loop and a GradScaler use of torch's Optimizer.

    Args:
        build: makes an inner optimizer from groups.
        param_groups: groups of the real parameters.
        buffer_numbers: upper bound of a buffer's size; a single larger tensor gets one of its own.
    """

    def __init__(
        self,
        build: Callable[[list[Group]], Any],
        param_groups: Sequence[Group],
        *,
        buffer_numbers: int = BUFFER_NUMBERS,
    ) -> None:
        self._build, self._buffer_numbers = build, buffer_numbers
        self._watcher: Callable[[Any], None] = lambda optimizer: None
        self._plain = build([dict(group) for group in param_groups])
        self.param_groups: list[Group] = self._plain.param_groups
        self._buffers: list[_Buffer] = []
        self._has_stepped = False
        self._flatten([p for group in self.param_groups for p in group["params"]])

    @property
    def optimizers(self) -> list[Any]:
        """The inner optimizers."""
        return [self._plain, *(buffer.optimizer for buffer in self._buffers)]

    @property
    def state(self) -> dict[torch.Tensor, State]:
        return {key: value for optimizer in self.optimizers for key, value in optimizer.state.items()}

    @property
    def weights(self) -> list[torch.Tensor]:
        """The buffers."""
        return [buffer.whole for buffer in self._buffers]

    @property
    def gradients(self) -> list[torch.Tensor]:
        """What the buffers' gradients share."""
        return [buffer.gradient for buffer in self._buffers]

    def keep_gradients(self) -> list[tuple[torch.Tensor, dict[torch.nn.Parameter, torch.Tensor]]]:
        """Give each buffer that has none yet memory of its own for gradients, zeros, and say where each parameter's is."""
        new = [buffer for buffer in self._buffers if not buffer.keeps]
        for buffer in new:  # all together: the shared memory goes with the last
            buffer.gradient = torch.empty(0)
            buffer.gradient_pieces, buffer.gaps = [], []
        for buffer in new:
            buffer.keeps, buffer.gradient = True, torch.zeros_like(buffer.whole.data)
            buffer.gradient_pieces = [place_of(buffer.gradient, start, p) for p, start in buffer.pieces]
        return [
            (one.gradient, {p: place for (p, _), place in zip(one.pieces, one.gradient_pieces, strict=True)})
            for one in new
        ]

    def watch(self, watcher: Callable[[Any], None]) -> None:
        """Call something with each inner optimizer, those that are made later too."""
        self._watcher = watcher
        for optimizer in self.optimizers:
            watcher(optimizer)

    @torch.no_grad()
    def step(self) -> None:
        self.take_out_unused()
        settings = {group["name"]: group for group in self.param_groups}
        for buffer in self._buffers:
            (group,) = buffer.optimizer.param_groups
            group["lr"] = settings[group["name"]]["lr"]
            buffer.step()
        self._step_rest()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the real parameters, or fill them with zeros."""
        self._plain.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The state as it would be without buffers; its tensors are views into the buffers' state."""
        shares = {p: share for buffer in self._buffers for p, share in _shares(buffer)}
        own = dict(self._plain.state)
        self._plain.state.clear()
        for group in self.param_groups:  # in the order of the parameters, as without buffers
            for parameter in group["params"]:
                share = own.get(parameter) or shares.get(parameter)
                if share:
                    self._plain.state[parameter] = share
        saved: dict[str, Any] = self._plain.state_dict()
        saved["state"] = dict(saved["state"])  # torch's own is a new one, too; the entries are what is shared
        self._plain.state.clear()
        self._plain.state.update(own)
        return saved

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state by parameter."""
        buffered = [parameter for buffer in self._buffers for parameter, _ in buffer.pieces]
        self._plain.state.clear()
        self._plain.load_state_dict(state)
        self.param_groups = self._plain.param_groups
        self._flatten(buffered)

    def _step_rest(self) -> None:
        """Step the parameters that are in no buffer: most often none has a gradient."""
        buffered = [parameter for buffer in self._buffers for parameter, _ in buffer.pieces]
        gradients = [parameter.grad for parameter in buffered]
        for parameter in buffered:
            parameter.grad = None
        if any(p.grad is not None for group in self.param_groups for p in group["params"]):
            self._plain.step()
        for parameter, gradient in zip(buffered, gradients, strict=True):
            parameter.grad = gradient

    def take_out_unused(self) -> None:
        """Before the first step, with its gradients there: leave in buffers only what has one."""
        if self._has_stepped:
            return
        buffered = [parameter for buffer in self._buffers for parameter, _ in buffer.pieces]
        used = [parameter for parameter in buffered if parameter.grad is not None]
        if used and len(used) < len(buffered):
            self._plain.state.update({p: share for buffer in self._buffers for p, share in _shares(buffer) if share})
            for parameter in set(buffered).difference(used):
                parameter.data = parameter.data.clone()  # else this one alone would keep its whole buffer
            self._flatten(used)
        self._has_stepped = True

    @torch.no_grad()
    def _flatten(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Move these parameters, and their states from the plain optimizer, into buffers, one buffer after the other."""
        for buffer in self._buffers:  # from now on the parameters alone hold it: each goes when its last one has moved
            buffer.whole.data = buffer.whole.data.new_empty(0)
        self._buffers, self._has_stepped = [], False
        num_small = getattr(getattr(self._plain, "args", None), "min_8bit_size", 0)
        wanted = set(parameters)
        bundles: dict[Any, list[torch.nn.Parameter]] = {}
        for index, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if parameter in wanted and is_dense(parameter):
                    key = (index, *_kind(parameter, self._plain.state, num_small))
                    bundles.setdefault(key, []).append(parameter)
        runs = [
            (key, run)
            for key, bundle in bundles.items()
            for run in cut(bundle, _padded, self._buffer_numbers, at_most=True)
        ]
        shared: dict[Any, torch.Tensor] = {}
        for (_, _, *form, _, _), run in runs:
            numbers = sum(map(_padded, run))
            if tuple(form) not in shared or len(shared[tuple(form)]) < numbers:
                shared[tuple(form)] = torch.empty(numbers, dtype=form[0], device=form[1])
        for (index, is_small, *form, _, _), run in runs:
            buffer = self._make_buffer(self.param_groups[index], run, shared[tuple(form)])
            if is_small:
                buffer.optimizer.args.min_8bit_size = NEVER_8BIT
            merged = _merge_states([self._plain.state.pop(p, {}) for p in run], buffer)
            if merged:
                buffer.optimizer.state[buffer.whole] = merged
            self._buffers.append(buffer)

    def _make_buffer(self, group: Group, parameters: list[torch.nn.Parameter], shared: torch.Tensor) -> _Buffer:
        """Lay the parameters one behind the other, and let them refer to that memory."""
        first, num_numbers = parameters[0], sum(map(_padded, parameters))
        whole = torch.nn.Parameter(torch.zeros(num_numbers, dtype=first.dtype, device=first.device))
        gradient = shared[:num_numbers]
        pieces, gradient_pieces, gaps, start = [], [], [], 0
        for parameter in parameters:
            end = start + parameter.numel()
            weights = place_of(whole.data, start, parameter)
            weights.copy_(parameter.data)
            parameter.data = weights
            pieces.append((parameter, start))
            gradient_pieces.append(place_of(gradient, start, parameter))
            start += _padded(parameter)
            if end < start:
                gaps.append(gradient[end:start])
        optimizer = self._build([{**group, "params": [whole]}])
        self._watcher(optimizer)
        return _Buffer(whole, optimizer, pieces, gradient, gradient_pieces, gaps)


def is_dense(parameter: torch.Tensor) -> bool:
    """Whether its memory has no gaps, in one of the layouts that weights have."""
    return parameter.is_contiguous() or parameter.is_contiguous(memory_format=torch.channels_last)


def place_of(whole: torch.Tensor, start: int, parameter: torch.Tensor) -> torch.Tensor:
    """The numbers from `start` on in a parameter's shape and memory layout."""
    return whole.as_strided(parameter.shape, parameter.stride(), whole.storage_offset() + start)


def _kind(parameter: torch.nn.Parameter, states: dict[Any, State], num_small: int) -> tuple[Any, ...]:
    """What parameters of one buffer share: size class, format, device, and a state of one age and shape."""
    state = states.get(parameter, {})
    age = float(state["step"]) if "step" in state else None
    return parameter.numel() < num_small, parameter.dtype, parameter.device, age, tuple(state)


def lay_out(parameters: Sequence[torch.Tensor]) -> tuple[list[int], int]:
    """Where each begins if they lie one behind the other, and how many numbers that takes."""
    starts = [0]
    for parameter in parameters:
        starts.append(starts[-1] + _padded(parameter))
    return starts[:-1], starts[-1]


def _padded(parameter: torch.Tensor) -> int:
    return -(-parameter.numel() // BLOCK_NUMBERS) * BLOCK_NUMBERS


def _merge_states(states: list[State], buffer: _Buffer) -> State:
    """The states of a buffer's parameters as one; they have the same keys."""
    merged: State = {}
    for key, value in list(states[0].items()):
        if _is_by_number(value, buffer.pieces[0][0]):
            merged[key] = torch.zeros(buffer.whole.numel(), dtype=value.dtype, device=value.device)
            for state, (one, start) in zip(states, buffer.pieces, strict=True):
                place_of(merged[key], start, one).copy_(state.pop(key))
        elif _is_by_block(key):
            merged[key] = torch.cat([state.pop(key) for state in states])
        else:  # the step, or a table that all share
            merged[key] = value
    return merged


def _shares(buffer: _Buffer) -> list[tuple[torch.nn.Parameter, State]]:
    """Each parameter's share of its buffer's state."""
    whole = buffer.optimizer.state.get(buffer.whole, {})
    return [
        (p, {key: _share(key, value, buffer, p, start) for key, value in whole.items()}) for p, start in buffer.pieces
    ]


def _share(key: str, value: Any, buffer: _Buffer, parameter: torch.nn.Parameter, start: int) -> Any:
    if _is_by_number(value, buffer.whole):
        return place_of(value, start, parameter)
    if _is_by_block(key):
        return value[start // BLOCK_NUMBERS : (start + _padded(parameter)) // BLOCK_NUMBERS]
    return value.clone() if key == "step" and isinstance(value, torch.Tensor) else value


def _is_by_number(value: Any, parameter: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape


def _is_by_block(key: str) -> bool:
    return key.startswith("absmax")


def flat_optimizers(optimizer: Any) -> list[FlatOptimizer]:
    """The flat ones behind any number of faces."""
    if isinstance(optimizer, FlatOptimizer):
        return [optimizer]
    return [flat for one in getattr(optimizer, "optimizers", ()) for flat in flat_optimizers(one)]
