"""What to change so that a run fits a GPU, and how far it could go: the largest batch and resolution,
and the optimizer.

A question to the memory model costs seconds, so few are asked: the measures of `training.memory_measures`, cheapest first, form
a ladder on which each rung takes no more memory than the one before, and the first rung that fits is found by halving;
batch and resolution are bracketed by interpolation. A share of the memory is kept free, since the model of it is a
model.

Not here: the estimate itself (`memory_estimate`), which enters as a function, and the words of a plan (`planning`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from everydream_kit.data.cache_room import free_memory
from everydream_kit.errors import ConfigError, MemoryLimitError
from everydream_kit.preflight.gpus import GIB, GpuSpec
from everydream_kit.training.memory_measures import Measure, measures_left

if TYPE_CHECKING:
    from everydream_kit.config import TrainConfig
    from everydream_kit.preflight.memory_records import MemoryEstimate

MARGIN = 0.07
"""Share of the GPU that stays free: the memory model is right to within a tenth, on both sides."""
LARGEST_BATCH = 16
"""Beyond it a step learns hardly more and takes as much longer; `auto` and the advice stop here."""
LARGEST_BATCH_ON_CPU = 4
"""Where `auto` stops on a CPU: a larger batch is no faster there."""
EXACT_OPTIMIZER, SMALL_OPTIMIZER = "adamw", "adamw8bit"
"""What `optimizer: auto` chooses between."""
SMALLEST_RESOLUTION, LARGEST_RESOLUTION, RESOLUTION_STEP = 256, 1536, 64


Estimate = Callable[..., "MemoryEstimate"]
"""`memory.estimate_memory`, or a stand-in for it: the config, and what is known of the GPU by name."""


@dataclass(frozen=True)
class Advice:
    """The nearest configuration that fits.

    Attributes:
        changes: settings that differ from what was asked for; empty where it fits as it is.
        config: with the changes.
        estimate: of that configuration.
        reasons: what was changed and why, one line each, in the order in which it was tried.
        fits: False where nothing that can be lowered is enough; then `config` is the smallest that was tried.
    """

    changes: dict[str, Any]
    config: TrainConfig
    estimate: MemoryEstimate
    reasons: tuple[str, ...]
    fits: bool = True


class Budget:
    """What a run may take of a device, and the memory model's answers about it; each question is asked once.

    Args:
        gpu_spec: the GPU; None for this CPU.
        estimate: the memory model.
        limit_bytes: what a run's estimate may reach; by default what the device has, less the margin.
    """

    def __init__(self, gpu_spec: GpuSpec | None, estimate: Estimate, limit_bytes: int | None = None) -> None:
        self.gpu_spec, self._estimate = gpu_spec, estimate
        self.limit_bytes = device_room(gpu_spec) if limit_bytes is None else limit_bytes
        self.largest_batch = LARGEST_BATCH if gpu_spec is not None else LARGEST_BATCH_ON_CPU
        self._answers: dict[str, MemoryEstimate] = {}

    def __call__(self, config: TrainConfig) -> MemoryEstimate:
        """What a run takes of the device."""
        key = config.to_json()
        if key not in self._answers:
            self._answers[key] = self._estimate(config, **self._facts())
        return self._answers[key]

    def fits(self, config: TrainConfig) -> bool:
        """Whether a run's peak leaves the margin free."""
        return self(config).peak_bytes <= self.limit_bytes

    def figures(self, estimate: MemoryEstimate) -> str:
        """What is needed next to what there is, in words."""
        return f"{estimate.peak_bytes / GIB:.1f} GiB estimated, {self.limit_bytes / GIB:.1f} GiB available"

    def _facts(self) -> dict[str, Any]:
        if self.gpu_spec is None:
            return {"device": "cpu"}
        names = ("has_bf16", "context_bytes", "fragmentation")
        return {"device": "cuda", **{name: getattr(self.gpu_spec, name) for name in names}}


def device_room(gpu_spec: GpuSpec | None) -> int:
    """Bytes that a run's estimate may reach on a GPU, or on this CPU."""
    return int((gpu_spec.memory_bytes if gpu_spec is not None else free_memory()) * (1 - MARGIN))


