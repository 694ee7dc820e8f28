"""Checks of what a checkpoint says about the place in training: `resume/state.json`.

A checkpoint may come from the Hub, or from a disk that went bad. So every value is checked before a run is built on it, and
a state that makes no sense is a `CheckpointError`, upon which the checkpoint before is tried.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

from everydream_kit.errors import CheckpointError
from everydream_kit.runs.layout import RESUME_STATE

POSITION_FIELDS = ("step", "epoch", "step_in_epoch", "images")
MAX_COUNT = 2**53
MAX_SEED = 2**63
RESTORE_ERRORS = (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, ArithmeticError)
"""What loading a state of another shape raises, in the libraries and in the listeners."""


class PlaceInTraining(TypedDict):
    """Counts of `training.position.Position`."""

    step: int
    epoch: int
    step_in_epoch: int
    images: int


class Rates(TypedDict):
    """Learning rates of a part: of the last step, and of the one that would have followed."""

    last: float
    next: float


class TrainedFacts(TypedDict):
    """What is trained of a part: the optimizer's class, and a digest of names and shapes of its parameters."""

    optimizer: str
    parameters: str


_Required = TypedDict(  # noqa: UP013 - the key is no name of today
    "_Required",
    {
        "position": PlaceInTraining,
        "num_pictures": int,  # of the dataset; the key is that of older checkpoints
        "listeners": dict[str, dict[str, Any]],  # each one's state, by its name
    },
)


class State(_Required, total=False):
    """`resume/state.json`. What older versions did not write may be missing."""

    num_steps: int
    """Of the whole run, as estimated when this was saved."""
    seed: int
    num_ranks: int
    config: dict[str, Any]
    versions: dict[str, str]
    trained: dict[str, TrainedFacts]
    plan: str
    """Digest of the current epoch's batches."""
    learning_rates: dict[str, Rates]


def check_state(state: Mapping[str, Any], folder: Path) -> State:
    """Make sure that a run can be put where this state says.

    Args:
        state: of `resume/state.json`.
        folder: the checkpoint, for messages.

    Returns:
        The same state, whose types are known now.

    Raises:
        CheckpointError: a value is missing or makes no sense.
    """
    position = state.get("position")
    if not isinstance(position, dict) or sorted(position) != sorted(POSITION_FIELDS):
        raise _refusal(folder, "position", f"the counts {', '.join(POSITION_FIELDS)}")
    for name in POSITION_FIELDS:
        if not _is_count(position[name]):
            raise _refusal(folder, f"position.{name}", "a count")
    if position["step_in_epoch"] > position["step"]:
        raise _refusal(folder, "position.step_in_epoch", "no more than position.step")
    if not _is_count(state.get("num_pictures")):
        raise _refusal(folder, "num_pictures", "a count")
    if not _is_count(state.get("num_steps", 0)):
        raise _refusal(folder, "num_steps", "a count")
    seed = state.get("seed", 0)
    if type(seed) is not int or not 0 <= seed < MAX_SEED:
        raise _refusal(folder, "seed", "a whole number from 0")
    versions = state.get("versions", {})
    if not isinstance(versions, dict) or not all(isinstance(one, str) for one in versions.values()):
        raise _refusal(folder, "versions", "a text for each library")
    listeners = state.get("listeners")
    if not isinstance(listeners, dict) or not all(isinstance(one, dict) for one in listeners.values()):
        raise _refusal(folder, "listeners", "an object for each listener")
    return cast(State, dict(state))


def number_of(values: Mapping[str, Any], name: str) -> float:
    """A finite number of a listener's state. Raises: ValueError, KeyError."""
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} is not a number")
    return value


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_COUNT


def _refusal(folder: Path, name: str, wanted: str) -> CheckpointError:
    return CheckpointError(f"{folder / RESUME_STATE}: damaged: {name} must be {wanted}.")
