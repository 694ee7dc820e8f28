"""Optimizers by name, and one optimizer for all parts that are trained.

torch's own where it has one, bitsandbytes for 8-bit states, pytorch_optimizer for the rest; any other class by its
`module.Class`. The settings come from `parts`; the learning rate of each step from `schedules`, which writes
it into the groups. Each group carries the `name` of its part and its `peak_lr`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from everydream_kit.errors import ConfigError
from everydream_kit.training.combined_optimizer import CombinedOptimizer, FusedBackwardOptimizer
from everydream_kit.training.flat_weights import BUFFER_NUMBERS, FlatOptimizer
from everydream_kit.training.parts import PartSettings, plain_name
from everydream_kit.training.rounding import RoundedOptimizer

if TYPE_CHECKING:
    from everydream_kit.training.parameters import TrainedPart

logger = logging.getLogger(__name__)

Group = dict[str, Any]
Builder = Callable[[list[Group]], Any]
AnyOptimizer = torch.optim.Optimizer | CombinedOptimizer | RoundedOptimizer | FlatOptimizer
"""What a training loop steps; ours have what it and a GradScaler use of torch's."""
DEFAULT_WEIGHT_DECAY = 0.01
"""EveryDream 2's, and torch's for AdamW; of optimizers whose decay is decoupled and scaled by a small rate."""
COMMON = ("betas", "eps", "weight_decay")
"""What a group has of its own, where the optimizer knows it. lr is known by all."""


@dataclass(frozen=True)
class OptimizerKind:
    """One name in the table.

    Attributes:
        path: `module.Class`.
        fixed: keyword arguments that differ from the class's defaults.
        takes_epsilon: False where its `eps` means something else than a number added to a denominator.
        finds_own_rate: `lr` is a factor on a rate that it finds itself; 1 is normal.
        weight_decay: where nobody says anything; None: the class's own. 0 where decay cannot be separated from the gradient,
            or is multiplied by a rate that is not a share of the weight.
        by_parameter: each parameter's update depends on that parameter alone, so it may be stepped by itself.
        elementwise: each number's update depends on that number alone (8-bit states: on its block), see `flat_weights`.
            Not said of the paged ones: their states move to the GPU tensor by tensor.
        substitute: what is used where the library is missing.
        unpaged: what is used on a CPU, for the paged ones.
    """

    path: str
    fixed: dict[str, Any] = field(default_factory=dict)
    weight_decay: float | None = DEFAULT_WEIGHT_DECAY
    takes_epsilon: bool = True
    finds_own_rate: bool = False
    by_parameter: bool = True
    elementwise: bool = False
    substitute: str | None = None
    unpaged: str | None = None


def _own_rate(path: str, weight_decay: float = 0.0, **fixed: Any) -> OptimizerKind:
    return OptimizerKind(path, fixed, weight_decay, finds_own_rate=True, by_parameter=False)


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind("torch.optim.AdamW", elementwise=True),
    "adam": OptimizerKind(
        "torch.optim.AdamW", elementwise=True
    ),  # the same with decoupled decay; torch 2.6's Adam cannot decouple it
    "radam": OptimizerKind("torch.optim.RAdam", {"decoupled_weight_decay": True}, elementwise=True),
    "nadam": OptimizerKind("torch.optim.NAdam", {"decoupled_weight_decay": True}, elementwise=True),
    "adafactor": OptimizerKind("torch.optim.Adafactor", takes_epsilon=False),
    "sgd": OptimizerKind("torch.optim.SGD", {"momentum": 0.9}, weight_decay=0.0, elementwise=True),
    "adamw8bit": OptimizerKind("bitsandbytes.optim.AdamW8bit", substitute="adamw", elementwise=True),
    "pagedadamw": OptimizerKind("bitsandbytes.optim.PagedAdamW32bit", substitute="adamw", unpaged="adamw"),
    "pagedadamw8bit": OptimizerKind("bitsandbytes.optim.PagedAdamW8bit", substitute="adamw", unpaged="adamw8bit"),
    "ademamix8bit": OptimizerKind("bitsandbytes.optim.AdEMAMix8bit", substitute="adamw"),
    "lion8bit": OptimizerKind("bitsandbytes.optim.Lion8bit", substitute="lion", elementwise=True),
    "pagedlion8bit": OptimizerKind("bitsandbytes.optim.PagedLion8bit", substitute="lion", unpaged="lion8bit"),
    "lion": OptimizerKind("pytorch_optimizer.Lion"),
    "adan": OptimizerKind("pytorch_optimizer.Adan"),
    "came": OptimizerKind("pytorch_optimizer.CAME"),
    "adopt": OptimizerKind("pytorch_optimizer.ADOPT", {"weight_decouple": True}),
    "prodigy": _own_rate("pytorch_optimizer.Prodigy", DEFAULT_WEIGHT_DECAY),
    "dadaptadam": _own_rate("pytorch_optimizer.DAdaptAdam", weight_decouple=True),
    "dadaptlion": _own_rate("pytorch_optimizer.DAdaptLion", weight_decouple=True),
    "dadaptsgd": _own_rate("pytorch_optimizer.DAdaptSGD", weight_decouple=True),
    "dowg": _own_rate("everydream_kit.training.dowg.DoWG"),
    "scalardowg": _own_rate("everydream_kit.training.dowg.DoWG"),
    "coordinatedowg": _own_rate("everydream_kit.training.everydream2_optimizers.CoordinateDoWG"),
    "adacoor": _own_rate("everydream_kit.training.everydream2_optimizers.AdaCoor"),
}
"""Names are compared without case, `_` and `-`: `dadapt_adam` and `AdamW8bit` are known."""