def make_it_fit(config: TrainConfig, budget: Budget) -> Advice:
    """The fewest and cheapest changes with which a run fits a GPU.

    Args:
        config: as requested; `batch_size: auto` begins at the largest batch that is advised.
    """
    if config.batch_size == "auto":
        config = config.replace(batch_size=LARGEST_BATCH)
    if budget.fits(config):
        return Advice({}, config, budget(config), ())
    ladder = _ladder(config, budget(config).family, budget.gpu_spec is None or budget.gpu_spec.has_bf16)
    likely = next((n for n, (measure, _) in enumerate(ladder) if measure.costs != "nothing"), 0)
    rung = _first_that_fits([c for _, c in ladder], budget, likely)
    if rung is None:
        smallest = ladder[-1][1] if ladder else config
        taken = [measure for measure, _ in ladder]
        return Advice(_changes(config, smallest), smallest, budget(smallest), _reasons(taken), fits=False)
    taken = [measure for measure, _ in ladder[: rung + 1]]
    chosen = _with_fewest_blocks(ladder[rung][1], budget)
    needed = [measure for measure in taken if measure.costs != "nothing"]
    if 0 < len(needed) < len(taken):  # what costs nothing may not have been needed: few changes are easy to follow
        plain = _with_fewest_blocks(_take(config, needed), budget)
        if budget.fits(plain):
            chosen, taken = plain, needed
    return Advice(_changes(config, chosen), chosen, budget(chosen), _reasons(taken))


def largest_batch(config: TrainConfig, budget: Budget) -> tuple[int, MemoryEstimate]:
    """The largest batch that fits, up to `Budget.largest_batch`, with everything else as it is.

    Returns:
        The batch size, and its estimate.

    Raises:
        MemoryLimitError: not even one image fits.
    """

    def peak(batch_size: int) -> MemoryEstimate:
        return budget(config.replace(batch_size=batch_size))

    swaps, config = config, config.replace(blocks_to_swap=0) if config.blocks_to_swap == "auto" else config
    found = _largest(range(1, budget.largest_batch + 1), peak, budget.limit_bytes)
    if found is None and swaps != config:  # smaller batches cost less time than moving blocks
        config = swaps
        found = _largest([1], peak, budget.limit_bytes)
    if found is None:
        raise MemoryLimitError(
            f"batch_size: not even one image fits: needs about {peak(1).peak_bytes / GIB:.1f} GiB; available: "
            f"{budget.limit_bytes / GIB:.1f} GiB{f' on the {budget.gpu_spec.name}' if budget.gpu_spec else ''}. "
            "`everydream plan` says what to lower."
        )
    return found


def fewest_blocks(config: TrainConfig, budget: Budget) -> tuple[int, MemoryEstimate | None]:
    """How many blocks must wait in host memory so that the rest fits, with everything else as it is: `blocks_to_swap: auto`.

    All of them where even that is not enough, and none on a CPU, where it saves nothing.

    Returns:
        The number, and the estimate with it; None on a CPU, where nothing needs to be estimated.
    """

    def peak(count: int | str) -> MemoryEstimate:
        return budget(config.replace(blocks_to_swap=count))

    if budget.gpu_spec is None:
        return 0, None
    total = peak("auto").num_blocks
    # all of them are asked about by one name, so that an answer that already exists is found
    stays = _largest(range(total + 1), lambda stay: peak(total - stay if stay else "auto"), budget.limit_bytes)
    return (total, peak("auto")) if stays is None else (total - stays[0], stays[1])


def describe_blocks(chosen: int, found: MemoryEstimate | None, budget: Budget) -> str:
    """What `blocks_to_swap: auto` came to, in words."""
    if found is None:
        return f"blocks_to_swap auto: {chosen}, since it saves nothing on a CPU"
    return f"blocks_to_swap auto: {chosen} of {found.num_blocks} ({budget.figures(found)})"


