"""Advice: the cheapest change that fits, found with few questions; the largest batch and resolution."""

from dataclasses import replace

import pytest
from memory_stand_in import GIB, LinearMemory

from everydream_kit.config import TrainConfig
from everydream_kit.errors import MemoryLimitError
from everydream_kit.preflight.advice import (
    MARGIN,
    Budget,
    fewest_blocks,
    largest_batch,
    largest_resolution,
    make_it_fit,
)
from everydream_kit.preflight.gpus import find_gpu
from everydream_kit.training.memory_measures import measures_left


def gpu_spec(gib, name="A40"):
    """A GPU with a context of nothing, and room for so much once the margin is off."""
    return replace(find_gpu(name), memory_bytes=int(gib * GIB / (1 - MARGIN)) + 1, context_bytes=0)


def config(**settings):
    return TrainConfig(**{"resume_ckpt": "base", "batch_size": 8, **settings})


def test_what_fits_is_left_alone_and_asked_about_once():
    memory = LinearMemory()
    advice = make_it_fit(config(), Budget(gpu_spec(12.1), memory))
    assert (advice.changes, advice.reasons, advice.fits) == ({}, (), True)
    assert len(memory.asked) == 1


def test_the_margin_stays_free():
    exactly = replace(find_gpu("A40"), memory_bytes=12 * GIB, context_bytes=0)
    assert Budget(exactly, LinearMemory()).limit_bytes == int(12 * GIB * 0.93)
    assert not Budget(exactly, LinearMemory()).fits(config())  # 12 GiB to the byte
    assert Budget(exactly, LinearMemory(), 12 * GIB).fits(config())


def test_the_context_of_the_card_counts():
    memory = LinearMemory()
    make_it_fit(config(), Budget(find_gpu("T4"), memory))
    assert memory.options[0] == {
        "device": "cuda",
        "has_bf16": False,
        "context_bytes": 450_000_000,
        "fragmentation": 0.05,
    }


@pytest.mark.parametrize(
    ("gib", "changes"),
    [
        (11.8, {"offload_idle_models": True}),  # 11.75
        (10.3, {"gradient_checkpointing": True, "checkpointing_share": 0.5}),  # 10.2
        (8.5, {"gradient_checkpointing": True}),  # 8.4; offloading is not needed for it
        (8.2, {"offload_idle_models": True, "gradient_checkpointing": True}),  # 8.15
        (8.0, {"offload_idle_models": True, "gradient_checkpointing": True, "batch_size": 4, "grad_accum": 2}),  # 7.95
        (
            7.4,  # 7.3: one image at a time is 7.8
            {"gradient_checkpointing": True, "batch_size": 1, "grad_accum": 8, "disable_textenc_training": True}
            | {"offload_idle_models": True},
        ),
    ],
)
def test_the_cheapest_change_in_speed_that_is_enough_is_taken(gib, changes):
    memory = LinearMemory()
    advice = make_it_fit(config(), Budget(gpu_spec(gib), memory))
    assert advice.changes == changes
    assert advice.fits and advice.estimate.peak_bytes <= gib * GIB
    assert advice.config == config().replace(**changes)
    assert [reason.split(":")[0] for reason in advice.reasons] == list(
        dict.fromkeys(name_of(name) for name in order(changes))
    )
    assert len(memory.asked) <= 7


def name_of(setting):
    if setting == "checkpointing_share":
        return "gradient_checkpointing"
    return "batch_size, grad_accum" if setting in ("batch_size", "grad_accum") else setting


def order(changes):
    """Settings in the order of the one list of measures."""
    ranks = [measure.name for measure in measures_left(config())]
    return sorted(changes, key=lambda name: ranks.index(name_of(name)))


