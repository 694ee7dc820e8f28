"""Validation: the loss on fixed images, at fixed noise levels, with fixed noise.

A training loss is mostly chance: which timestep, which noise. Here each image is measured at the same few timesteps
(the middles of equal parts of the range) with noise of its own that never changes, so two values of a curve differ by
the weights alone. That costs a forward pass for each image and timestep, without gradients.

Here are the split, the pass, and what follows from a curve (best, trend, early stopping). When it is due is in
the settings; how the loss is drawn and logged is the listener's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from everydream_kit.data.duplicates import find_duplicates
from everydream_kit.data.image_digests import digest_images
from everydream_kit.draws import derive_seed, torch_generator
from everydream_kit.errors import ConfigError
from everydream_kit.runs.resume_state import number_of
from everydream_kit.training.noise import make_noise
from everydream_kit.training.objectives import denoising_losses

if TYPE_CHECKING:
    from everydream_kit.data.dataset import Dataset
    from everydream_kit.data.records import Batch
    from everydream_kit.training.objectives import Objective

NUM_TIMESTEPS = 4
TREND_WINDOW = 5
"""Measurements that the trend is judged by, EveryDream 2's."""

ALIKE_BITS = 8
"""Bits of 64 in which perceptual hashes may differ for images to stay on one side: more than for the duplicates that
are offered for deletion, since keeping two strangers together costs nothing."""


def content_groups(dataset: Dataset) -> list[str]:
    """A name for the content of each image: files with the same bytes have the same name, and so have images that look
    alike (`data.duplicates`: another size, another compression, a light retouch).

    Every image is decoded once, at a small scale. Images that cannot be read are groups of their own.
    """
    digests = digest_images(((dataset.path(index), None) for index in range(len(dataset))), len(dataset))
    names = [digest.tobytes().hex() if digest.any() else dataset.key(index) for index, digest in enumerate(digests)]
    for alike in find_duplicates(dataset, max_distance=ALIKE_BITS).near:
        name = min(names[index] for index in alike)
        for index in alike:
            names[index] = name
    return names


def split_indices(
    groups: Sequence[str], proportion: float, seed: int, purpose: str = "validation split"
) -> tuple[list[int], list[int]]:
    """Take a share of the images out, whole groups at a time, so that no image is on both sides.

    The groups are ordered by a hash of their name: an image that is added or removed leaves the others where they are,
    but for those at the edge.

    Args:
        groups: content group of each image.
        proportion: share to take out, of the images: at least max(1, ceil(share · n)).
        seed: of the validation config.
        purpose: distinguishes splits of the same images.

    Returns:
        Indices that stay, and indices that are taken out, both ascending.

    Raises:
        ConfigError: nothing would stay.
    """
    wanted = max(1, math.ceil(round(proportion * len(groups), 9)))
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    taken: list[int] = []
    for group in sorted(members, key=lambda name: derive_seed(seed, purpose, name)):
        if len(taken) >= wanted:
            break
        taken += members[group]
    chosen = frozenset(taken)
    stays = [index for index in range(len(groups)) if index not in chosen]
    if not stays:
        raise ConfigError(
            f"validation_split_proportion: of {len(groups)} images ({len(members)} different ones), taking {wanted} out for "
            "validation leaves none to train on; add images, lower the proportion, or set validation_split_mode to none"
        )
    return stays, sorted(taken)


def once_each(dataset: Dataset) -> Dataset:
    """The same images, each used exactly once in an epoch, whatever its `multiply` says."""
    ones = np.ones(len(dataset), dataset.numbers["multiply"].dtype)
    return dataclasses.replace(dataset, numbers={**dataset.numbers, "multiply": ones})


def timestep_grid(start: int, end: int, count: int = NUM_TIMESTEPS) -> list[int]:
    """The middles of `count` equal parts of start .. end: 125, 375, 625, 875 for the whole range."""
    return [start + int((2 * i + 1) * (end - start) / (2 * count)) for i in range(count)]


@dataclass(frozen=True)
class ValidationLoss:
    """What a pass found.

    Attributes:
        mean: over images, each counted once and alike, and over timesteps.
        by_timestep: mean over images for each timestep of the grid.
        num_images: how many.
    """

    mean: float
    by_timestep: dict[int, float]
    num_images: int