FUSED_DEVICES = ("cpu", "cuda")
FUSED_DIVIDED = ("Adam", "AdamW")


def default_optimizer_name(device_type: str) -> str:
    """bitsandbytes' 8-bit AdamW on a CUDA GPU; AdamW elsewhere, where 8 bits cost much time and save little."""
    return "adamw8bit" if device_type == "cuda" else "adamw"


def build_optimizer_for_parts(
    parts: Sequence[TrainedPart],
    settings: Sequence[PartSettings],
    *,
    device_type: str = "cpu",
    rounding_seed: int | None = None,
    fused_backward: bool = False,
    flat: bool = False,
    buffer_numbers: int = BUFFER_NUMBERS,
) -> AnyOptimizer:
    """Make the optimizer of everything that is trained: one group for each part.

    Parts with the same optimizer share one; otherwise there are several behind one face.

    Args:
        parts: what is trained, from `select_parameters`.
        settings: for each part, in the same order.
        rounding_seed: the run's seed, where bfloat16 weights should be rounded stochastically.
        fused_backward: step inside the backward pass (see `combined_optimizer`).
        flat: step a few buffers, of at most `buffer_numbers`, where the optimizer allows it (see `flat_weights`).

    Raises:
        ConfigError: an unknown name, a class that cannot be imported, an argument that it does not take, or fused_backward
            with an optimizer that needs all gradients together.
    """
    bundles: dict[Any, list[tuple[Group, PartSettings]]] = {}
    for part, how in zip(parts, settings, strict=True):
        key = (plain_name(how.optimizer), repr(sorted(how.kwargs.items())))
        bundles.setdefault(key, []).append((part_group(part, how), how))
    optimizers: list[AnyOptimizer] = []
    for number, bundle in enumerate(bundles.values()):
        name, groups = bundle[0][1].optimizer, [group for group, _ in bundle]
        build = make_builder(name, groups, device_type, bundle[0][1].kwargs)
        if fused_backward and not may_step_by_parameter(name):
            raise ConfigError(
                f"fused_backward, optimizer: {name} needs all gradients together; "
                "switch fused_backward off, or use adamw, adamw8bit, lion8bit or adafactor"
            )
        if rounding_seed is not None:
            build = _rounded(build, rounding_seed, str(number), by_parameter=may_step_by_parameter(name))
        if fused_backward:
            optimizers.append(FusedBackwardOptimizer(build, groups))
        elif flat and rounding_seed is None and is_elementwise(name):
            optimizers.append(FlatOptimizer(build, groups, buffer_numbers=buffer_numbers))
        else:
            optimizers.append(build(groups))
    return optimizers[0] if len(optimizers) == 1 else CombinedOptimizer(optimizers)


