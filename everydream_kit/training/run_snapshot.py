"""A run's state at one moment, ready to be written while training continues.

With `copy`, tensors are cloned to host memory, so the writer sees the moment and not what came after. Without, a snapshot
refers to the live tensors and must be written before the next step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from everydream_kit.runs.resume_state import PlaceInTraining, State
from everydream_kit.training.file_hashes import OpenFile
from everydream_kit.training.resuming import image_keys, learning_rates_around, plan_digest, trained_facts
from everydream_kit.training.summary import library_versions

if TYPE_CHECKING:
    from everydream_kit.training.run import Run


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint is written from.

    Attributes:
        step: optimizer steps done.
        copied: it stands on its own, and may be written later.
        write_model, write_ema: write the live or the averaged weights as a model folder; no EMA, no writer.
        resume_tensors: optimizer, scaler, EMA, keys of the images: nested containers of tensors, one file each.
        state: position, listeners' state and what else a resume compares.
        model_bytes, num_bytes: of the model folder, and of everything.
    """

    step: int
    copied: bool
    write_model: Callable[[Path, OpenFile], None]
    write_ema: Callable[[Path, OpenFile], None] | None
    resume_tensors: dict[str, Any]
    state: State
    model_bytes: int
    num_bytes: int


class Snapshots:
    """Takes snapshots of a run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._digest: tuple[int, str] | None = None  # epoch, and the digest of its plan, which takes a while to compute

    def num_bytes(self) -> int:
        """Bytes that a copied snapshot takes."""
        learner = self.run.learner
        return count_bytes(learner.trained_weights()) + count_bytes(learner.optimizer.state_dict())

    def take(self, *, copy: bool) -> Snapshot:
        """The run's state now; `copy` makes it independent of the steps that follow."""
        run, learner = self.run, self.run.learner
        keep: Callable[[Any], Any] = clone_to_host if copy else lambda value: value
        weights, optimizer_state = run.sync.full_state()
        if not learner.is_sharded:  # else they were gathered in host memory, apart from the model
            weights, optimizer_state = keep(weights), keep(optimizer_state)
        averaged = self._averaged_weights()
        tensors = {
            "optimizer": optimizer_state,
            "precision": keep(learner.precision.state_dict()),
            "dataset": image_keys(run),
        }
        if learner.ema is not None:
            tensors["ema"] = keep(learner.ema.state_dict())
        model_bytes = self._model_bytes() if learner.saves_components else count_bytes(weights)
        return Snapshot(
            step=run.position.step,
            copied=copy or learner.is_sharded,
            write_model=lambda folder, open_file: run.write_model(folder, weights, open_file),
            write_ema=None
            if averaged is None
            else lambda folder, open_file: run.write_model(folder, averaged, open_file),
            resume_tensors=tensors,
            state=self._state(),
            model_bytes=model_bytes,
            num_bytes=model_bytes + count_bytes(tensors),
        )

    def _averaged_weights(self) -> Any:
        learner = self.run.learner
        if learner.ema is None:
            return None
        with learner.averaged_weights():
            return clone_to_host(learner.trained_weights())

    def _model_bytes(self) -> int:
        modules = self.run.learner.model.modules().values()
        return sum(tensor.nbytes for m in modules for tensor in itertools.chain(m.parameters(), m.buffers()))

    def _state(self) -> State:
        run = self.run
        return {
            "position": cast(PlaceInTraining, dict(vars(run.position))),
            "num_steps": run.num_steps,
            "seed": run.seed,
            "num_ranks": run.ranks.num_ranks,
            "num_pictures": len(run.dataset),
            "config": run.config.model_dump(mode="json"),
            "versions": library_versions(),
            "listeners": {listener.name: listener.state() for listener in run.listeners if listener.name},
            "trained": trained_facts(run.learner),
            "plan": self._plan_digest(),
            "learning_rates": learning_rates_around(run.learner.schedules, run.position.step),
        }

    def _plan_digest(self) -> str:
        epoch = self.run.position.epoch
        if self._digest is None or self._digest[0] != epoch:
            self._digest = epoch, plan_digest(self.run.dataset, self.run.plan_settings, epoch)
        return self._digest[1]


def clone_to_host(value: Any) -> Any:
    """A copy of nested containers, with every tensor cloned to host memory."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), value)


def count_bytes(value: Any) -> int:
    """Bytes of all tensors in nested containers."""
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