def validate(
    batches: Iterable[Batch],
    *,
    keys: Callable[[Batch], Sequence[str]],
    encode: Callable[[Batch], tuple[torch.Tensor, Any]],
    predict: Callable[[Batch, torch.Tensor, Any, torch.Tensor], torch.Tensor],
    objective: Objective,
    timesteps: Sequence[int],
    seed: int,
    modules: Iterable[torch.nn.Module] = (),
) -> ValidationLoss:
    """Measure the loss.

    Args:
        batches: each image once, loaded without chance (`make_loader(..., fixed=True)`). Fillers count for nothing.
        keys: the images' keys, of which their noise is a function.
        encode: latents (B, 4, h, w) and conditioning of a batch; must not draw, or draw by address.
        predict: (batch, timesteps (B,), conditioning, noisy latents) -> model_pred.
        objective: the training's own, so that both curves mean the same.
        timesteps: measured at each of these, see `timestep_grid`.
        seed: of the validation config.
        modules: put into evaluation mode meanwhile.

    Raises:
        ConfigError: there are no images.
    """
    sums = torch.zeros(len(timesteps), dtype=torch.float64)
    num_images = 0
    with torch.no_grad(), _evaluation_mode(modules):
        for batch in batches:
            counts = torch.tensor([not draw.filler for draw in batch.planned.draws])
            latents, conditioning = encode(batch)
            for row, timestep in enumerate(timesteps):
                generators = [torch_generator(seed, "validation", key, timestep) for key in keys(batch)]
                noise = make_noise(tuple(latents.shape[1:]), generators).to(latents)
                steps = torch.full((len(latents),), timestep, device=latents.device)
                predict_from = partial(predict, batch, steps, conditioning)
                losses = denoising_losses(objective, predict_from, latents, noise, steps, mask=batch.mask)
                sums[row] += losses.double().cpu()[counts].sum()
            num_images += int(counts.sum())
    if not num_images:
        raise ConfigError("validation: there are no images to validate with")
    means = (sums / num_images).tolist()
    return ValidationLoss(sum(means) / len(means), dict(zip(timesteps, means, strict=True)), num_images)


@contextmanager
def _evaluation_mode(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Modules in evaluation mode while inside; each submodule goes back to its own mode, also after an error."""
    modes = [(one, one.training) for module in modules for one in module.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass
class LossCurve:
    """What follows from the values so far. Goes into the checkpoint by `state` and `restore`.

    Attributes:
        values: (step, loss) of every measurement.
        best_loss, best_step: the lowest value, and its step.
        num_since_best: measurements since then.
    """

    values: list[tuple[int, float]] = field(default_factory=list)
    best_loss: float | None = None
    best_step: int | None = None
    num_since_best: int = 0

    def add(self, step: int, loss: float) -> bool:
        """Note a measurement. Returns whether it is the best so far. A value that is not finite is never the best."""
        self.values.append((step, loss))
        is_best = math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss)
        if is_best:
            self.best_loss, self.best_step, self.num_since_best = loss, step, 0
        else:
            self.num_since_best += 1
        return is_best

    def is_rising(self, window: int = TREND_WINDOW) -> bool:
        """Whether the last `window` values rise (the slope of a straight line through them) and none of them is the
        best.

        A single bad value, or a curve that has flattened out, does not count.
        """
        last = [loss for _, loss in self.values[-window:]]
        if len(last) < window or self.num_since_best < window:
            return False
        middle = (window - 1) / 2
        return sum((position - middle) * loss for position, loss in enumerate(last)) > 0

    def should_stop(self, patience: int | None) -> bool:
        """Whether the best value has stood for `patience` measurements. None: never."""
        return patience is not None and self.num_since_best >= patience

    def state(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def restore(cls, state: dict[str, Any]) -> LossCurve:
        """A curve from JSON values. Raises: KeyError, TypeError, ValueError: they are no curve's."""
        counts = {name: int(state[name]) for name in ("num_since_best",)}
        best = {name: None if state[name] is None else number_of(state, name) for name in ("best_loss", "best_step")}
        values = [(int(step), float(loss)) for step, loss in state["values"]]
        return cls(**{**state, **counts, **best, "values": values})


def validation_steps(every_n_epochs: float, epoch: int, num_steps: int) -> frozenset[int]:
    """After which optimizer steps of an epoch to measure.

    Below 1 an epoch has n = round(1 / every_n_epochs) measurements, after steps ceil(i·L / n) - 1 for i = 1 .. n;
    above, the last step of every round(every_n_epochs)-th epoch.

    Args:
        epoch: from 0.
        num_steps: L, optimizer steps in this epoch.

    Returns:
        Steps within the epoch, from 0.
    """
    if every_n_epochs < 1:
        times = max(1, round(1 / every_n_epochs))
        return frozenset(math.ceil(i * num_steps / times) - 1 for i in range(1, times + 1))
    return frozenset({num_steps - 1}) if (epoch + 1) % round(every_n_epochs) == 0 else frozenset()
