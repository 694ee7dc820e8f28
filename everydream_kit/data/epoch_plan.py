"""The epoch plan: which images form which batch, before anything is loaded.

`plan_epoch` is a pure function of (dataset, settings, epoch). Every choice about an image is drawn at that image's
own address (a 64-bit hash of seed, purpose, epoch, image key and repeat), so adding or removing an image changes
neither the others' order nor, unless its multiplier is a fraction, their uses. All of it is numpy on whole columns: a
million images take about a second.

An epoch is made in five moves: how often each image is used (`multiply`, ratings), the bucket of each use, a random
order, batches of one bucket (and one `batch_id`), and accumulation windows of batches (of one `batch_id`). Nothing is
duplicated to fill a batch, and nothing dropped: what is left over forms short batches.

Not here: loading (`loader`), and any tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from everydream_kit.config import default_of
from everydream_kit.data.buckets import assign_buckets, bucket_table, upscale_needed
from everydream_kit.data.dataset import UNSET, Dataset
from everydream_kit.data.records import Draw, MicroBatch, Size
from everydream_kit.draws import derive_seed
from everydream_kit.errors import ConfigError, DataError
from everydream_kit.plain_text import printable

FRACTION_STEPS = 2**40
"""Fractions of multipliers are counted in such steps, so that their sums are exact for any number of epochs."""

ROUNDING_ALLOWANCE = 2**28
"""Steps by which a sum of fractions may miss a whole number: half a step for each image and epoch."""


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """What an epoch's plan depends on next to the dataset and the epoch.

    Attributes:
        batch_size: images of one micro-batch on one rank.
        grad_accum: micro-batches of one optimizer step.
        resolutions: area classes; with several, each image is used once in every class it is big enough for.
        seed: of the run.
        num_ranks: processes that share each micro-batch; the batch over all of them is `batch_size * num_ranks`.
        rated_dropout_percent: share of the uses skipped in the last epoch, by rating; None: ratings play no part.
        max_epochs: over which the share skipped grows.
        bucket_step: grid of the buckets in pixels, or None for the resolution's own.
    """

    batch_size: int
    grad_accum: int = 1
    resolutions: tuple[int, ...] = (512,)
    seed: int = default_of("seed")
    num_ranks: int = 1
    rated_dropout_percent: float | None = None
    max_epochs: int = 1
    bucket_step: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "grad_accum", "num_ranks", "max_epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1 (got {getattr(self, name)})")
        if not self.resolutions:
            raise ConfigError("resolutions: at least one is needed, for instance (512,)")
        if self.rated_dropout_percent is not None and not 0 <= self.rated_dropout_percent <= 100:
            raise ConfigError(f"rated_dropout_percent: must be 0 to 100 (got {self.rated_dropout_percent})")


@dataclass(frozen=True)
class EpochPlan:
    """The batches of one epoch, by optimizer step.

    Attributes:
        epoch: from 0.
        settings: that made it.
        buckets: sizes that `batch_bucket` points into.
        images, repeats: (num_images,) which image, and its repeat index; batches lie one after another.
        batch_starts: (num_batches + 1,) where each batch begins in them.
        batch_bucket: (num_batches,) index into `buckets`.
        step_starts: (num_steps + 1,) where each step begins in the batches.
        dataset_size: length of the dataset, used or not.
    """

    epoch: int
    settings: PlanSettings
    buckets: tuple[Size, ...]
    images: np.ndarray
    repeats: np.ndarray
    batch_starts: np.ndarray
    batch_bucket: np.ndarray
    step_starts: np.ndarray
    dataset_size: int

    @property
    def num_steps(self) -> int:
        return len(self.step_starts) - 1

    @property
    def num_images(self) -> int:
        """Images seen in this epoch, repeats counted, fillers not."""
        return len(self.images)

    @property
    def num_batches(self) -> int:
        """Micro-batches over all ranks together."""
        return len(self.batch_bucket)

    def images_in_step(self, step: int) -> int:
        """Images of one optimizer step over all ranks, fillers not counted."""
        first, last = self.step_starts[step], self.step_starts[step + 1]
        return int(self.batch_starts[last] - self.batch_starts[first])

    @property
    def images_in_fullest_step(self) -> int:
        """The most images that a step of this epoch has: what every step's loss is divided by.

        So each image has the same weight in the epoch, whatever step it is in. Where there is a full window, it is
        batch_size · grad_accum · num_ranks.
        """
        return int(np.diff(self.batch_starts[self.step_starts]).max(initial=0))

    def step(self, step: int, rank: int = 0) -> tuple[MicroBatch, ...]:
        """The micro-batches of one optimizer step on one rank; any step, in any order, at the same cost.

        Raises:
            IndexError: there is no such step or rank.
        """
        if not 0 <= step < self.num_steps or not 0 <= rank < self.settings.num_ranks:
            raise IndexError(
                f"step {step}, rank {rank}: this plan has {self.num_steps} steps and {self.settings.num_ranks} ranks"
            )
        first, last = int(self.step_starts[step]), int(self.step_starts[step + 1])
        return tuple(self._micro_batch(step, first, batch, rank) for batch in range(first, last))

    def _micro_batch(self, step: int, first: int, batch: int, rank: int) -> MicroBatch:
        """A rank's contiguous share of a batch; shares differ by one image at most."""
        start, end = int(self.batch_starts[batch]), int(self.batch_starts[batch + 1])
        num_ranks = self.settings.num_ranks
        low = start + (end - start) * rank // num_ranks
        high = start + (end - start) * (rank + 1) // num_ranks
        draws = tuple(map(Draw, self.images[low:high].tolist(), self.repeats[low:high].tolist()))
        if not draws:
            draws = (Draw(int(self.images[start]), int(self.repeats[start]), filler=True),)
        return MicroBatch(
            epoch=self.epoch,
            step=step,
            index=batch - first,
            bucket=self.buckets[self.batch_bucket[batch]],
            draws=draws,
            position=low - int(self.batch_starts[first]),
        )

    def num_uses(self) -> np.ndarray:
        """(number of images,) how often each image of the dataset is used in this epoch."""
        return np.bincount(self.images, minlength=self.dataset_size)

    def write_schedule(self, path: str | Path, dataset: Dataset) -> None:
        """Write every use as a line `step:00000, wh:[w, h], r:False, path:/...`, EveryDream 2's format.

        `step` is the optimizer step, and `r` says that the batch is short.
        """
        full = self.settings.batch_size * self.settings.num_ranks
        step_of_batch = np.repeat(np.arange(self.num_steps), np.diff(self.step_starts))
        with Path(path).open("w", encoding="utf-8") as file:
            for batch, step in enumerate(step_of_batch.tolist()):
                start, end = self.batch_starts[batch], self.batch_starts[batch + 1]
                width, height = self.buckets[self.batch_bucket[batch]]
                head = f"step:{step:05}, wh:[{width}, {height}], r:{bool(end - start < full)}, path:"
                file.writelines(f"{head}{printable(dataset.path(i))}\n" for i in self.images[start:end].tolist())

    def write_ledger(self, path: str | Path, dataset: Dataset) -> None:
        """Write how often each image is used in this epoch: `uses<TAB>path`, every image of the dataset."""
        with Path(path).open("w", encoding="utf-8") as file:
            file.writelines(
                f"{uses}\t{printable(dataset.path(i))}\n" for i, uses in enumerate(self.num_uses().tolist())
            )


