"""`batch_size: auto` and `optimizer: auto`, resolved before the run writes its settings down, so that a resumed run takes the
same.

The largest batch whose estimated memory fits what is free right now, on the GPU, or in host memory on a CPU; the search
is `advice.largest_batch`. On a GPU two real steps then prove it, and where they run out of memory a smaller one is
tried. Of several processes the main one decides for all, and nothing is proved. The optimizer is chosen after the batch, which
is chosen with the device's own (`advice.choose_optimizer`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from everydream_kit.config import wants_auto_optimizer
from everydream_kit.errors import MemoryLimitError
from everydream_kit.preflight.advice import (
    EXACT_OPTIMIZER,
    MARGIN,
    SMALL_OPTIMIZER,
    Budget,
    Estimate,
    choose_optimizer,
    describe_blocks,
    fewest_blocks,
    largest_batch,
)
from everydream_kit.preflight.gpus import GpuSpec, this_gpu
from everydream_kit.preflight.planning import memory_model

if TYPE_CHECKING:
    from everydream_kit.config import TrainConfig
    from everydream_kit.preflight.probe import Probe
    from everydream_kit.training.journal import Journal
    from everydream_kit.training.ranks import Ranks


def resolve_auto_settings(
    config: TrainConfig, ranks: Ranks, journal: Journal, *, estimate: Estimate | None = None
) -> TrainConfig:
    """The config with numbers and a name where `batch_size`, `blocks_to_swap` and `optimizer` are `auto`, else itself.

    What was chosen is reported in the log and as events `batch size`, `optimizer` and `blocks to swap`. The main process
    decides for all.

    Args:
        estimate: the memory model.

    Raises:
        MemoryLimitError: not even one image fits.
    """
    wants_optimizer = wants_auto_optimizer(config)
    if wants_optimizer:
        config = config.replace(optimizer=None)  # the batch is chosen with the device's own
    config = resolve_batch_size(config, ranks, journal, estimate=estimate)
    if wants_optimizer:
        config = resolve_optimizer(config, ranks, journal, estimate)
    if config.blocks_to_swap == "auto":
        config = resolve_blocks(config, ranks, journal, estimate)
    return config


def resolve_optimizer(config: TrainConfig, ranks: Ranks, journal: Journal, estimate: Estimate | None) -> TrainConfig:
    """The config with an optimizer's name; reported in the log and as an event `optimizer`."""
    is_exact = True
    if ranks.is_main:
        journal.set_state("starting", message="choosing the optimizer")
        chosen, reason = choose_optimizer(config, budget_here(config, ranks, estimate))
        journal.set_state("starting", message=None)
        journal.note(reason)
        journal.report("optimizer", optimizer=chosen.optimizer, reason=reason)
        is_exact = chosen.optimizer == EXACT_OPTIMIZER
    return config.replace(optimizer=EXACT_OPTIMIZER if ranks.share(is_exact) else SMALL_OPTIMIZER)


def resolve_blocks(config: TrainConfig, ranks: Ranks, journal: Journal, estimate: Estimate | None) -> TrainConfig:
    """The config with a number in the place of `blocks_to_swap: auto`; reported in the log and as an event `blocks to swap`."""
    chosen = 0
    if ranks.is_main:
        journal.set_state("starting", message="choosing the blocks to keep in host memory")
        budget = budget_here(config, ranks, estimate)
        chosen, found = fewest_blocks(config, budget)
        journal.set_state("starting", message=None)
        journal.note(describe_blocks(chosen, found, budget))
        numbers = {} if found is None else {"num_blocks": found.num_blocks, "estimated_bytes": found.peak_bytes}
        journal.report("blocks to swap", blocks=chosen, **numbers)
    return config.replace(blocks_to_swap=ranks.share(chosen))


def resolve_batch_size(
    config: TrainConfig,
    ranks: Ranks,
    journal: Journal,
    *,
    estimate: Estimate | None = None,
    measure: Callable[[TrainConfig], Probe] | None = None,
) -> TrainConfig:
    """The config with a number in the place of `auto`; logged, and an event `batch size`.

    Args:
        estimate: the memory model.
        measure: makes two real steps; by default `probe.probe` on the GPU of a single process, and nothing elsewhere.

    Raises:
        MemoryLimitError: not even one image fits.
    """
    if config.batch_size != "auto":
        return config
    chosen = 0
    if ranks.is_main:
        journal.set_state("starting", message="choosing the batch size")
        chosen = _choose(config, journal, budget_here(config, ranks, estimate))
        if measure is None and ranks.device.type == "cuda" and ranks.num_ranks == 1:
            from everydream_kit.preflight.probe import probe as measure
        if measure is not None:
            chosen = _prove(config, chosen, journal, measure)
        journal.set_state("starting", message=None)
    return config.replace(batch_size=ranks.share(chosen))


def _choose(config: TrainConfig, journal: Journal, budget: Budget) -> int:
    chosen, found = largest_batch(config, budget)
    largest, where = budget.largest_batch, budget.gpu_spec.name if budget.gpu_spec is not None else "this CPU"
    journal.note(f"batch_size auto: {chosen}, the largest up to {largest} that fits {where}: {budget.figures(found)}")
    journal.report(
        "batch size",
        batch_size=chosen,
        estimated_bytes=found.peak_bytes,
        room_bytes=budget.limit_bytes,
        largest=largest,
        device=where,
    )
    return chosen


def _prove(config: TrainConfig, chosen: int, journal: Journal, measure: Callable[[TrainConfig], Probe]) -> int:
    """Make two real steps; a quarter less, and at least one image, where they run out of memory."""
    while chosen:
        found = measure(config.replace(batch_size=chosen))
        journal.note(f"batch_size {chosen}: {found.reason}")
        journal.report("batch size measured", batch_size=chosen, fits=found.fits, reason=found.reason)
        if found.fits is not False:
            return chosen
        chosen = min(chosen - 1, chosen * 3 // 4)
    raise MemoryLimitError(
        "batch_size: not even one image fits: two real steps ran out of memory. `everydream plan` says what to lower."
    )


def budget_here(config: TrainConfig, ranks: Ranks, estimate: Estimate | None) -> Budget:
    """What a run may take of this process's device."""
    gpu_spec, limit_bytes = free_room(ranks)
    return Budget(gpu_spec, estimate or memory_model(config), limit_bytes)


def free_room(ranks: Ranks) -> tuple[GpuSpec | None, int | None]:
    """The GPU, and what a run's estimate may reach there: of what is free, less the margin. Neither for a CPU."""
    if ranks.device.type != "cuda":
        return None, None
    import torch

    gpu_spec = this_gpu(ranks.device.index or 0)
    assert gpu_spec is not None
    free, _ = torch.cuda.mem_get_info(ranks.device)
    # the context already exists, and in the estimate as well
    return gpu_spec, int((free + gpu_spec.context_bytes) * (1 - MARGIN))


def memory_check(ranks: Ranks) -> Callable[[TrainConfig], str | None]:
    """Says of settings why their run would not fit what is free on the device now, before anything is loaded; None: it fits."""
    gpu_spec, limit_bytes = free_room(ranks)
    budget = Budget(gpu_spec, lambda config, **facts: memory_model(config)(config, **facts), limit_bytes)

    def why_too_large(config: TrainConfig) -> str | None:
        return None if budget.fits(config) else f"it does not fit ({budget.figures(budget(config))})"

    return why_too_large