def choose_optimizer(config: TrainConfig, budget: Budget) -> tuple[TrainConfig, str]:
    """The config with an optimizer's name in the place of `auto`, and what was chosen in words.

    On a GPU fused AdamW, whose states are exact, where the estimate leaves the margin free with it; else bitsandbytes' 8-bit
    AdamW, whose states take a quarter. On a CPU fused AdamW: 8 bits save little there and cost much time.

    Args:
        config: with its batch size as a number.
    """
    exact = config.replace(optimizer=EXACT_OPTIMIZER)
    if budget.gpu_spec is None:
        return exact, "optimizer auto: AdamW (fused), as always on a CPU"
    if config.parallel == "fsdp2":
        return exact, "optimizer auto: AdamW (fused); 8-bit states do not work on the slices of fsdp2"
    figures = budget.figures(budget(exact))
    if budget.fits(exact):
        return exact, f"optimizer auto: AdamW (fused), which fits ({figures})"
    small = config.replace(optimizer=SMALL_OPTIMIZER)
    return small, f"optimizer auto: 8-bit AdamW; AdamW (fused) does not fit ({figures})"


def largest_resolution(config: TrainConfig, budget: Budget) -> tuple[int, MemoryEstimate] | None:
    """The largest area class that fits, with everything else as it is, and its estimate; None where not even 256 px do."""
    choices = range(SMALLEST_RESOLUTION, LARGEST_RESOLUTION + 1, RESOLUTION_STEP)
    return _largest(choices, lambda resolution: budget(config.replace(resolution=resolution)), budget.limit_bytes)


def _largest(
    choices: Sequence[int], peak: Callable[[int], MemoryEstimate], limit: int
) -> tuple[int, MemoryEstimate] | None:
    """The largest choice whose peak is within the limit; peaks grow with the choice.

    Peaks are nearly straight lines, so a guess by interpolation is mostly right; a guess by halving after each keeps a bent one
    from being asked about at every choice.
    """
    high = peak(choices[-1])
    if high.peak_bytes <= limit:
        return choices[-1], high
    low = peak(choices[0])
    if low.peak_bytes > limit:
        return None
    first, last, interpolates = 0, len(choices) - 1, True
    while last - first > 1:
        share = (limit - low.peak_bytes) / (high.peak_bytes - low.peak_bytes) if interpolates else 0.5
        interpolates = not interpolates
        guess = first + min(max(int(share * (last - first)), 1), last - first - 1)
        found = peak(choices[guess])
        if found.peak_bytes <= limit:
            first, low = guess, found
        else:
            last, high = guess, found
    return choices[first], low


def _with_fewest_blocks(config: TrainConfig, budget: Budget) -> TrainConfig:
    """A number where blocks are to wait in host memory."""
    if config.blocks_to_swap != "auto":
        return config
    return config.replace(blocks_to_swap=fewest_blocks(config, budget)[0])


def _ladder(config: TrainConfig, family: str | None, has_bf16: bool) -> list[tuple[Measure, TrainConfig]]:
    """Apply one measure after the other, each on top of those before, until none is left."""
    rungs: list[tuple[Measure, TrainConfig]] = []
    while True:
        left = [m for m in measures_left(config, family) if m.is_estimated and (has_bf16 or m.name != "weight_dtype")]
        if not left:
            return rungs
        config = config.replace(**left[0].changes)
        rungs.append((left[0], config))


def _first_that_fits(rungs: Sequence[TrainConfig], budget: Budget, likely: int) -> int | None:
    """Index of the first that fits; None if none does. Asks about the likely one first, and continues by halving."""
    low, high, middle = 0, len(rungs), likely
    while low < high:
        if budget.fits(rungs[middle]):
            high = middle
        else:
            low = middle + 1
        middle = (low + high) // 2
    return low if low < len(rungs) else None


def _take(config: TrainConfig, measures: Sequence[Measure]) -> TrainConfig:
    changes: dict[str, Any] = {}
    for measure in measures:
        changes.update(measure.changes)
    try:
        return config.replace(**changes)
    except ConfigError:  # one of them was allowed next to one that is skipped now
        return config


def _changes(before: TrainConfig, after: TrainConfig) -> dict[str, Any]:
    old, new = before.model_dump(), after.model_dump()
    return {name: value for name, value in new.items() if value != old[name]}


def _reasons(taken: Sequence[Measure]) -> tuple[str, ...]:
    """A measure that was taken several times is listed once, as it was taken last."""
    return tuple(map(str, {measure.name: measure for measure in taken}.values()))