def plan_epoch(dataset: Dataset, settings: PlanSettings, epoch: int) -> EpochPlan:
    """Plan one epoch.

    Args:
        dataset: the images.
        settings: batch size, resolutions and so on.
        epoch: from 0.

    Raises:
        DataError: no image is used in any epoch. An epoch without one, where multipliers add up to less than 1, is
            a plan of no steps.
        ConfigError: a resolution has no buckets.
    """
    buckets = tuple(dict.fromkeys(b for r in settings.resolutions for b in bucket_table(r, settings.bucket_step)))
    images, rounds = _choose_uses(dataset, settings, epoch)
    if not len(images) and not _is_ever_used(dataset):
        raise DataError(_nothing_left(dataset))
    images, repeats, bucket = _spread_over_classes(dataset, settings, buckets, images, rounds)
    order = np.argsort(_hash(dataset, (settings.seed, "order", epoch), images, repeats), kind="stable")
    images, repeats, bucket = images[order], repeats[order], bucket[order]
    order, sizes, groups = _form_batches(dataset.numbers["batch"][images], bucket, len(buckets), settings)
    batch_order, step_sizes = _form_windows(sizes, groups, len(buckets), settings, epoch)
    order = _reorder_batches(order, sizes, batch_order)
    return EpochPlan(
        epoch=epoch,
        settings=settings,
        buckets=buckets,
        images=images[order].astype(np.int32),
        repeats=repeats[order].astype(np.int32),
        batch_starts=_starts(sizes[batch_order]),
        batch_bucket=(groups % len(buckets))[batch_order].astype(np.int16),
        step_starts=_starts(step_sizes),
        dataset_size=len(dataset),
    )


