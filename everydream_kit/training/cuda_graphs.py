"""CUDA graphs: forward and backward of a step captured once for each shape, and replayed without the host.

A graph holds kernels and addresses, and nothing of Python: what the pass reads lies in inputs that stay where they are
(`step_inputs`), and what it writes are gradients that stay where they are (`kept_gradients`). A replay adds to them, so that
accumulation needs no second graph. Where a weight has moved since, the graphs are dropped and captured anew.

A fault here would give wrong gradients without an error. So whatever was not made for it stays eager with a reason
(`why_eager`), and tests replay real passes on the CPU, operator by operator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from everydream_kit.errors import ConfigError
from everydream_kit.models.captures import CAPTURES, Capture, Captured
from everydream_kit.training.base_model import drops_out
from everydream_kit.training.flat_weights import BUFFER_NUMBERS
from everydream_kit.training.kept_gradients import KeptGradients
from everydream_kit.training.memory_measures import is_out_of_memory
from everydream_kit.training.step_inputs import StepInputs

if TYPE_CHECKING:
    from everydream_kit.config import TrainConfig
    from everydream_kit.models.family import Model
    from everydream_kit.training.journal import Journal
    from everydream_kit.training.ranks import Ranks
    from everydream_kit.training.step import Learner

NUM_EAGER = 3
"""Passes of a shape before its capture: libraries choose their kernels and get their memory, gradients their places."""
MAX_SHAPES = 8
"""Graphs of one run; passes of further shapes stay eager."""
MAX_COUNTED = 64
"""Shapes whose passes are counted. Texts of any length have very many, and none of them comes often."""

KEPT_BUFFER_NUMBERS = 2**30
"""Numbers of a buffer of flat weights whose gradients stay: few kernels, and sizes that kernels count in 32 bits."""

MAX_DROPS = 2
"""Times that all graphs may be dropped since weights have moved; weights that always move are not worth a capture."""


@dataclass
class _Graph:
    inputs: StepInputs
    captured: Captured


class GraphedPasses:
    """Passes of micro-batches: eager at first, then replayed.

    Args:
        capture: of the device.
        learn: forward and backward; reads its inputs and the weights, adds to the gradients, returns the losses (B,).
        gradients: whose places the passes add to.
        fixed: tensors that a graph knows by their addresses: weights, and the scaler's factor.
        note: writes a line to the log.
    """

    def __init__(
        self,
        capture: Capture,
        learn: Callable[[StepInputs], torch.Tensor],
        gradients: KeptGradients,
        fixed: Callable[[], Iterable[torch.Tensor]],
        note: Callable[[str], None],
    ) -> None:
        self._capture, self._learn, self._gradients = capture, learn, gradients
        self._fixed, self._note = fixed, note
        self._seen: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, _Graph] = {}
        self._addresses: tuple[Any, ...] = ()
        self._num_drops = 0
        self.num_replays = 0

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        """Forward and backward. Returns (B,) float32 losses, detached."""
        self._drop_outdated()
        shape = inputs.shape()
        graph = self._graphs.get(shape)
        if graph is None:
            if not self._is_due(shape):
                return self._learn(inputs)
            graph = self._graphs[shape] = self._captured(inputs)
        graph.inputs.take(inputs)
        graph.captured.replay()
        self.num_replays += 1
        return graph.captured.result.clone()  # the next replay writes there

    def _is_due(self, shape: Hashable) -> bool:
        """Whether this pass is to be captured."""
        if shape in self._seen or len(self._seen) < MAX_COUNTED:
            self._seen[shape] += 1
        is_warm = self._seen[shape] > NUM_EAGER and self._gradients.has_places()
        return is_warm and len(self._graphs) < MAX_SHAPES and self._num_drops <= MAX_DROPS

    def _captured(self, inputs: StepInputs) -> _Graph:
        static = inputs.clone()
        try:
            captured = self._capture(lambda: self._learn(static))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise ConfigError(
                f"cuda_graphs: the step cannot be captured ({str(error).splitlines()[0]}). "
                "Set cuda_graphs off and resume, and please report it with the output of everydream doctor."
            ) from error
        self._addresses = self._addresses_now()
        height, width = inputs.latents.shape[2:]
        self._note(
            f"CUDA graph {len(self._graphs) + 1}: a pass of {len(inputs.latents)} images with latents of {width} x {height} "
            "cells is captured, and replayed from now on."
        )
        if len(self._graphs) + 1 == MAX_SHAPES:
            self._note(f"{MAX_SHAPES} CUDA graphs are captured; passes of further shapes run eagerly.")
        return _Graph(static, captured)

    def _drop_outdated(self) -> None:
        """Graphs of weights that have moved would read memory that is another's now."""
        if self._graphs and self._addresses != self._addresses_now():
            self._graphs.clear()
            self._num_drops += 1
            stays = self._num_drops > MAX_DROPS
            then = "again and again, so passes stay eager" if stays else "so passes are captured anew"
            self._note(f"CUDA graphs: weights have moved, {then}.")

    def _addresses_now(self) -> tuple[Any, ...]:
        return tuple((tensor.data_ptr(), tensor.requires_grad) for tensor in self._fixed())


def why_eager(config: TrainConfig, model: Model, ranks: Ranks, device_type: str) -> str | None:
    """Why this run's steps cannot be captured, in words; None where they can.

    What two settings say by themselves is an error before (`config.rules`).
    """
    if device_type not in CAPTURES:
        return f"a {device_type.upper()} has none"
    if ranks.num_ranks > 1:
        return "gradients of several processes are sent by hooks during the backward pass, which no replay calls"
    if model.family.not_captured:
        return model.family.not_captured
    modules = [model.denoiser, *model.text_encoders]
    if any(module.training and drops_out(module) for module in modules):  # a frozen text encoder is in evaluation mode
        return "dropout draws other numbers in a replay than in the steps before it, so a resumed run would differ"
    if config.plugins:
        return "a plug-in may change modules, and a replay does not call them"
    return None


def numbers_of_a_buffer(config: TrainConfig, model: Model, ranks: Ranks, device_type: str) -> int:
    """How large flat weights' buffers may be: where gradients stay anyway, there is nothing to share between several."""
    is_captured = config.cuda_graphs == "on" and why_eager(config, model, ranks, device_type) is None
    return KEPT_BUFFER_NUMBERS if is_captured else BUFFER_NUMBERS


def add_graphs(config: TrainConfig, learner: Learner, journal: Journal) -> None:
    """Let a learner replay its passes, where that is asked for and possible."""
    if config.cuda_graphs == "off":
        return
    model, scaler, ranks = learner.model, learner.precision.scaler, learner.ranks
    reason = why_eager(config, model, ranks, ranks.device.type)
    if reason is not None:
        journal.warn(f"cuda_graphs: has no effect: {reason}.")
        return
    modules = [model.denoiser, *(model.text_encoders if learner.trains_text else ())]
    weights = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]

    def fixed() -> list[torch.Tensor]:
        return weights if scaler is None or scaler._scale is None else [*weights, scaler._scale]

    learner.kept_gradients = KeptGradients(learner.optimizer)
    learner.graphs = GraphedPasses(
        CAPTURES[ranks.device.type](), learner.learn_from, learner.kept_gradients, fixed, journal.note
    )
