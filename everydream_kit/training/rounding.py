"""Bfloat16 weights: updated in float32, and rounded stochastically.

A bfloat16 number has 8 bits: an update of less than 1/256 of a weight is lost when it is rounded to the nearest, and
fine-tuning is made of such updates. Rounding up or down by chance keeps them on average (arXiv 2010.06192). Optimizer
states stay in float32 or 8 bits, since a running average has the same trouble; weights and gradients are halved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from everydream_kit.draws import derive_seed
from everydream_kit.training.chunks import cut

Group = dict[str, Any]

CHUNK_NUMBERS = 2**25
"""Numbers whose float32 copies exist at the same time: 128 MiB of weights and as much of gradients."""


@torch.no_grad()
def stochastic_round(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 to bfloat16, up or down with the probability of the nearness, so that the mean is right.

    16 random bits are added to the 16 that bfloat16 has no room for, which are then cut off.

    Args:
        values: float32, any shape.
        generator: on the same device.

    Returns:
        bfloat16, same shape. NaN and infinity stay what they are.
    """
    # bfloat16 is the upper half of a float32 word: sign, exponent and 7 bits of the mantissa. Adding noise to the lower half
    # carries into the upper one with the probability lower / 2**16, which is the nearness to the next bfloat16; for negative
    # numbers too, since sign and magnitude are stored apart.
    bits = values.contiguous().view(torch.int32)  # same shape, the bits as whole numbers
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)  # lower half cut off, so the cast below is exact
    # NaN and infinity have the largest exponent: a carry would turn one into the other, or into a zero with a sign
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


class RoundedOptimizer:
    """An optimizer for bfloat16 weights that computes in float32 and rounds stochastically.

    The inner optimizers work on float32 stand-ins, whose memory exists during their part of the step only. Has what a
    training loop and a GradScaler use of torch's Optimizer.

    Args:
        build: makes an inner optimizer from groups; called once for each chunk of parameters.
        param_groups: groups of the real parameters.
        seed: of the run; the rounding's address is (seed, "rounding", step, name).
        by_parameter: whether an optimizer's update of a parameter depends on that one alone. If not, there is one chunk.
        name: distinguishes the random numbers of several RoundedOptimizers.
    """

    def __init__(
        self,
        build: Callable[[list[Group]], Any],
        param_groups: Sequence[Group],
        *,
        seed: int,
        by_parameter: bool = True,
        name: str = "",
    ) -> None:
        self.param_groups = [dict(group) for group in param_groups]
        self.seed, self.name, self.num_steps = seed, name, 0
        self._chunks: list[_Chunk] = []
        for plan in _plan_chunks(self.param_groups, CHUNK_NUMBERS if by_parameter else None):
            self._chunks.append(_Chunk(build, plan))

    @property
    def optimizers(self) -> list[Any]:
        """The inner optimizers."""
        return [chunk.optimizer for chunk in self._chunks]

    @property
    def state(self) -> dict[Any, Any]:
        return {key: value for chunk in self._chunks for key, value in chunk.optimizer.state.items()}

    @torch.no_grad()
    def step(self) -> None:
        generators: dict[torch.device, torch.Generator] = {}
        for chunk in self._chunks:
            chunk.step(lambda device: self._generator(device, generators))
        self.num_steps += 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the real parameters, or fill them with zeros."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if set_to_none:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps, "chunks": [chunk.optimizer.state_dict() for chunk in self._chunks]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_steps = int(state["num_steps"])
        for chunk, one in zip(self._chunks, state["chunks"], strict=True):
            chunk.optimizer.load_state_dict(one)

    def _generator(self, device: torch.device, known: dict[torch.device, torch.Generator]) -> torch.Generator:
        """On the weights' own device: a random number for every weight is too much to send there."""
        if device not in known:
            seed = derive_seed(self.seed, "rounding", self.num_steps, self.name)
            known[device] = torch.Generator(device).manual_seed(seed)
        return known[device]


class _Chunk:
    """Some parameters, their float32 stand-ins, and the optimizer of these."""

    def __init__(
        self,
        build: Callable[[list[Group]], Any],
        plan: list[tuple[Group, list[torch.nn.Parameter]]],
    ) -> None:
        self.groups = [group for group, _ in plan]
        self.pairs: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []
        inner_groups = []
        for group, parameters in plan:
            # The optimizer wants parameters of the right shape when it is built; `_release` empties them right after.
            stand_ins = [torch.nn.Parameter(p.detach().float()) for p in parameters]
            self.pairs += zip(parameters, stand_ins, strict=True)
            inner_groups.append({**group, "params": stand_ins})
        self.optimizer = build(inner_groups)
        self._release()

    def step(self, generator_on: Callable[[torch.device], torch.Generator]) -> None:
        for group, inner in zip(self.groups, self.optimizer.param_groups, strict=True):
            inner["lr"] = group["lr"]  # the loop sets the outer groups' rates
        active = [(p, stand_in) for p, stand_in in self.pairs if p.grad is not None]
        for parameter, stand_in in active:
            assert parameter.grad is not None
            # `.data`: the optimizer's state is keyed by the stand-in, which stays
            stand_in.data = parameter.detach().float()
            stand_in.grad = parameter.grad.float()
        self.optimizer.step()
        for parameter, stand_in in active:  # in the parameters' order, which the generator's numbers depend on
            if parameter.dtype == torch.bfloat16:
                parameter.copy_(stochastic_round(stand_in.detach(), generator_on(parameter.device)))
            else:
                parameter.copy_(stand_in)
        self._release()

    def _release(self) -> None:
        for parameter, stand_in in self.pairs:
            stand_in.data = torch.empty(0, dtype=torch.float32, device=parameter.device)
            stand_in.grad = None


def _plan_chunks(
    groups: Sequence[Group], max_numbers: int | None
) -> list[list[tuple[Group, list[torch.nn.Parameter]]]]:
    """Lists of (group, some of its parameters). None: everything in one."""
    if max_numbers is None:
        return [[(group, group["params"]) for group in groups]]
    runs = [(group, run) for group in groups for run in cut(group["params"], torch.Tensor.numel, max_numbers)]
    return [[run] for run in runs]
