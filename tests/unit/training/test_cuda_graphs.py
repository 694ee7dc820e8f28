"""Which passes are captured, on passes that only add numbers up."""

from __future__ import annotations

import pytest
import torch

from everydream_kit.config import TrainConfig
from everydream_kit.errors import ConfigError
from everydream_kit.models.family import Conditioning, Sizes
from everydream_kit.training.cuda_graphs import MAX_COUNTED, MAX_DROPS, MAX_SHAPES, NUM_EAGER, GraphedPasses
from everydream_kit.training.kept_gradients import KeptGradients
from everydream_kit.training.step_inputs import StepInputs


class Called:
    """Calls again in place of a replay."""

    def __init__(self, call):
        self.call, self.result = call, torch.zeros(1)

    def replay(self):
        self.result.copy_(self.call())


def inputs_of(width: int, text_length: int = 3) -> StepInputs:
    latents = torch.ones(1, 1, 1, width)
    text = Conditioning(torch.ones(1, text_length, 2), None, (text_length,))
    return StepInputs(
        latents, latents, torch.zeros(1), torch.ones(1), torch.tensor(1.0), Sizes((), (), (8, 8)), conditioning=text
    )


def passes(notes: list[str], weight: torch.nn.Parameter | None = None) -> GraphedPasses:
    weight = torch.nn.Parameter(torch.ones(3)) if weight is None else weight
    optimizer = torch.optim.SGD([weight], lr=0.0)
    gradients = KeptGradients(optimizer)
    weight.grad = torch.ones(3)
    gradients.clear()
    return GraphedPasses(Called, lambda inputs: inputs.latents.sum().view(1), gradients, lambda: [weight], notes.append)


def test_shapes_beyond_eight_stay_eager() -> None:
    notes: list[str] = []
    graphed = passes(notes)
    for width in range(1, MAX_SHAPES + 3):
        for _ in range(NUM_EAGER + 2):
            assert graphed(inputs_of(width)) == width
    assert graphed.num_replays == 2 * MAX_SHAPES
    assert len(notes) == MAX_SHAPES + 1 and "passes of further shapes run eagerly" in notes[-1]


def test_weights_that_always_move_are_not_captured_again_and_again() -> None:
    notes: list[str] = []
    weight = torch.nn.Parameter(torch.ones(3))
    kept, graphed = [], passes(notes, weight)
    for _ in range(NUM_EAGER + 10):
        kept.append(weight.data)  # so that its address is not given again
        weight.data = torch.ones(3)
        assert graphed(inputs_of(2)) == 2.0
    assert graphed.num_replays == 1 + MAX_DROPS
    assert "again and again, so passes stay eager" in notes[-1]


def test_texts_of_any_length_do_not_fill_the_memory() -> None:
    graphed = passes([])
    for length in range(1, 10 * MAX_COUNTED):
        graphed(inputs_of(1, length))
    assert len(graphed._seen) == MAX_COUNTED


def test_a_pass_is_not_captured_before_its_gradients_have_places() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    gradients = KeptGradients(torch.optim.SGD([weight], lr=0.0))
    graphed = GraphedPasses(Called, lambda inputs: inputs.latents.sum().view(1), gradients, lambda: [weight], [].append)
    for _ in range(NUM_EAGER + 3):
        graphed(inputs_of(1))
    assert graphed.num_replays == 0


def test_static_inputs_take_every_tensor_and_share_none() -> None:
    first, second = inputs_of(2), inputs_of(2)
    first.sizes = Sizes((), (), (8, 8), torch.zeros(1, 6))
    second.sizes = Sizes((), (), (8, 8), torch.ones(1, 6))
    for inputs, number in ((first, 1.0), (second, 2.0)):
        inputs.mask, inputs.token_ids = torch.full((1, 1, 1, 1), number), (torch.full((1, 1, 77), int(number)),)
        inputs.input_noise = inputs.text_noise = inputs.text_rows = torch.full((1,), number)
        inputs.conditioning.pooled = torch.full((1, 2), number)
        inputs.conditioning.guidance = torch.full((1,), number)
    second.latents, second.noise, second.timesteps = (
        torch.full_like(one, 5.0) for one in (second.latents, second.noise, second.timesteps)
    )
    static = first.clone()
    static.take(second)
    assert len(static.tensors()) == 14
    assert all(torch.equal(own, new) for own, new in zip(static.tensors(), second.tensors(), strict=True))
    assert first.shape() == second.shape() != inputs_of(2).shape()
    assert first.mask is not None and float(first.mask) == 1.0 and float(first.latents.sum()) == 2.0


@pytest.mark.parametrize("name", ["fused_backward", "torch_compile"])
def test_settings_that_a_capture_does_not_go_with_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"cuda_graphs, {name}: "):
        TrainConfig(**{"resume_ckpt": "x", "cuda_graphs": "on", name: True})
