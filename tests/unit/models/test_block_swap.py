"""Blocks that wait in host memory: which, in what order they come, and that nothing that they compute changes."""

import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from everydream_kit.errors import ConfigError
from everydream_kit.models.block_swap import BlockSwap, repeated_blocks, waiting_blocks, waiting_prefixes
from everydream_kit.models.families import FAMILIES
from everydream_kit.models.random_models import build_tiny_model


class Block(torch.nn.Module):
    """Frozen tensors of every sort, and a trained adapter."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8).requires_grad_(False)
        self.conv = torch.nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False).to(memory_format=torch.channels_last)
        self.mixing = torch.nn.Parameter(torch.randn(3, 8, dtype=torch.bfloat16).T, requires_grad=False)
        self.adapter = torch.nn.Linear(8, 8, bias=False)
        self.register_buffer("scale", torch.tensor(1.5))
        self.register_buffer("is_on", torch.tensor([True] * 8), persistent=False)

    def forward(self, x):
        x = x + self.linear(x) * self.scale * self.is_on + self.adapter(x)
        mixed = x @ self.mixing.float() @ self.mixing.float().T
        return mixed.tanh() + self.conv(x.view(-1, 4, 1, 2)).flatten(1)


class Stack(torch.nn.Module):
    def __init__(self, is_recomputed=False):
        super().__init__()
        torch.manual_seed(1)
        self.first = torch.nn.Linear(8, 8).requires_grad_(False)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(5))
        self.is_recomputed = is_recomputed

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.is_recomputed else block(x)
        return x


def swapped(stack, count="auto"):
    return BlockSwap(stack, list(waiting_blocks(stack, ["Block"], count).values()), "cpu")


def losses_and_gradients(stack, swap=None):
    found = []
    for step in range(3):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step))
        if swap is None:
            loss = stack(x).square().mean()
        else:
            with swap.saving_places():
                loss = stack(x).square().mean()
        loss.backward()
        found.append(loss.detach())
    return found + [block.adapter.weight.grad for block in stack.blocks]


@pytest.mark.parametrize("count", [1, 3, "auto"])
@pytest.mark.parametrize("is_recomputed", [False, True], ids=["kept", "recomputed"])
def test_losses_and_gradients_are_the_same_to_the_bit(count, is_recomputed):
    plain = losses_and_gradients(Stack(is_recomputed))
    stack = Stack(is_recomputed)
    found = losses_and_gradients(stack, swapped(stack, count))
    assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))


@pytest.mark.parametrize("is_recomputed", [False, True], ids=["kept", "recomputed"])
def test_two_blocks_are_on_the_device_at_most(is_recomputed):
    """Autograd keeps none of them, or the memory would be the same."""
    stack, alive, most = Stack(is_recomputed), [], []
    swap = swapped(stack)

    def note(buffer):
        alive.append(weakref.ref(buffer.untyped_storage()))
        most.append(sum(storage() is not None for storage in alive))

    swap.watch = note
    losses_and_gradients(stack, swap)
    assert max(most) == 2


def test_each_block_comes_while_the_one_before_it_computes():
    stack, events = Stack(is_recomputed=True), []
    swap = swapped(stack)
    hosts = swap.host_buffers
    swap.watch = lambda buffer: events.append(f"copy {[torch.equal(buffer, host) for host in hosts].index(True)}")
    for number, block in enumerate(stack.blocks):
        block.linear.register_forward_pre_hook(lambda *_, number=number: events.append(f"use {number}"))
    losses_and_gradients(stack, swap)
    forward = ["copy 1", "use 0", "copy 2", "use 1", "copy 3", "use 2", "copy 4", "use 3", "use 4"]
    backward = ["copy 3", "use 4", "copy 2", "use 3", "copy 1", "use 2", "copy 0", "use 1", "use 0"]
    assert events[-18:] == forward + backward  # of the last step; the first one has the order to learn


def test_each_block_is_copied_once_in_each_direction():
    stack = Stack(is_recomputed=True)
    swap = swapped(stack)
    losses_and_gradients(stack, swap)
    size = swap.host_buffers[0].numel()
    assert (
        swap.copied_bytes == (3 * (5 + 4) - 2) * size
    )  # the last turns around; the first of a step is there from the last


def test_without_gradients_it_works_as_well():
    stack = Stack()
    x = torch.ones(2, 8)
    with torch.no_grad():
        plain = stack(x)
        swap = swapped(stack, 3)
        assert all(torch.equal(stack(x), plain) for _ in range(2))
    assert swap.num_blocks == 3


def test_those_that_wait_stand_evenly_between_the_others():
    stack = Stack()
    assert list(waiting_blocks(stack, ["Block"], 2)) == ["blocks.1", "blocks.3"]
    assert list(waiting_blocks(stack, ["Block"], 0)) == []
    assert len(waiting_blocks(stack, ["Block"], "auto")) == 5
    assert waiting_prefixes(stack, ["Block"], 2) == ("blocks.1.", "blocks.3.")
    with pytest.raises(ConfigError, match="blocks_to_swap 6: the Stack has 5 blocks"):
        waiting_blocks(stack, ["Block"], 6)


def test_a_block_inside_another_goes_with_it():
    stack = torch.nn.Sequential(torch.nn.Sequential(Block(), Block()), Block())
    assert list(repeated_blocks(torch.nn.ModuleList([stack]), ["Sequential", "Block"])) == ["0"]
    assert list(repeated_blocks(stack, ["Block"])) == ["0.0", "0.1", "1"]


def test_what_is_trained_stays_and_every_tensor_keeps_its_form():
    stack = Stack()
    before = {name: (value.clone(), value.stride(), value.dtype) for name, value in stack.state_dict().items()}
    adapters = [block.adapter.weight.data_ptr() for block in stack.blocks]
    swapped(stack)
    after = stack.state_dict()
    assert [block.adapter.weight.data_ptr() for block in stack.blocks] == adapters
    for name, (value, stride, dtype) in before.items():
        assert torch.equal(after[name], value) and (after[name].stride(), after[name].dtype) == (stride, dtype), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_first_weight_is_outside_its_blocks(family):
    """The device of a model is that of its first weight."""
    model = build_tiny_model(family)
    blocks = repeated_blocks(model.denoiser, model.family.denoiser.blocks)
    assert blocks
    first, _ = next(model.denoiser.named_parameters())
    assert not any(first.startswith(f"{name}.") for name in blocks)
