"""The JSON objects of a run folder: their keys and types, and the check that what was read has them.

They are typed dictionaries, since they are JSON objects wherever they are used; a class would give every key a second name. A
file may be another version's, or damaged, or have come from a stranger. So a reader drops what is not of its type, and no
caller checks again. Keys that are not named here are left as they are: nobody relies on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

Action = Literal["stop", "save", "sample"]
ENDED_STATES = ("finished", "stopped", "failed")
"""What a trainer says last."""


class Status(TypedDict, total=False):
    """`status.json`: the last status of a process; every key may be missing. `alive` is added by whoever looks (`Job`)."""

    state: str
    """starting, running, saving, sampling, validating, one of ENDED_STATES, or `died`, which only an observer can say."""
    progress: float | None
    """Share of sampling or encoding that is done, 0 to 1."""
    message: str | None
    step: int
    num_steps: int | None
    epoch: int
    loss: float | None
    images_per_second: float | None
    eta_seconds: float | None
    memory_bytes: int | None
    stopped_by: str | None
    heartbeat: float
    """Unix time of the last write."""
    pid: int
    host: str
    place: str
    started: str
    """These four are the process (`identity`)."""
    alive: bool
    path: str
    url: str
    folder: str
    """What a background task made: a file, an address on the Hub, a dataset's folder."""


class Event(TypedDict, total=False):
    """A line of `events.jsonl`. `kind` is always there; the other keys depend on it, and `step` counts optimizer steps done."""

    kind: str
    time: float
    step: int
    epoch: int
    loss: float | None
    lr: dict[str, float] | float
    """By trained part; one number in old files."""
    images_per_second: float | None
    memory_bytes: int | None
    gradient_norm: float | None
    message: str
    path: str
    files: list[str]
    ema_loss: float | None
    """Of the averaged weights, where they are measured as well."""
    best: bool
    set: str
    index: int
    prompt: str
    seed: int


class ImageLoss(TypedDict):
    """A row of `losses/ep<N>.json`."""

    path: str
    mean_loss: float
    """Over the image's uses in that epoch."""
    count: int
    """These uses."""


class Request(TypedDict, total=False):
    """`control.json`: a request to the trainer. Malformed ones are unknown actions, with the problem in words."""

    action: str
    id: str | None
    problem: str


def well_typed(values: Mapping[str, Any], schema: type) -> dict[str, Any]:
    """An object without the entries whose values are not of the type that the schema gives their key."""
    wrong = wrong_keys(values, schema)
    return {name: value for name, value in values.items() if name not in wrong}


def wrong_keys(values: Mapping[str, Any], schema: type) -> list[str]:
    """Keys of the schema whose values have another type."""
    try:
        _adapter(schema).validate_python(dict(values), strict=True)
    except ValidationError as error:
        wrong = {problem["loc"][0] for problem in error.errors(include_url=False, include_input=False)}
        return [name for name in values if name in wrong]
    return []


@lru_cache(maxsize=8)
def _adapter(schema: type) -> TypeAdapter[Any]:
    return TypeAdapter(schema)
