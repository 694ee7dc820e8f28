"""What a checkpoint says of the run that it belongs to, and what is compared with it when the run is resumed.

Weights and the optimizer's state say nothing of the settings that they came from. So a checkpoint also holds: which
parameters each optimizer had, the keys of all images, a digest of the current epoch's plan, and the learning rates around
its step. A resume that differs in one of them is refused, or continues and says what is different.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from everydream_kit.data.epoch_plan import plan_epoch
from everydream_kit.errors import CheckpointError
from everydream_kit.training.optimizers import unwrap_optimizers
from everydream_kit.training.position import Position
from everydream_kit.training.reports import Averages
from everydream_kit.training.training_images import estimate_steps

if TYPE_CHECKING:
    from everydream_kit.data.dataset import Dataset
    from everydream_kit.data.epoch_plan import PlanSettings
    from everydream_kit.runs.resume_state import Rates, State, TrainedFacts
    from everydream_kit.training.run import Run
    from everydream_kit.training.step import Learner, Schedules

RATE_JUMP = 0.05
"""Share by which the next learning rate may differ from the one that would have come, before it is a warning."""

PLAN_SETTINGS = ("batch_size", "grad_accum", "resolution", "rated_dataset", "rated_dataset_target_dropout_percent")
"""Settings that decide which images share a step, next to the dataset and the number of processes."""


def learning_rates_around(schedules: Schedules, step: int) -> dict[str, Rates]:
    """Each part's rate of the last of so many steps, and of the one that follows."""
    return {part: {"last": rate(max(0, step - 1)), "next": rate(step)} for part, rate in schedules.items()}


def trained_facts(learner: Learner) -> dict[str, TrainedFacts]:
    """For each part its optimizer's class, and a digest of the names and shapes of its parameters."""
    classes = {g["name"]: type(one).__name__ for one in unwrap_optimizers(learner.optimizer) for g in one.param_groups}
    facts: dict[str, TrainedFacts] = {}
    for part in learner.parts:
        names = "\n".join(f"{name} {tuple(parameter.shape)}" for name, parameter in part.parameters)
        digest = hashlib.blake2b(names.encode(), digest_size=16).hexdigest()
        facts[part.name] = {"optimizer": classes[part.name], "parameters": digest}
    return facts


def plan_digest(dataset: Dataset, plan_settings: PlanSettings, epoch: int) -> str:
    """Of an epoch's batches: equal for one process and for several that share the same batches."""
    plan = plan_epoch(dataset, plan_settings, epoch)
    digest = hashlib.blake2b(digest_size=16)
    sizes = np.array(plan.buckets)[plan.batch_bucket] if plan.num_batches else np.zeros((0, 2))
    columns = (dataset.key_hashes[plan.images], plan.repeats, plan.batch_starts, plan.step_starts, sizes)
    for column in columns:
        digest.update(np.ascontiguousarray(column).astype("<u8").tobytes())
    return digest.hexdigest()


def image_keys(run: Run) -> dict[str, torch.Tensor]:
    """The keys of all images, as hashes; a million take 8 MB."""
    return {"keys": torch.from_numpy(np.sort(run.dataset.key_hashes).view(np.int64).copy())}


def refuse_other_training(run: Run, state: State) -> None:
    """Raises: CheckpointError, if other parameters are trained now, or with another optimizer."""
    before, now = state.get("trained"), trained_facts(run.learner)
    if before is None or before == now:  # None: saved before this was noted
        return
    found = []
    for part in dict.fromkeys([*before, *now]):
        if part not in now or part not in before:
            found.append(f"the {part} {'was' if part in before else 'was not'} trained")
        elif before[part]["optimizer"] != now[part]["optimizer"]:
            found.append(f"the {part}'s optimizer was {before[part]['optimizer']} and is {now[part]['optimizer']}")
        elif before[part] != now[part]:
            found.append(f"other parameters of the {part} were trained")
    raise CheckpointError(
        f"step {state['position']['step']}: {'; '.join(found)}. What is trained, and with which optimizer, cannot change on a "
        "resume: set the optimizers and what is frozen as they were, or start a new run with resume_ckpt."
    )


