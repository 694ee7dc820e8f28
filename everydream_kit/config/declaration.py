"""What a parameter's declaration is made of: its group, its `Knob` for people, and its `Facts` for the code.

A parameter is one annotated field of a `Group`. Whoever needs to know something about parameters in general (what may
change on resume, what a fetched run may bring, what decides the memory) asks `facts_of`, and keeps no list of names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

Effect = Literal["memory", "speed", "result"]
Change = Literal["never", "resume", "live"]
TrainingKind = Literal["full", "lora", "textual_inversion"]
FamilyName = Literal["sd1", "sd2", "sdxl", "z_image", "flux2_klein", "flux1", "anima", "krea2", "qwen_image"]

NOTHING: tuple[Effect, ...] = ()
MEMORY: tuple[Effect, ...] = ("memory",)
SPEED: tuple[Effect, ...] = ("speed",)
RESULT: tuple[Effect, ...] = ("result",)
MEMORY_AND_SPEED: tuple[Effect, ...] = ("memory", "speed")
MEMORY_AND_RESULT: tuple[Effect, ...] = ("memory", "result")
SPEED_AND_RESULT: tuple[Effect, ...] = ("speed", "result")
EVERYTHING: tuple[Effect, ...] = ("memory", "speed", "result")

DIFFUSION: tuple[FamilyName, ...] = ("sd1", "sd2", "sdxl")
FLOW: tuple[FamilyName, ...] = tuple(name for name in get_args(FamilyName) if name not in DIFFUSION)
"""Families by what they predict: the noise (diffusion), or the velocity (flow matching)."""


@dataclass(frozen=True)
class Knob:
    """What a form and the reference page say about a parameter next to its effect.

    Attributes:
        basic: shown unfolded in the form.
        unit: unit of the value, in words.
        memory: what it costs or saves in device memory.
        when: when to change it.
        step: sensible increment for a slider.
        log: a slider for it should be logarithmic.
    """

    basic: bool = False
    unit: str = ""
    memory: str = "none"
    when: str = ""
    step: float | None = None
    log: bool = False


@dataclass(frozen=True)
class Facts:
    """What the code has to know about a parameter. The first two are stated for every one.

    Attributes:
        affects: device memory, images per second, and what the trained weights become.
        change: the latest moment at which it may change: "never" after the run began, on a "resume", or "live".
        kinds: training kinds that it has a meaning for.
        families: model families that it has a meaning for.
        refusal: why a run with any other family is refused where it is set; "it" is that family. Empty: a warning is enough.
        needs: settings of which one must be on, or it has no effect.
        unless: settings of which each, where it is on, takes its effect away.
        follows: settings without which its value may be an error: in a fetched run it waits for them.
        fsdp2: the only values that work where the model is sharded; None: all do.
        optimizer_argument: it is passed by its name to the optimizer, and a part with another optimizer does not inherit it.
        names: what it names outside the run (code, a path, a repository, a service), which a fetched run must not
            decide; empty for a setting that names nothing.
        decided_here: whoever fetches a run decides it.
        holds_path: a path, or paths in a list or an object, which may be relative to the folder that a run is started in.
        of_project: what is trained, on what, and where to. Presets, settings files and a reset leave it as it is.
    """

    affects: tuple[Effect, ...]
    change: Change
    kinds: tuple[TrainingKind, ...] = ("full", "lora", "textual_inversion")
    families: tuple[FamilyName, ...] = get_args(FamilyName)
    refusal: str = ""
    needs: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    follows: tuple[str, ...] = ()
    fsdp2: tuple[Any, ...] | None = None
    optimizer_argument: bool = False
    names: str = ""
    decided_here: bool = False
    holds_path: bool = False
    of_project: bool = False


class Group(BaseModel):
    """A heading under which parameters are declared: frozen, strict, and closed to unknown names."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


Share = Annotated[float, Field(ge=0, le=1)]
Resolution = Annotated[int, Field(ge=64, le=2048, multiple_of=8)]
Steps = Annotated[int, Field(ge=0)]
PositiveSteps = Annotated[int, Field(ge=1)]
OwnRate = Annotated[float, Field(ge=0, le=100)]
"""Of one part, where 0 keeps it as it is; around 1 for optimizers that find their own rate."""
Schedule = Literal["constant", "linear", "cosine", "polynomial"]
Betas = Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=1, max_length=3)]
Epsilon = Annotated[float, Field(ge=0, lt=1)]
Decay = Annotated[float, Field(ge=0, le=10)]
Guess = Annotated[float, Field(gt=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


def facts_of(fields: Mapping[str, FieldInfo]) -> dict[str, Facts]:
    """The facts of each field, in the order of declaration.

    Args:
        fields: a model's `model_fields`.

    Raises:
        TypeError: a field states none.
    """
    stated = {name: [one for one in field.metadata if isinstance(one, Facts)] for name, field in fields.items()}
    missing = [name for name, facts in stated.items() if len(facts) != 1]
    if missing:
        raise TypeError(f"{', '.join(missing)}: a parameter states its Facts once, in its declaration")
    return {name: facts[0] for name, facts in stated.items()}