def _rounded(build: Builder, seed: int, name: str, *, by_parameter: bool) -> Builder:
    """A builder of RoundedOptimizers, each with an address of its own."""
    numbers = itertools.count()

    def build_rounded(groups: list[Group]) -> RoundedOptimizer:
        return RoundedOptimizer(build, groups, seed=seed, by_parameter=by_parameter, name=f"{name}.{next(numbers)}")

    return build_rounded


def part_group(part: TrainedPart, how: PartSettings) -> Group:
    """The group of one part: its parameters, name, peak rate and own settings."""
    return {
        "params": [parameter for _, parameter in part.parameters],
        "name": part.name,
        "peak_lr": how.lr,
        "lr": how.lr,
        "betas": how.betas,
        "eps": how.eps,
        "weight_decay": how.weight_decay,
    }


def restore_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Load a saved state, and keep the settings that the optimizer was built with.

    torch's own load_state_dict puts the saved betas, eps and weight decay in place of what a resumed run asks for.

    Raises:
        ValueError, KeyError: the state is of another optimizer.
    """
    kept = ("peak_lr", "lr", *COMMON)
    groups = [group for one in unwrap_optimizers(optimizer) for group in one.param_groups]
    settings = [{key: group[key] for key in kept if key in group} for group in groups]
    optimizer.load_state_dict(state)
    # Loading makes new groups, so they are looked up again.
    restored = [group for one in unwrap_optimizers(optimizer) for group in one.param_groups]
    for group, own in zip(restored, settings, strict=True):
        group.update(own)


def parameters_of(optimizer: Any) -> list[torch.nn.Parameter]:
    """All that it trains, in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def unwrap_optimizers(optimizer: Any) -> list[Any]:
    """The torch optimizers behind any number of faces."""
    if isinstance(optimizer, CombinedOptimizer | RoundedOptimizer | FlatOptimizer):
        return [inner for one in optimizer.optimizers for inner in unwrap_optimizers(one)]
    return [optimizer]


def may_step_by_parameter(name: str) -> bool:
    """Whether each parameter's update depends on that parameter alone (needed for the fused backward)."""
    kind = OPTIMIZERS.get(plain_name(name))
    return kind is not None and kind.by_parameter


def is_elementwise(name: str) -> bool:
    """Whether each number's update depends on that number alone (needed for flat weights)."""
    kind = OPTIMIZERS.get(plain_name(name))
    return kind is not None and kind.elementwise


def make_builder(name: str, groups: Sequence[Group], device_type: str, kwargs: Mapping[str, Any]) -> Builder:
    """What makes an optimizer of this name from groups. Everything is checked and said here, once.

    Args:
        groups: all groups that it will be called with, as one list or several; each has lr, betas, eps, weight_decay.
    """
    kind, optimizer_class = _find(name, device_type)
    options = {**kind.fixed, **_translate(kwargs, optimizer_class)}
    _refuse_unknown(options, optimizer_class, name)
    divided = any(hasattr(parameter, "full_tensor") for group in groups for parameter in group["params"])
    options |= dict.fromkeys(_fast_paths(optimizer_class, device_type, divided) - options.keys(), True)
    slow = [group["lr"] for group in groups if kind.finds_own_rate and 0 < group["lr"] < 0.01]
    if slow:
        logger.warning("%s finds its own learning rate and lr is a factor on it: 1 is normal (got %g).", name, slow[0])

    def build(groups: list[Group]) -> torch.optim.Optimizer:
        accepted = []
        for group in groups:
            common = {key: group.get(key) for key in COMMON}  # a buffer's group has those that the class takes
            if common["weight_decay"] is None:
                common["weight_decay"] = kind.weight_decay
            plain = {key: value for key, value in group.items() if key not in COMMON}
            accepted.append(plain | _accepted(common, optimizer_class, kind, name))
        optimizer: torch.optim.Optimizer = optimizer_class(accepted, lr=groups[0]["lr"], **options)
        return optimizer

    return build


def require_optimizer(name: str) -> None:
    """Refuse a name that stands for no optimizer.

    Raises:
        ConfigError: it is neither in the table nor a class that can be imported.
    """
    if "." in name:
        _import(name)
    else:
        _kind_of(name)