def possible_buckets(dataset: Dataset, settings: PlanSettings) -> list[tuple[int, Size]]:
    """Every (image, bucket) that can occur in any epoch, so what a latent cache must hold."""
    buckets = tuple(dict.fromkeys(b for r in settings.resolutions for b in bucket_table(r, settings.bucket_step)))
    used = np.flatnonzero(dataset.numbers["multiply"] > 0)
    images, _, bucket = _spread_over_classes(dataset, settings, buckets, used, np.zeros_like(used))
    return [(index, buckets[number]) for index, number in zip(images.tolist(), bucket.tolist(), strict=True)]


def num_empty_epochs(dataset: Dataset, settings: PlanSettings, epochs: range) -> int:
    """How many of these epochs pass before one that has an image; without one, all of them."""
    if (dataset.numbers["multiply"] >= 1).any():
        return 0
    return next((i for i, epoch in enumerate(epochs) if len(_choose_uses(dataset, settings, epoch)[0])), len(epochs))


def _is_ever_used(dataset: Dataset) -> bool:
    return bool((np.round(dataset.numbers["multiply"] * FRACTION_STEPS) > 0).any())


def _nothing_left(dataset: Dataset) -> str:
    roots = ", ".join(dataset.roots)
    if not len(dataset):
        return f"{roots}: no usable image. The dataset's problems name the reason for each file."
    return f"{roots}: all {len(dataset)} images are switched off, by multiply 0 or by too small a fraction."


