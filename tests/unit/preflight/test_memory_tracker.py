"""Following storages: sizes and moments from hand."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from everydream_kit.preflight.tracker import StorageTracker

MIB = 2**20


def megabytes(count):
    """A float32 tensor of so many MiB."""
    return torch.ones(count * MIB // 4)


def test_a_storage_counts_once_however_many_views_it_has():
    with FakeTensorMode(), StorageTracker() as tracker, tracker.stretch("work"):
        whole = megabytes(4)
        views = [whole.view(2, -1), whole[:10], whole.reshape(-1, 4).t()]
    assert len(views) == 3
    assert tracker.record.peak(tracker.record.named("work")).num_bytes == 4 * MIB


def test_the_peak_is_the_worst_moment_and_not_the_sum():
    with FakeTensorMode(), StorageTracker() as tracker, tracker.stretch("work"):
        first = megabytes(4)
        del first
        second = megabytes(3)
        third = megabytes(2)
    del second, third
    assert tracker.record.peak(tracker.record.named("work")).num_bytes == 5 * MIB


def test_what_stood_before_a_stretch_is_part_of_its_peak_until_it_dies():
    with FakeTensorMode(), StorageTracker() as tracker:
        before = megabytes(4)
        with tracker.stretch("work"):
            megabytes(1)
            del before
            inside = megabytes(2)
    del inside
    peak = tracker.record.peak(tracker.record.named("work"))
    assert peak.num_bytes == 5 * MIB


def test_categories_may_be_said_afterwards_and_count_at_the_worst_moment():
    with FakeTensorMode(), StorageTracker() as tracker, tracker.stretch("work"):
        weights, work = megabytes(4), megabytes(2)
        tracker.label([weights], "weights")
        del work
        late = megabytes(1)
        tracker.label([late], "optimizer states")
    stretch = tracker.record.named("work")
    assert tracker.record.peak(stretch).by_category == {"weights": 4 * MIB, "activations": 2 * MIB}
    # The second step finds the states that the first one made at its end.
    steady = tracker.record.peak(stretch, always=["optimizer states"])
    assert steady.by_category == {"weights": 4 * MIB, "activations": 2 * MIB, "optimizer states": MIB}
    assert tracker.record.peak(stretch, never=["weights"]).num_bytes == 2 * MIB
    assert weights is not None
    assert late is not None


def test_sizes_are_rounded_up_to_the_allocators_granule():
    with FakeTensorMode(), StorageTracker(granule=512) as tracker, tracker.stretch("work"):
        tensors = [torch.ones(1), torch.ones(129)]
    assert len(tensors) == 2
    assert tracker.record.peak(tracker.record.named("work")).num_bytes == 512 + 1024


def test_gradients_of_a_layer_take_what_its_tensors_take():
    with FakeTensorMode(), StorageTracker() as tracker:
        layer = torch.nn.Linear(256, 1024, bias=False)  # 1 MiB
        with tracker.stretch("work"):
            layer(torch.ones(512, 256)).sum().backward()  # input 0.5 MiB, result 2 MiB
    peak = tracker.record.peak(tracker.record.named("work")).num_bytes
    # weight, its gradient, the input that is kept for it; the result is gone before the gradient of 1 number is spread
    assert 2.5 * MIB <= peak <= 4.6 * MIB


@pytest.mark.parametrize(("rows", "columns", "inner"), [(8, 16, 32), (1, 1, 1)])
def test_operations_of_a_product_are_counted(rows, columns, inner):
    with FakeTensorMode(), StorageTracker() as tracker, tracker.stretch("work") as stretch:
        torch.ones(rows, inner) @ torch.ones(inner, columns)
    assert stretch.flops == 2 * rows * columns * inner


def test_operations_of_attention_are_counted_forward_and_backward():
    with FakeTensorMode(), StorageTracker() as tracker, tracker.stretch("work") as stretch:
        query, key, value = (torch.ones(2, 4, length, 8, requires_grad=True) for length in (16, 77, 77))
        torch.nn.functional.scaled_dot_product_attention(query, key, value).sum().backward()
    # two products of 16 x 77 x 8 in 2 x 4 heads, and five for the gradients, two operations each
    assert stretch.flops == 2 * (2 + 5) * 2 * 4 * 16 * 77 * 8


def test_what_has_no_value_is_1_and_what_has_one_keeps_it():
    known = torch.tensor([0.25, 0.5])
    with FakeTensorMode(allow_non_fake_inputs=True), StorageTracker():
        assert float(known.sum()) == 0.75
        assert float(torch.zeros(3).sum()) == 1
        assert not bool(torch.zeros(3).sum() > 0)
