"""Forward and backward passes of one shape in different ways: how long each takes, and what it computes.

Nothing is updated, and the model comes back as it was: weights, their strides, gradients, generators.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from everydream_kit.data.captions import compose_caption
from everydream_kit.data.records import Batch, MicroBatch, StepBatches
from everydream_kit.draws import generator
from everydream_kit.training.base_model import compile_blocks, precision_of
from everydream_kit.training.cuda_graphs import NUM_EAGER, add_graphs
from everydream_kit.training.optimizers import parameters_of

if TYPE_CHECKING:
    from everydream_kit.config import TrainConfig
    from everydream_kit.data.dataset import Dataset
    from everydream_kit.data.epoch_plan import EpochPlan
    from everydream_kit.models.family import Model
    from everydream_kit.training.journal import Journal
    from everydream_kit.training.parameters import TrainedPart
    from everydream_kit.training.ranks import Ranks
    from everydream_kit.training.step import Learner

NUM_WARM = NUM_EAGER + 1
"""Passes before those that count: a graph is captured in the last of them."""
NUM_TIMED = 6
TOLERANCES = {True: (1e-2, 5e-2), False: (1e-3, 1e-2)}
"""Of losses and of gradient norms, relative, in half precision and in float32: other kernels round otherwise. A gradient that
is missing, counted twice or of the pass before differs by far more."""

LOSS_SCALE = 256.0
"""Of float16 while measuring: the scaler's own first factor lets gradients overflow."""


def device_clock(device: torch.device) -> float:
    """Seconds, after everything that the device has been given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def free_memory(device: torch.device) -> None:
    """Give back what nothing holds any more, graphs' memory included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Measured:
    """Passes that were made in one way.

    Attributes:
        seconds: of one, the median.
        start_seconds: of the first passes, beyond what these would take later.
        losses: of each image of the last two passes, which differ in noise and timesteps.
        norms: of each weight's gradient in them.
    """

    seconds: float
    start_seconds: float
    losses: torch.Tensor
    norms: torch.Tensor