def _kind_of(name: str) -> OptimizerKind:
    kind = OPTIMIZERS.get(plain_name(name))
    if kind is None:
        near = difflib.get_close_matches(plain_name(name), OPTIMIZERS, n=1)
        hint = f"; did you mean {near[0]}?" if near else f". Known: {', '.join(OPTIMIZERS)}, or module.Class."
        raise ConfigError(f"optimizer: unknown name {name!r}{hint}")
    return kind


def _find(name: str, device_type: str) -> tuple[OptimizerKind, Any]:
    """The kind and class of a name, or of what stands in for it, with a warning."""
    if "." in name:
        return OptimizerKind(name, weight_decay=None, by_parameter=False), _import(name)
    kind = _kind_of(name)
    if kind.unpaged is not None and device_type == "cpu":
        logger.warning("optimizer %s: there is nothing to page on a CPU; %s is used instead.", name, kind.unpaged)
        return _find(kind.unpaged, device_type)
    try:
        return kind, _import(kind.path)
    except ConfigError as error:
        if kind.substitute is None:
            raise
        logger.warning("optimizer %s: %s %s is used instead; it needs more memory.", name, error, kind.substitute)
        return _find(kind.substitute, device_type)


def _import(path: str) -> Any:
    module_name, _, class_name = path.rpartition(".")
    if not all(part.isidentifier() for part in path.split(".")):
        raise ConfigError(f"optimizer: {path!r} is not a module.Class; for instance torch.optim.Rprop")
    try:
        optimizer_class = getattr(importlib.import_module(module_name), class_name, None)
    except ImportError as error:
        raise ConfigError(f"{path} cannot be imported ({error}). Install the package that holds it.") from error
    if not (inspect.isclass(optimizer_class) and issubclass(optimizer_class, torch.optim.Optimizer)):
        raise ConfigError(f"optimizer: {path} is not a class of torch optimizers")
    return optimizer_class


def _arguments(optimizer_class: Any) -> dict[str, inspect.Parameter]:
    """Named arguments; a **kwargs that swallows misspelt names does not count."""
    parameters = inspect.signature(optimizer_class.__init__).parameters
    return {key: one for key, one in parameters.items() if one.kind is not one.VAR_KEYWORD and key != "self"}


def _translate(kwargs: Mapping[str, Any], optimizer_class: Any) -> dict[str, Any]:
    """EveryDream 2's `decouple` by the name that the class has for it."""
    names = ("weight_decouple", "decoupled_weight_decay")
    decouple = next((name for name in names if name in _arguments(optimizer_class)), "decouple")
    return {decouple if key == "decouple" else key: value for key, value in kwargs.items()}


def _refuse_unknown(options: dict[str, Any], optimizer_class: Any, name: str) -> None:
    known = _arguments(optimizer_class)
    problems = []
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            problems.append(f"optimizer {name}: takes no {key}" + (f"; did you mean {near[0]}?" if near else ""))
    if problems:
        raise ConfigError("\n".join(problems))


def _accepted(common: dict[str, Any], optimizer_class: Any, kind: OptimizerKind, name: str) -> dict[str, Any]:
    """Those of betas, eps and weight_decay that were given and that the class takes."""
    known = _arguments(optimizer_class)
    accepted = {key: value for key, value in common.items() if value is not None and key in known}
    if not kind.takes_epsilon:
        accepted.pop("eps", None)
    if "betas" in accepted:
        usual = known["betas"].default
        if isinstance(usual, tuple) and len(usual) != len(accepted["betas"]):
            raise ConfigError(f"optimizer {name}: betas are {len(usual)} numbers (got {list(accepted['betas'])})")
        accepted["betas"] = tuple(accepted["betas"])
    return accepted


def _fast_paths(optimizer_class: Any, device_type: str, divided: bool) -> set[str]:
    """torch's fused implementation where there is one for this device, else foreach; elsewhere the library's choice.

    Of divided parameters (`sharding.py`), torch has a fused step for Adam and AdamW only.
    """
    if not optimizer_class.__module__.startswith("torch.optim"):
        return set()
    known = _arguments(optimizer_class)
    if "fused" in known and device_type in FUSED_DEVICES and (not divided or optimizer_class.__name__ in FUSED_DIVIDED):
        return {"fused"}
    return {"foreach"} & known.keys()