def resolve_position(run: Run, state: State, tensors: dict[str, Any]) -> None:
    """Put the run where it continues. What is different from when it was saved is a warning.

    An epoch whose batches are others now starts over: counting steps does not say which of its images were seen.
    `state` loses what its listeners had noted of that epoch, and the run's number of steps and schedules are settled anew.
    """
    run.position = position = Position(**state["position"])
    _warn_of_other_images(run, state, tensors)
    if "plan" not in state or state["plan"] == plan_digest(run.dataset, run.plan_settings, position.epoch):
        _keep_num_steps(run, state)
        return
    if position.step_in_epoch:
        run.journal.warn(
            f"Epoch {position.epoch + 1} starts over: {_what_changed(run, state)}, so its batches differ now. "
            f"Images of its first {position.step_in_epoch} steps are trained on again."
        )
        run.position = position = replace(position, step_in_epoch=0)
        state["listeners"].pop("picture_table", None)
        state["listeners"].get("loss_log", {})["epoch"] = vars(Averages())
    run.resolve_steps(position.step + _steps_left(run, position))


def warn_of_rates(run: Run, state: State) -> None:
    """A warning for each part whose next learning rate is not the one that would have come."""
    step = run.position.step
    for part, rates in state.get("learning_rates", {}).items():
        schedule = run.learner.schedules.get(part)
        if schedule is None or run.is_complete():
            continue
        rate = schedule(step)
        if abs(rate - rates["next"]) > RATE_JUMP * max(rate, rates["next"]):
            run.journal.warn(
                f"The learning rate of the {part} goes from {rates['last']:.3g} at step {step} to {rate:.3g} at step "
                f"{step + 1}, since lr, its schedule or the run's length changed. "
                "If you do not want that, set lr or lr_decay_steps."
            )


def _warn_of_other_images(run: Run, state: State, tensors: dict[str, Any]) -> None:
    now = run.dataset.key_hashes
    if "dataset" in tensors:
        before = tensors["dataset"]["keys"].numpy().view(np.uint64)
        num_gone, num_new = len(np.setdiff1d(before, now)), len(np.setdiff1d(now, before))
    else:  # saved before the keys were
        difference = len(now) - state["num_pictures"]
        num_gone, num_new = max(0, -difference), max(0, difference)
    if num_gone or num_new:
        run.journal.warn(
            f"The dataset has changed since this was saved: {num_gone} images are gone and {num_new} are new. "
            "The run continues with those that are there, and will differ from an uninterrupted run."
        )


def _what_changed(run: Run, state: State) -> str:
    before, now = state.get("config", {}), run.config.model_dump(mode="json")
    changed = [
        f"{name} was {before.get(name)} and is {now[name]}" for name in PLAN_SETTINGS if before.get(name) != now[name]
    ]
    if state["num_ranks"] != run.ranks.num_ranks:
        changed.append(f"{state['num_ranks']} processes shared each batch and {run.ranks.num_ranks} do now")
    return ", ".join(changed) or "the images, their sizes or their multipliers changed"


def _keep_num_steps(run: Run, state: State) -> None:
    """Keep the number of steps that the run had: after an earlier change it is not what its settings alone say."""
    num_steps, before = state.get("num_steps"), state.get("config", {})
    if num_steps is None:  # saved before this was noted
        return
    lengths = before.get("max_epochs", run.config.max_epochs), before.get("max_steps")
    if lengths == (run.config.max_epochs, run.config.max_steps):
        run.resolve_steps(num_steps)
    elif num_steps != estimate_steps(run.dataset, run.plan_settings, *lengths):
        start = replace(run.position, step=run.position.step - run.position.step_in_epoch, step_in_epoch=0)
        run.resolve_steps(start.step + _steps_left(run, start))


def _steps_left(run: Run, position: Position) -> int:
    """Steps from an epoch's beginning to the run's end."""
    num_epochs = run.config.max_epochs - position.epoch
    max_steps = None if run.config.max_steps is None else max(0, run.config.max_steps - position.step)
    if num_epochs <= 0 or max_steps == 0:
        return 0
    return estimate_steps(run.dataset, run.plan_settings, run.config.max_epochs, max_steps, start=position.epoch)