def test_as_few_blocks_as_fit_wait_in_host_memory():
    """A LoRA's 3.75 GiB with 0.05 for one image, less 0.05 for each block."""
    asked = config(training_kind="lora", gradient_checkpointing=True, batch_size=1, offload_idle_models=True)
    memory = LinearMemory()
    advice = make_it_fit(asked, Budget(gpu_spec(3.4), memory))
    assert advice.changes == {"blocks_to_swap": 8}
    assert advice.fits and advice.reasons[0].startswith("blocks_to_swap: auto")
    assert len(memory.asked) <= 8
    assert fewest_blocks(asked, Budget(gpu_spec(10), memory))[0] == 0
    assert fewest_blocks(asked, Budget(gpu_spec(0.1), memory))[0] == 20
    num_asked = len(memory.asked)
    assert fewest_blocks(asked, Budget(None, memory)) == (0, None)
    assert len(memory.asked) == num_asked  # on a CPU nothing is estimated for it
    assert largest_batch(asked.replace(blocks_to_swap="auto"), Budget(gpu_spec(3.9), memory))[0] == 3
    assert largest_batch(asked.replace(blocks_to_swap="auto"), Budget(gpu_spec(3.5), memory))[0] == 1


def test_bfloat16_weights_are_not_advised_on_a_card_without_it():
    for name, advised in (("T4", False), ("A40", True)):
        advice = make_it_fit(config(), Budget(gpu_spec(5.5, name), LinearMemory()))
        assert ("weight_dtype" in advice.changes) == advised


def test_what_never_fits_is_said_with_the_least_that_was_tried():
    advice = make_it_fit(config(), Budget(gpu_spec(0.2), LinearMemory()))
    assert not advice.fits
    assert advice.changes["training_kind"] == "lora" and advice.changes["resolution"] == 256
    assert advice.reasons[0].startswith("offload_idle_models")


def test_slicing_attention_is_not_tried_since_paper_does_not_show_it():
    advice = make_it_fit(config(), Budget(gpu_spec(1.0), LinearMemory()))
    assert "attn_type" not in advice.changes


@pytest.mark.parametrize(
    ("gib", "batch"), [(8.4, 0), (8.5, 1), (9.0, 2), (11.9, 7), (12.0, 8), (15.9, 15), (16.0, 16), (80, 16)]
)
def test_the_largest_batch_is_found_to_the_image_with_few_questions(gib, batch):
    memory = LinearMemory()
    if batch:
        found, estimate = largest_batch(config(), Budget(gpu_spec(gib), memory))
        assert found == batch
        assert estimate == LinearMemory()(config(batch_size=batch), device="cuda")
    else:
        with pytest.raises(MemoryLimitError, match=r"not even one image fits: needs about 8.5 GiB; available: 8.4"):
            largest_batch(config(), Budget(gpu_spec(gib), memory))
    assert len(memory.asked) <= 5


def test_the_largest_batch_is_found_where_the_line_is_bent_too():
    """A phase that does not grow with the batch is the worst one for small batches, and hardly less than the room."""
    flat = 15 * GIB

    class Bent(LinearMemory):
        def __call__(self, config, **options):
            estimate = super().__call__(config, **options)
            peak = max(estimate.peak_bytes, flat)
            return replace(estimate, phases=(replace(estimate.phases[0], peak_bytes=peak),))

    memory = Bent()
    assert largest_batch(config(), Budget(gpu_spec(15.05), memory))[0] == 14
    assert len(memory.asked) <= 8


def test_a_given_room_wins_over_the_cards():
    assert largest_batch(config(), Budget(gpu_spec(80), LinearMemory(), 10 * GIB))[0] == 4
    assert largest_batch(config(), Budget(None, LinearMemory(), 10 * GIB))[0] == 4


def test_the_largest_resolution_is_found():
    memory = LinearMemory()
    found, _ = largest_resolution(config(batch_size=1), Budget(gpu_spec(9.2), memory))
    assert found == 768  # 0.5 × 2.25 = 1.125; 832 px would take 1.32
    assert len(memory.asked) <= 8
    assert largest_resolution(config(), Budget(gpu_spec(3), LinearMemory())) is None


def test_auto_begins_at_the_largest_batch():
    advice = make_it_fit(config(batch_size="auto"), Budget(gpu_spec(8.5), LinearMemory()))
    assert isinstance(advice.config.batch_size, int) and advice.fits
