"""The denoiser's predictions of a sampling, eager or replayed.

A sampling asks for the same shape at every denoising step, so a GPU can capture the call once, guidance's two halves and all,
and replay it without the host. The first replay of each shape is compared with an eager prediction; where it differs, or where
a capture fails, predictions stay eager with a warning. What was captured is dropped when the sampling ends.
"""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from types import TracebackType

import torch

from everydream_kit.models.captures import Capture, Captured, changed, described, tensors_in
from everydream_kit.models.family import Conditioning, Model, Sizes
from everydream_kit.transfers import send

logger = logging.getLogger(__name__)

NUM_EAGER = 2
"""Predictions of a shape before its capture: libraries choose their kernels and get their memory."""
TOLERANCE = 1e-2
"""Share by which the first replay may differ from an eager prediction."""


@dataclass(frozen=True)
class _Inputs:
    """What a prediction reads, apart from weights. Sizes have their numbers, and nothing that is read on the host."""

    noisy_latents: torch.Tensor
    timesteps: torch.Tensor
    conditioning: Conditioning
    sizes: Sizes


@dataclass
class _Graph:
    inputs: _Inputs
    captured: Captured
    is_checked: bool = False


class Predictions:
    """Predicts for one sampling; a context that frees what was captured at its end.

    Args:
        capture: of the device; None: everything is eager.
    """

    def __init__(self, model: Model, capture: Capture | None) -> None:
        self._model, self._capture = model, capture
        self._seen: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, _Graph] = {}
        self.num_replays = 0

    def __call__(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, sizes: Sizes
    ) -> torch.Tensor:
        """As `Family.predict`."""
        if self._capture is None:
            return self._model.family.predict(self._model, noisy_latents, timesteps, conditioning, sizes)
        inputs = _Inputs(noisy_latents, timesteps, conditioning, self._on_device(sizes, len(noisy_latents)))
        shape = described(inputs)
        graph = self._graphs.get(shape)
        if graph is not None:
            return self._replay(graph, inputs)
        prediction = self._predict(inputs)
        self._seen[shape] += 1
        if self._seen[shape] == NUM_EAGER:
            self._graphs.update(self._captured(shape, inputs))
        return prediction

    def __enter__(self) -> Predictions:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._graphs:
            self._graphs.clear()
            gc.collect()
            if self._model.device.type == "cuda":
                torch.cuda.empty_cache()  # the graphs' memory is training's again

    def _predict(self, inputs: _Inputs) -> torch.Tensor:
        family = self._model.family
        return family.predict(self._model, inputs.noisy_latents, inputs.timesteps, inputs.conditioning, inputs.sizes)

    def _on_device(self, sizes: Sizes, num_images: int) -> Sizes:
        numbers = self._model.family.size_numbers
        made = None if numbers is None else send(numbers(sizes, num_images), self._model.device)
        return Sizes((), (), sizes.target_size, made)

    def _captured(self, shape: Hashable, inputs: _Inputs) -> dict[Hashable, _Graph]:
        assert self._capture is not None
        static: _Inputs = changed(inputs, torch.clone)
        try:
            return {shape: _Graph(static, self._capture(lambda: self._predict(static)))}
        except RuntimeError as error:  # of memory, or of what a capture forbids
            self._stay_eager(f"cannot be captured ({(str(error) or type(error).__name__).splitlines()[0]})")
            return {}

    def _replay(self, graph: _Graph, inputs: _Inputs) -> torch.Tensor:
        expected = None if graph.is_checked else self._predict(inputs)
        for own, new in zip(tensors_in(graph.inputs), tensors_in(inputs), strict=True):
            own.copy_(new)
        graph.captured.replay()
        self.num_replays += 1
        prediction = graph.captured.result.clone()
        if expected is None:
            return prediction
        distance = float((prediction - expected).norm() / expected.norm())
        graph.is_checked = distance <= TOLERANCE
        if not graph.is_checked:
            self._stay_eager(f"differ from eager ones by {distance:.2g} when they are replayed")
        return expected

    def _stay_eager(self, problem: str) -> None:
        self._capture = None
        self._graphs.clear()
        logger.warning("Samples are made without CUDA graphs: predictions %s.", problem)