class Passes:
    """Makes passes of one shape in different ways.

    Args:
        make_learner: (settings, optimizer, precision) -> what a run with these settings learns with.
        works: steps of one batch each, whose shapes are equal and whose noise is not.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Model,
        parts: Sequence[TrainedPart],
        ranks: Ranks,
        *,
        make_learner: Callable[..., Learner],
        works: Sequence[StepBatches],
        clock: Callable[[torch.device], float],
        quiet: Journal,
    ) -> None:
        self._config, self._model, self._ranks, self._quiet = config, model, ranks, quiet
        self._make_learner, self._works, self._clock = make_learner, works, clock
        groups = [{"params": [p for _, p in part.parameters], "name": part.name} for part in parts]
        self._optimizer = torch.optim.SGD(groups, lr=0.0)  # knows what is trained, and is never stepped

    def measure(self, changes: Mapping[str, Any]) -> Measured:
        """Make passes with these changes of the settings.

        Raises:
            ConfigError: the settings do not go together, or a pass cannot be captured.
        """
        config = self._config.replace(**changes)
        free_memory(self._ranks.device)  # of what was measured before
        with self._as_set(config):
            return self._make(self._learner(config))

    def _make(self, learner: Learner) -> Measured:
        timings, losses, norms = [], [], []
        for number in range(NUM_WARM + NUM_TIMED):
            work = self._works[number % len(self._works)]
            started = self._clock(self._ranks.device)
            found = learner.backward(work.batches[0], work, 0)
            timings.append(self._clock(self._ranks.device) - started)
            if number >= NUM_WARM + NUM_TIMED - len(self._works):
                losses.append(found.cpu())
                norms.append(self._norms())
            self._clear(learner)
        seconds = statistics.median(timings[NUM_WARM:])
        start_seconds = max(0.0, sum(timings[:NUM_WARM]) - NUM_WARM * seconds)
        return Measured(seconds, start_seconds, torch.cat(losses), torch.cat(norms))

    def _learner(self, config: TrainConfig) -> Learner:
        device_type = self._ranks.device.type
        precision = precision_of(config, device_type)
        if precision.scaler is not None:
            precision.scaler = torch.amp.GradScaler(device_type, init_scale=LOSS_SCALE)
        learner = self._make_learner(config, optimizer=self._optimizer, precision=precision)
        add_graphs(config, learner, self._quiet)
        return learner

    def _norms(self) -> torch.Tensor:
        gradients = [p.grad for p in parameters_of(self._optimizer) if p.grad is not None]
        return torch.stack(torch._foreach_norm(gradients)).float().cpu()

    def _clear(self, learner: Learner) -> None:
        if learner.kept_gradients is None:
            self._optimizer.zero_grad(set_to_none=True)
        else:
            learner.kept_gradients.clear()

    @contextmanager
    def _as_set(self, config: TrainConfig) -> Iterator[None]:
        """While inside, the modules are as these settings want them; then as they were, to the stride."""
        denoiser: Any = self._model.denoiser
        strides = {p: p.stride() for p in denoiser.parameters()}
        compiles = config.torch_compile and not self._config.torch_compile
        if config.channels_last and not self._config.channels_last:
            denoiser.to(memory_format=torch.channels_last)
        if compiles:
            compile_blocks(denoiser, self._model.family.denoiser.blocks)
        try:
            yield
        finally:
            for module in denoiser.modules() if compiles else ():
                module._compiled_call_impl = None
            for parameter, stride in strides.items():
                if parameter.stride() != stride:
                    old = torch.empty_strided(parameter.shape, stride, dtype=parameter.dtype, device=parameter.device)
                    parameter.data = old.copy_(parameter.data)
            self._optimizer.zero_grad(set_to_none=True)


def disagreement(found: Measured, plain: Measured, *, is_half: bool) -> str | None:
    """In which numbers passes differ from plain ones, in words; None where they agree."""
    tolerances = TOLERANCES[is_half]
    pairs = (("losses", found.losses, plain.losses), ("gradient norms", found.norms, plain.norms))
    for (name, ours, theirs), tolerance in zip(pairs, tolerances, strict=True):
        if ours.shape != theirs.shape:
            return f"it gives {len(ours)} {name} and plain passes {len(theirs)}"
        distance = float((ours - theirs).norm() / theirs.norm())
        if not distance <= tolerance:  # NaN is none
            return f"its {name} differ from plain ones by {distance:.2g}, and {tolerance:g} is allowed"
    return None


def most_frequent(plan: EpochPlan) -> MicroBatch:
    """The first batch of the shape that an epoch has most of."""
    shapes = np.stack([plan.batch_bucket, np.diff(plan.batch_starts)], axis=1)
    _, firsts, counts = np.unique(shapes, axis=0, return_index=True, return_counts=True)
    batch = int(firsts[counts.argmax()])
    step = int(np.searchsorted(plan.step_starts, batch, side="right")) - 1
    return plan.step(step)[batch - int(plan.step_starts[step])]


def work_of(planned: MicroBatch, config: TrainConfig, dataset: Dataset, model: Model, plan: EpochPlan) -> StepBatches:
    """A step of one batch: the images' captions and addresses, and latents that are noise alone."""
    (width, height), num_images = planned.bucket, len(planned.draws)
    images = [dataset.image(draw.image) for draw in planned.draws]
    draws = generator(0, "no caption varies")
    channels = model.family.latent_space.stored_channels
    batch = Batch(
        planned=planned,
        captions=[compose_caption(image.caption, draws, False, image.keep_tags) for image in images],
        loss_scale=torch.ones(num_images),
        pixels=None,
        moments=torch.zeros(num_images, channels, height // 8, width // 8),
        mask=None,
        original_sizes=[planned.bucket] * num_images,
        crop_top_lefts=[(0, 0)] * num_images,
        paths=[""] * num_images,
    )
    return StepBatches(planned.epoch, planned.step, plan.num_steps, num_images, num_images, [batch])
