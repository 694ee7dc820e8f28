"""`speed: auto`: how a run's passes are made fastest on its machine, chosen by a short measurement before its first step.

Measured are forward and backward passes of the most frequent batch shape, on the run's own model, captions and noise, with
latents of noise. Nothing is updated, and the model comes back as it was, so a run with a choice of its own gives the numbers of
one where a person chose the same. Each candidate must also give the losses and gradients of plain passes: what computes
something else is faster for no good reason.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from everydream_kit.data.epoch_plan import plan_epoch
from everydream_kit.errors import ConfigError
from everydream_kit.training.base_model import drops_out, precision_of, prepare_speed
from everydream_kit.training.cuda_graphs import why_eager
from everydream_kit.training.journal import Journal
from everydream_kit.training.measured_passes import (
    Measured,
    Passes,
    device_clock,
    disagreement,
    free_memory,
    most_frequent,
    work_of,
)
from everydream_kit.training.sampling_listener import FAILURES

if TYPE_CHECKING:
    from everydream_kit.config import TrainConfig
    from everydream_kit.data.dataset import Dataset
    from everydream_kit.data.epoch_plan import PlanSettings
    from everydream_kit.models.family import Model
    from everydream_kit.training.parameters import TrainedPart
    from everydream_kit.training.ranks import Ranks
    from everydream_kit.training.step import Learner

CHOSEN = ("speed", "channels_last", "cuda_graphs", "torch_compile")
"""Settings that a choice may change; with them in the run's settings file, a resumed run does not choose again."""
PLAIN = "plain"

MIN_PASSES = 2000
"""Of a run that is worth measuring for: each candidate takes ten passes, and all with a combination fifty, 2.5 % of these."""
MARGIN = 0.03
"""Share of the time that a candidate must save."""

COMPILE_SECONDS = 180.0
"""That compiling is taken to need until it has been measured."""
COMPILE_GAIN = 0.1
"""Share of the time that compiled blocks are taken to save until that has been measured."""


@dataclass(frozen=True)
class Candidate:
    """A way to make passes.

    Attributes:
        changes: the settings that it is.
        why_not: why a model on a device cannot have it, in words; None where it can.
        takes_memory: it needs more than plain passes.
        start_seconds: that it takes before the first pass, as far as nothing is measured.
    """

    changes: Mapping[str, Any]
    why_not: Callable[[TrainConfig, Model, Ranks], str | None] = lambda config, model, ranks: None
    takes_memory: bool = False
    start_seconds: float = 0.0

    def __str__(self) -> str:
        return " + ".join(self.changes)

    def __add__(self, other: Candidate) -> Candidate:
        return Candidate({**self.changes, **other.changes}, takes_memory=self.takes_memory or other.takes_memory)


def _why_no_layout(config: TrainConfig, model: Model, ranks: Ranks) -> str | None:
    has_convolutions = any(isinstance(module, torch.nn.Conv2d) for module in model.denoiser.modules())
    return None if has_convolutions else "the denoiser has no convolutions"


def _why_no_graphs(config: TrainConfig, model: Model, ranks: Ranks) -> str | None:
    return why_eager(config, model, ranks, ranks.device.type)


def _why_no_compiler(config: TrainConfig, model: Model, ranks: Ranks) -> str | None:
    if ranks.device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    found = any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))
    return None if found else "there is no C++ compiler"


CANDIDATES = (
    Candidate({"channels_last": True}, _why_no_layout),
    Candidate({"cuda_graphs": "on"}, _why_no_graphs, takes_memory=True),
    Candidate({"torch_compile": True}, _why_no_compiler, start_seconds=COMPILE_SECONDS),
)


@dataclass(frozen=True)
class SpeedTrial:
    """What a measurement needs apart from the run.

    Attributes:
        why_too_large: why a run with these settings would not fit the device's memory; None where it fits.
        min_passes: a run with fewer is not measured for.
    """

    why_too_large: Callable[[TrainConfig], str | None] = lambda config: None
    candidates: Sequence[Candidate] = CANDIDATES
    clock: Callable[[torch.device], float] = device_clock
    min_passes: int = MIN_PASSES


@dataclass(frozen=True)
class MeasuredRun:
    """The run whose passes are measured.

    Attributes:
        make_learner: as in `Passes`.
        num_steps: of the whole run.
    """

    model: Model
    parts: Sequence[TrainedPart]
    ranks: Ranks
    make_learner: Callable[..., Learner]
    dataset: Dataset
    plan_settings: PlanSettings
    num_steps: int
    journal: Journal


def choose_speed(config: TrainConfig, trial: SpeedTrial | None, run: MeasuredRun) -> TrainConfig:
    """The settings with the choice in the place of `speed: auto`, and the model made so.

    The choice is reported in the log and as an event `speed`.
    """
    if trial is None or config.speed != "auto":
        return config
    model, ranks, journal = run.model, run.ranks, run.journal
    plan = plan_epoch(run.dataset, run.plan_settings, 0)
    num_passes = run.num_steps * plan.num_batches // max(1, plan.num_steps)
    reason = _why_unmeasured(config, trial, model, ranks, num_passes)
    if reason is not None:
        journal.note(f"speed auto: nothing was measured: {reason}. Passes are made as set.")
        journal.report("speed", chosen={}, seconds={}, reason=reason)
        return config.replace(speed="manual")
    journal.set_state("starting", message="measuring which passes are fastest")
    planned = most_frequent(plan)
    passes = Passes(
        config,
        model,
        run.parts,
        ranks,
        make_learner=run.make_learner,
        works=[work_of(replace(planned, epoch=epoch), config, run.dataset, model, plan) for epoch in (0, 1)],
        clock=trial.clock,
        quiet=Journal(journal.folder, writes=False),
    )
    choice = _Choice(config, trial, model, ranks, passes, num_passes, journal)
    chosen = choice.make()
    free_memory(ranks.device)
    width, height = planned.bucket
    journal.note(
        f"speed auto: a pass of {len(planned.draws)} images of {width} x {height} px takes {choice.table()}. "
        f"Using {' and '.join(chosen) or 'plain passes'} for the {num_passes:,} passes of the run."
    )
    seconds = {name: round(one.seconds, 6) for name, one in choice.measured.items()}
    journal.report("speed", chosen=chosen, seconds=seconds, not_used=choice.not_used, num_passes=num_passes)
    journal.set_state("starting", message=None)
    config = config.replace(**chosen, speed="manual")
    prepare_speed(model, config)
    return config