def _choose_uses(dataset: Dataset, settings: PlanSettings, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Which images are used, and the repeat index of each use, after multipliers and ratings.

    A multiplier's whole part is exact in every epoch. Its fraction takes turns, see `_extra_uses`.

    The share that ratings skip grows evenly from nothing in the first epoch to all of it in the last.
    """
    multiply = dataset.numbers["multiply"]
    whole = np.floor(multiply)
    everyone = np.arange(len(dataset), dtype=np.int64)
    uses = whole.astype(np.int64) + _extra_uses(dataset, settings.seed, multiply - whole, epoch)
    images = np.repeat(everyone, uses)
    rounds = _count_within(uses)
    if settings.rated_dropout_percent is None:
        return images, rounds
    skipped_fraction = settings.rated_dropout_percent / 100 * min(1.0, epoch / max(1, settings.max_epochs - 1))
    num_kept = max(round(len(images) * (1 - skipped_fraction)), min(1, len(images)))
    kept = _draw_by_rating(dataset, (settings.seed, "rating", epoch), images, rounds, num_kept)
    return images[kept], rounds[kept]


def _extra_uses(dataset: Dataset, seed: int, fractions: np.ndarray, epoch: int) -> np.ndarray:
    """(n,) 0 or 1: which images have one use more in this epoch, for the fraction of their multiplier.

    After E epochs an image of fraction f had f·E extra uses to within one, and an epoch has the sum of all fractions,
    rounded up or down (up first, so a run does not begin with an empty epoch). Images of one fraction take turns in an
    order that is drawn; which fraction's turn it is decides `_turns`.
    """
    steps = np.round(fractions * FRACTION_STEPS).astype(np.int64)
    extra = np.zeros(len(fractions), np.int64)
    some = np.flatnonzero(steps)
    if not len(some):
        return extra
    order = some[np.lexsort((_hash(dataset, (seed, "multiply", 0), some), steps[some]))]
    values, sizes = np.unique(steps[order], return_counts=True)
    before, now = _turns(values * sizes, epoch)
    size = np.repeat(sizes, sizes)
    place = (_count_within(sizes) - np.repeat(before % sizes, sizes)) % size
    extra[order] = place < np.repeat(now, sizes)
    return extra


def _turns(rates: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """How many extra uses each group of images had before an epoch, and has in it.

    Proportionate-progress scheduling (Baruah et al. 1996): a group's k-th use beyond the whole part of its rate falls
    between the epochs where (k-1) and k are reached, and of those that may come, the one that must come soonest does.
    Each group's share is exact to within one, whatever the others do.

    Args:
        rates: (groups,) uses per epoch, times FRACTION_STEPS.
    """
    whole, rest = np.divmod(rates, FRACTION_STEPS)
    total = int(rest.sum())
    had, now = np.zeros_like(rest), np.zeros_like(rest)
    for e in range(epoch + 1):
        had += now
        due = rest * (e + 1)  # whole FRACTION_STEPS: uses that must have happened by the end of this epoch
        wanted = _rounded_up(total * (e + 1)) - _rounded_up(total * e)
        must = had < due // FRACTION_STEPS
        may = (had < -(-due // FRACTION_STEPS)) & ~must
        now = must.astype(np.int64)
        others = np.flatnonzero(may)
        reached = (had[others] + 1) * FRACTION_STEPS  # when the next use's share is complete: reached / rest epochs
        deadline, spare = -(-reached // rest[others]), reached % rest[others] == 0
        soonest = others[np.lexsort((-rest[others], spare, deadline))]
        now[soonest[: max(0, wanted - int(must.sum()))]] = 1
    return had + whole * epoch, now + whole


def _rounded_up(steps: int) -> int:
    """Uses of so many FRACTION_STEPS, rounded up; what the rounding of fractions may have added does not count."""
    return (steps + FRACTION_STEPS - ROUNDING_ALLOWANCE) // FRACTION_STEPS


def _draw_by_rating(
    dataset: Dataset, address: tuple[int, str, int], images: np.ndarray, rounds: np.ndarray, num_kept: int
) -> np.ndarray:
    """Sorted positions of the uses that stay: weighted sampling without replacement (Efraimidis & Spirakis 2006)."""
    ratings = dataset.numbers["rating"][images].astype(np.float64)
    ratings[np.isnan(ratings)] = 1.0
    uniform = (_hash(dataset, address, images, rounds) + 0.5) / 2.0**64
    with np.errstate(divide="ignore"):
        arrivals = -np.log(uniform) / ratings  # rating 0 never arrives
    return np.sort(np.argsort(arrivals, kind="stable")[:num_kept])


def _spread_over_classes(
    dataset: Dataset, settings: PlanSettings, buckets: tuple[Size, ...], images: np.ndarray, rounds: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One use for each resolution class that the image is big enough for, at least the smallest.

    Returns:
        Image, repeat (numbered through over rounds and classes) and bucket of each use.
    """
    index_of = {size: index for index, size in enumerate(buckets)}
    widths, heights = dataset.numbers["width"], dataset.numbers["height"]
    if len(set(settings.resolutions)) == 1:
        return images, rounds, assign_buckets(widths, heights, buckets)[images]
    sides = np.array(buckets)
    chosen: list[tuple[np.ndarray, np.ndarray]] = []
    for resolution in sorted(set(settings.resolutions)):
        table = bucket_table(resolution, settings.bucket_step)
        renumber = np.array([index_of[size] for size in table])
        bucket = renumber[assign_buckets(widths, heights, table)]
        fits = upscale_needed(widths, heights, sides[bucket, 0], sides[bucket, 1]) <= 1
        chosen.append((bucket, fits if chosen else np.ones_like(fits)))
    num_classes = np.stack([fits for _, fits in chosen]).sum(axis=0, dtype=np.int64)  # (n,)
    before = np.zeros(len(dataset), np.int64)
    parts = []
    for bucket, fits in chosen:
        mine = fits[images]
        parts.append((images[mine], (rounds * num_classes[images] + before[images])[mine], bucket[images[mine]]))
        before += fits
    used, repeats, bucket = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return used, repeats, bucket


def _form_batches(
    batch_ids: np.ndarray, bucket: np.ndarray, num_buckets: int, settings: PlanSettings
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut the uses, which are in random order, into batches of one bucket and one `batch_id`.

    What does not fill a batch of its `batch_id` joins the images without one, as in EveryDream 2.

    Returns:
        Order of the uses, batch after batch; size of each batch; its group (named group × buckets + bucket).
    """
    size = settings.batch_size * settings.num_ranks
    group = (batch_ids.astype(np.int64) - UNSET) * num_buckets + bucket  # the unnamed come first
    order = np.argsort(group, kind="stable")
    counts = np.bincount(group)
    position = _count_within(counts)
    ordered = group[order]
    left_over = (ordered >= num_buckets) & (position >= counts[ordered] // size * size)
    if left_over.any():
        group[order[left_over]] %= num_buckets
        order = np.argsort(group, kind="stable")
        counts = np.bincount(group)
    num_batches = -(-counts // size)
    groups = np.repeat(np.arange(len(counts)), num_batches)
    is_last = np.append(groups[1:] != groups[:-1], True)
    sizes = np.where(is_last, counts[groups] - (num_batches[groups] - 1) * size, size)
    return order, sizes, groups


def _form_windows(
    sizes: np.ndarray, groups: np.ndarray, num_buckets: int, settings: PlanSettings, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Put batches into accumulation windows, and the windows into random order.

    Batches of one `batch_id` share windows, whatever their buckets, and those of a name that are fewer than a window
    stay together in one. Of the others, full batches of one bucket go together as far as they fill windows; what is
    left, and the short ones, are lined up by bucket, fill up the windows of names, and are cut into windows. So there
    are as few optimizer steps as there can be, but for what keeping names together costs.

    Returns:
        Order of the batches, window after window; number of batches in each window.
    """
    accum = settings.grad_accum
    bucket, name = groups % num_buckets, groups // num_buckets  # name 0: none
    full = sizes == settings.batch_size * settings.num_ranks
    subject = np.where(name > 0, num_buckets + name, bucket)  # what a window is made of
    by_subject = np.lexsort((-sizes, bucket, subject))
    num_full = np.bincount(subject, weights=full).astype(np.int64)
    position = np.empty_like(by_subject)
    position[by_subject] = _count_within(np.bincount(subject))
    pure = full & (position < (num_full // accum * accum)[subject])
    rest = by_subject[~pure[by_subject]]
    pool = rest[name[rest] == 0]
    shared, num_taken = _share_windows(rest[name[rest] > 0], name, pool, accum)
    pool = pool[num_taken:]
    order = np.concatenate([by_subject[pure[by_subject]], *shared, pool])
    num_pooled = -(-len(pool) // accum)
    window_sizes = np.full(int(pure.sum()) // accum + len(shared) + num_pooled, accum)
    first = int(pure.sum()) // accum
    window_sizes[first : first + len(shared)] = [len(window) for window in shared]
    if num_pooled:
        window_sizes[-1] = len(pool) - accum * (num_pooled - 1)
    shuffled = np.argsort(
        _mix(np.arange(len(window_sizes), dtype=np.uint64) ^ np.uint64(derive_seed(settings.seed, "windows", epoch)))
    )
    starts = _starts(window_sizes)[:-1]
    spread = np.repeat(starts[shuffled], window_sizes[shuffled]) + _count_within(window_sizes[shuffled])
    return order[spread], window_sizes[shuffled]


def _share_windows(named: np.ndarray, name: np.ndarray, pool: np.ndarray, accum: int) -> tuple[list[np.ndarray], int]:
    """Windows for what is left of each name, fewer batches than a window has, filled up from the pool.

    The largest go first, each into the fullest window that has room for it.

    Returns:
        The windows, and how many batches from the pool's beginning they took.
    """
    _, counts = np.unique(name[named], return_counts=True)
    pieces = sorted(np.split(named, np.cumsum(counts)[:-1]), key=len, reverse=True) if len(named) else []
    with_room: dict[int, list[list[np.ndarray]]] = {}  # windows by the batches that they still take
    for piece in pieces:
        room = next((r for r in range(len(piece), accum) if with_room.get(r)), None)
        window = [] if room is None else with_room[room].pop()
        with_room.setdefault((accum if room is None else room) - len(piece), []).append([*window, piece])
    windows, num_taken = [], 0
    for room in sorted(with_room):
        for window in with_room[room]:
            filling = pool[num_taken : num_taken + room]
            num_taken += len(filling)
            windows.append(np.concatenate([*window, filling]))
    return windows, num_taken


def _reorder_batches(order: np.ndarray, sizes: np.ndarray, batch_order: np.ndarray) -> np.ndarray:
    """Positions of the uses when batches are put into `batch_order`."""
    starts = _starts(sizes)[:-1]
    new_sizes = sizes[batch_order]
    positions: np.ndarray = order[np.repeat(starts[batch_order], new_sizes) + _count_within(new_sizes)]
    return positions


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _count_within(counts: np.ndarray) -> np.ndarray:
    """[2, 0, 3] -> [0, 1, 0, 1, 2]: the position of each item within its own run."""
    positions: np.ndarray = np.arange(int(counts.sum())) - np.repeat(_starts(counts)[:-1], counts)
    return positions


def _hash(
    dataset: Dataset, address: tuple[int, str, int], images: np.ndarray, repeats: np.ndarray | None = None
) -> np.ndarray:
    """(n,) uint64 random words at the addresses (seed, purpose, epoch, image key, repeat)."""
    words = _mix(dataset.key_hashes[images] ^ np.uint64(derive_seed(*address)))
    if repeats is None:
        return words
    return _mix(words + repeats.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _mix(words: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014): every output bit depends on every input bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = words ^ (words >> np.uint64(31))
    return mixed
