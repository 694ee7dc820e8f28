"""FSDP2: a model, its gradients and its optimizer state divided among processes, for models that do not fit on one
device.

Every trained module is divided block by block (`fully_shard`): each process keeps a slice of each weight, and a full
block exists only while it computes. What a checkpoint holds is gathered on the main process, so it is
an ordinary one: a run may continue with another number of processes, or with one.

Only the main process has listeners. What they need of the others (the full weights, to sample, to measure or to save) it
requests: the others wait in `Run.rejoin` and take part in gathering. What is not divided: the VAE, and text encoders
that are not trained. Sampling and validation while training take one full copy of the trained modules on the main
process's device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map_only

from everydream_kit.errors import ConfigError
from everydream_kit.training.optimizers import unwrap_optimizers
from everydream_kit.training.parameters import TrainedPart
from everydream_kit.training.parts import plain_name

if TYPE_CHECKING:
    from everydream_kit.models.family import Model
    from everydream_kit.training.precision import Precision
    from everydream_kit.training.ranks import Ranks

OPTIMIZERS = ("adamw", "adam", "radam", "nadam", "sgd")
"""torch's own, whose update of a number depends on that number alone, so that a slice is updated like the full tensor."""


def build_sharding(
    model: Model, parts: list[TrainedPart], optimizers: list[str], precision: Precision, ranks: Ranks
) -> Sharding:
    """Divide the model among the processes; the parts have the divided parameters then."""
    refuse_unshardable(precision, optimizers)
    return Sharding(model, parts, ranks, precision.dtype)


def refuse_unshardable(precision: Precision, optimizers: Sequence[str]) -> None:
    """Raises: ConfigError, where the device's format or an optimizer does not work on slices."""
    if precision.scaler is not None:
        raise ConfigError(
            "parallel, amp_dtype: fsdp2 works in bfloat16 or float32, and this GPU would use float16. Set amp off, or "
            "parallel to ddp."
        )
    for name in optimizers:
        if plain_name(name) not in OPTIMIZERS:
            raise ConfigError(
                f"parallel, optimizer: {name} does not work on the slices of fsdp2; use {', '.join(OPTIMIZERS)}, or set "
                "parallel to ddp."
            )


class Sharding:
    """The trained modules of a model, divided among all processes.

    Args:
        model: on the CPU or the device; its trained modules are divided in place, everything else goes to the device.
        parts: what is trained; their parameters are replaced by the divided ones.
        dtype: in which the blocks are gathered: bfloat16 where the arithmetic is.
    """

    def __init__(self, model: Model, parts: Sequence[TrainedPart], ranks: Ranks, dtype: torch.dtype) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self.model, self.device = model, ranks.device
        # before `fully_shard` changes classes and parameters: `unsharded` needs ordinary modules to put gathered weights into
        self._blueprints = {id(module): _blueprint(module) for part in parts for module in part.modules}
        mesh = init_device_mesh(ranks.device.type, (ranks.num_ranks,))
        policy = MixedPrecisionPolicy(
            param_dtype=dtype if dtype == torch.bfloat16 else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # autocast does that, and knows what must stay in float32
        )
        blocks = {name for component in model.family.components for name in component.blocks}  # merged one at a time
        for part in parts:
            for module in part.modules:
                for block in module.modules():  # blocks first: `fully_shard` of a module takes what its parts left over
                    if type(block).__name__ in blocks:
                        fully_shard(block, mesh=mesh, mp_policy=policy)
                fully_shard(module, mesh=mesh, mp_policy=policy)
            # DTensors now: each process has about 1/n of the rows of dimension 0, and `shape` is still that of the full tensor
            divided = [p for module in part.modules for p in module.parameters() if p.requires_grad]
            part.parameters = [(name, p) for (name, _), p in zip(part.parameters, divided, strict=True)]
        for module in model.modules().values():
            if id(module) not in self._blueprints:
                module.to(ranks.device)

    @contextmanager
    def unsharded(self, weights: dict[str, dict[str, torch.Tensor]]) -> Iterator[None]:
        """While inside, the model has ordinary modules with these gathered weights in place of the divided ones."""
        divided = (self.model.denoiser, list(self.model.text_encoders))
        modules = {
            name: self._unsharded_copy(module, weights.get(name)) for name, module in self.model.modules().items()
        }
        self.model.denoiser = modules[self.model.family.denoiser.folder]
        self.model.text_encoders[:] = [modules[slot.folder] for slot in self.model.family.text_encoders]
        try:
            yield
        finally:
            self.model.denoiser, self.model.text_encoders[:] = divided

    def _unsharded_copy(self, module: torch.nn.Module, weights: dict[str, torch.Tensor] | None) -> torch.nn.Module:
        if weights is None or id(module) not in self._blueprints:
            return module
        module = copy.deepcopy(self._blueprints[id(module)])
        module.load_state_dict(weights, assign=True)  # assign: the blueprint's parameters have no memory to copy into
        return module.to(self.device)


def gather(value: Any, *, keep: bool) -> Any:
    """Nested containers with every divided tensor gathered in host memory. All processes must ask together.

    Args:
        keep: whether this process keeps the result; the others take part, and get None for each tensor.
    """

    def merge(tensor: torch.Tensor) -> torch.Tensor | None:
        # a collective operation: every process must call it for each tensor, in the same order
        merged = full_tensor(tensor.detach())
        return merged.to("cpu", copy=True) if keep else None

    return tree_map_only(torch.Tensor, merge, value)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A divided tensor gathered on every process; any other as it is."""
    full_tensor = getattr(tensor, "full_tensor", None)  # DTensor's; importing the class takes a second
    return tensor if full_tensor is None else full_tensor()


def divide_optimizer_state(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """A full optimizer state, with what belongs to divided parameters divided alike. All processes must ask together."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if "optimizers" in state:
        inner = zip(optimizer.optimizers, state["optimizers"], strict=True)
        return {**state, "optimizers": [divide_optimizer_state(*one) for one in inner]}
    (torch_optimizer,) = unwrap_optimizers(optimizer)
    # torch's state dicts number parameters in the order of the groups, and keep state by that number
    parameters = [p for group in torch_optimizer.param_groups for p in group["params"]]
    divided = {}
    for index, entries in state["state"].items():
        parameter = parameters[index]
        divided[index] = {
            # moments have the parameter's shape and its slices; counters such as Adam's `step` are complete on every process
            key: distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
            if isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and value.shape == parameter.shape
            else value
            for key, value in entries.items()
        }
    return {**state, "state": divided}


def _blueprint(module: torch.nn.Module) -> torch.nn.Module:
    """The module without its weights."""
    without_memory = {
        id(p): torch.nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()
    }
    return copy.deepcopy(module, without_memory)