@dataclass
class _Choice:
    """Measures candidate after candidate, and keeps what was found.

    Attributes:
        measured: by the candidates' names.
        not_used: why others are not in question.
    """

    config: TrainConfig
    trial: SpeedTrial
    model: Model
    ranks: Ranks
    passes: Passes
    num_passes: int
    journal: Journal
    measured: dict[str, Measured] = field(default_factory=dict)
    not_used: dict[str, str] = field(default_factory=dict)

    def make(self) -> dict[str, Any]:
        """The settings to change; none where plain passes are best."""
        plain = replace(self.passes.measure({}), start_seconds=0.0)  # what libraries do at their first use
        self.measured[PLAIN] = plain
        if not bool(plain.losses.isfinite().all() and plain.norms.isfinite().all()):
            self.not_used["every candidate"] = "the losses of plain passes are not finite"
            return {}
        candidates = [one for one in self.trial.candidates if self._is_possible(one) and self._try(one)]
        winners = sorted((one for one in candidates if self._saves(one, PLAIN)), key=self._total)
        if not winners:
            return {}
        again = self.passes.measure({})  # a machine that was busy at first and is not any more decides nothing
        if again.seconds < plain.seconds:
            self.measured[PLAIN] = replace(plain, seconds=again.seconds)
        best = winners[0]
        for other in winners[1:]:
            both = best + other
            if self._is_possible(both) and self._try(both) and self._saves(both, str(best)):
                best = both
        return dict(best.changes) if self._saves(best, PLAIN) else {}

    def table(self) -> str:
        """The measurements, in words."""
        found = ", ".join(f"{name} {1000 * one.seconds:.4g} ms" for name, one in self.measured.items())
        others = "; ".join(f"{name} ({reason})" for name, reason in self.not_used.items())
        return f"{found}. Not used: {others}" if others else found

    def _is_possible(self, candidate: Candidate) -> bool:
        reason = self._why_not(candidate)
        if reason is not None:
            self.not_used[str(candidate)] = reason
        return reason is None

    def _why_not(self, candidate: Candidate) -> str | None:
        if all(getattr(self.config, name) == value for name, value in candidate.changes.items()):
            return "it is set, and plain passes have it"
        try:
            config = self.config.replace(**candidate.changes)
        except ConfigError as error:
            return str(error)
        reason = candidate.why_not(config, self.model, self.ranks)
        if reason is None and candidate.start_seconds:
            left = self.num_passes * self.measured[PLAIN].seconds
            if left * COMPILE_GAIN < candidate.start_seconds:
                return f"about {candidate.start_seconds:.0f} s before the first pass do not pay in {left:.0f} s of training"
        if reason is None and candidate.takes_memory:
            reason = self.trial.why_too_large(config)
        return reason

    def _try(self, candidate: Candidate) -> bool:
        """Measure a candidate; a warning where it fails, or computes something else."""
        name = str(candidate)
        try:
            found = self.passes.measure(candidate.changes)
            problem = disagreement(found, self.measured[PLAIN], is_half=self._is_half())
        except FAILURES as error:
            problem = f"it failed ({(str(error) or type(error).__name__).splitlines()[0]})"
        if problem is None:
            self.measured[name] = found
            return True
        self.not_used[name] = problem
        self.journal.warn(f"speed auto: {name} is not used: {problem}. Please report this with everydream doctor.")
        return False

    def _is_half(self) -> bool:
        return precision_of(self.config, self.ranks.device.type).dtype != torch.float32

    def _total(self, candidate: Candidate | str) -> float:
        """Seconds of the whole run's passes, with what further shapes take to begin."""
        found = self.measured[str(candidate)]
        return found.start_seconds + self.num_passes * found.seconds

    def _saves(self, candidate: Candidate, other: str) -> bool:
        return self._total(candidate) < (1 - MARGIN) * self._total(other)


def _why_unmeasured(config: TrainConfig, trial: SpeedTrial, model: Model, ranks: Ranks, num_passes: int) -> str | None:
    """Why this run is not measured for, in words."""
    modules = [model.denoiser, *model.text_encoders]
    reasons = {
        "the run has several processes": ranks.num_ranks > 1,
        "a plug-in's hooks would be called for passes that are not steps": bool(config.plugins),
        "fused_backward updates weights within a pass": config.fused_backward,
        "blocks are kept in host memory": bool(config.blocks_to_swap),
        "with dropout, two passes cannot be compared": any(one.training and drops_out(one) for one in modules),
        f"the run has {num_passes:,} passes, and it pays from about {trial.min_passes:,} on": (
            num_passes < max(1, trial.min_passes)
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
