"""`batch_size: auto` becomes a number and `optimizer: auto` a name before the run writes its settings; both are reported."""

import json
from dataclasses import replace

import pytest
import torch
from memory_stand_in import GIB, LinearMemory

from everydream_kit.config import TrainConfig
from everydream_kit.errors import MemoryLimitError
from everydream_kit.preflight.advice import Budget, choose_optimizer
from everydream_kit.preflight.auto_settings import memory_check, resolve_auto_settings, resolve_batch_size
from everydream_kit.preflight.gpus import find_gpu
from everydream_kit.preflight.planning import resolve_for_plan
from everydream_kit.preflight.probe import Probe
from everydream_kit.runs import RunFolder
from everydream_kit.training.journal import Journal
from everydream_kit.training.ranks import Ranks


@pytest.fixture
def journal(tmp_path):
    journal = Journal(RunFolder.create(tmp_path, "jets"))
    yield journal
    journal.close()


def resolve(journal, memory, measure=None, **settings):
    config = TrainConfig(resume_ckpt="base", **{"batch_size": "auto", **settings})
    return resolve_batch_size(config, Ranks(0, 1, torch.device("cpu")), journal, estimate=memory, measure=measure)


def room(monkeypatch, gib):
    monkeypatch.setattr("everydream_kit.preflight.advice.device_room", lambda gpu_spec: gib * GIB)


def test_the_largest_that_fits_host_memory_is_taken_and_reported(journal, monkeypatch, caplog):
    room(monkeypatch, 9.6)
    with caplog.at_level("INFO", "everydream_kit"):
        resolved = resolve(journal, LinearMemory())
    assert resolved.batch_size == 3
    assert (
        "batch_size auto: 3, the largest up to 4 that fits this CPU: 9.5 GiB estimated, 9.6 GiB available"
        in caplog.text
    )
    (event,) = journal.folder.events("batch size")
    assert (event["batch_size"], event["largest"], event["estimated_bytes"]) == (3, 4, int(9.5 * GIB))
    assert journal.folder.status()["message"] is None


def test_the_number_is_one_that_was_said_so_a_saved_file_keeps_it(journal, monkeypatch):
    room(monkeypatch, 100)
    saved = json.loads(resolve(journal, LinearMemory()).to_json())
    assert saved["batch_size"] == 4
    assert "batch_size" in saved["given"]


def test_where_not_even_one_image_fits_it_is_an_error_with_the_figures(journal, monkeypatch):
    room(monkeypatch, 8)
    with pytest.raises(MemoryLimitError, match=r"batch_size: not even one image fits: needs about 8\.5 GiB"):
        resolve(journal, LinearMemory())


def test_a_number_is_left_alone_and_nothing_is_asked(journal):
    memory = LinearMemory()
    assert resolve(journal, memory, batch_size=7).batch_size == 7
    assert not memory.asked and not list(journal.folder.events())


class Measure:
    """Real steps on a GPU that holds fewer images than was estimated."""

    def __init__(self, largest):
        self.largest = largest
        self.asked = []

    def __call__(self, config):
        self.asked.append(config.batch_size)
        return Probe(fits=config.batch_size <= self.largest, reason="measured")


def test_real_steps_have_the_last_word(journal, monkeypatch):
    room(monkeypatch, 100)
    enough, less = Measure(4), Measure(2)
    assert resolve(journal, LinearMemory(), enough).batch_size == 4
    assert resolve(journal, LinearMemory(), less).batch_size == 2
    assert (enough.asked, less.asked) == ([4], [4, 3, 2])
    assert [event["fits"] for event in journal.folder.events("batch size measured")] == [True, False, False, True]
    with pytest.raises(MemoryLimitError, match="two real steps ran out of memory"):
        resolve(journal, LinearMemory(), Measure(0))


def test_what_cannot_be_measured_stays_as_estimated(journal, monkeypatch):
    room(monkeypatch, 100)
    assert resolve(journal, LinearMemory(), lambda config: Probe(reason="no base on the disk")).batch_size == 4


class LinearStates(LinearMemory):
    """The straight line, with 6 GiB more for exact states."""

    def __call__(self, config, **options):
        found = super().__call__(config, **options)
        more = 6 * GIB if config.optimizer == "adamw" else 0
        (phase,) = found.phases
        return replace(found, phases=(replace(phase, peak_bytes=phase.peak_bytes + more),))


@pytest.mark.parametrize(
    ("available", "chosen", "reason"),
    [
        (15, "adamw", "optimizer auto: AdamW (fused), which fits (14.5 GiB estimated, 15.0 GiB available)"),
        (
            14,
            "adamw8bit",
            "optimizer auto: 8-bit AdamW; AdamW (fused) does not fit (14.5 GiB estimated, 14.0 GiB available)",
        ),
    ],
)
def test_exact_states_are_taken_where_they_fit(available, chosen, reason):
    config = TrainConfig(resume_ckpt="base", optimizer="Auto", batch_size=1)
    gpu_spec = replace(find_gpu("RTX 4090"), context_bytes=0)
    resolved, words = choose_optimizer(config, Budget(gpu_spec, LinearStates(), available * GIB))
    assert (resolved.optimizer, words) == (chosen, reason)


def test_neither_a_cpu_nor_divided_weights_ask_for_eight_bits():
    divided = TrainConfig(resume_ckpt="base", optimizer="auto", batch_size=1, parallel="fsdp2")
    for config, gpu_spec in ((divided, find_gpu("RTX 4090")), (divided.replace(parallel="ddp"), None)):
        assert choose_optimizer(config, Budget(gpu_spec, LinearStates(), 0))[0].optimizer == "adamw"


def test_both_are_resolved_and_reported_and_other_settings_are_left_alone(journal, monkeypatch, caplog):
    room(monkeypatch, 9.6)
    config = TrainConfig(resume_ckpt="base", optimizer="auto", batch_size="auto")
    ranks = Ranks(0, 1, torch.device("cpu"))
    with caplog.at_level("INFO", "everydream_kit"):
        resolved = resolve_auto_settings(config, ranks, journal, estimate=LinearMemory())
    assert (resolved.batch_size, resolved.optimizer) == (3, "adamw")
    assert "optimizer auto: AdamW (fused), as always on a CPU" in caplog.text
    (event,) = journal.folder.events("optimizer")
    assert event["optimizer"] == "adamw"
    named = config.replace(optimizer="lion", batch_size=2)
    assert resolve_auto_settings(named, ranks, journal, estimate=LinearMemory()) is named


def test_a_plan_says_which_optimizer_a_gpu_would_take():
    config = TrainConfig(resume_ckpt="base", optimizer="auto", batch_size=1)
    for name, chosen in (("RTX 4090", "adamw"), ("T4", "adamw8bit")):
        resolved, notes = resolve_for_plan(config, Budget(find_gpu(name), LinearStates()))
        assert resolved.optimizer == chosen
        assert len(notes) == 1 and notes[0].startswith("optimizer auto: ")


def test_blocks_that_wait_become_a_number_that_is_reported(journal, monkeypatch, caplog):
    """On a CPU nothing is saved; a GPU's number is what fits."""
    config = TrainConfig(resume_ckpt="base", training_kind="lora", batch_size=1, blocks_to_swap="auto")
    here = Ranks(0, 1, torch.device("cpu"))
    assert resolve_auto_settings(config, here, journal, estimate=LinearMemory()).blocks_to_swap == 0
    gpu_spec = replace(find_gpu("A40"), memory_bytes=4 * GIB, context_bytes=0)
    monkeypatch.setattr("everydream_kit.preflight.auto_settings.free_room", lambda ranks: (gpu_spec, 4 * GIB))
    with caplog.at_level("INFO", "everydream_kit"):
        assert resolve_auto_settings(config, here, journal, estimate=LinearMemory()).blocks_to_swap == 10
    assert "blocks_to_swap auto: 10 of 20 (4.0 GiB estimated, 4.0 GiB available)" in caplog.text
    assert [event["blocks"] for event in journal.folder.events("blocks to swap")] == [0, 10]
    resolved, notes = resolve_for_plan(config, Budget(gpu_spec, LinearMemory(), 4 * GIB))
    assert (resolved.blocks_to_swap, len(notes)) == (10, 1)


def test_a_plan_says_what_speed_auto_may_choose():
    config, gpu_spec = TrainConfig(resume_ckpt="base", batch_size=1, speed="auto"), find_gpu("T4")
    for gib, answer in ((100, "cuda_graphs may be used (8.9 GiB estimated, 100.0 GiB"), (1, "cuda_graphs do not fit")):
        resolved, (note,) = resolve_for_plan(config, Budget(gpu_spec, LinearMemory(), gib * GIB))
        assert resolved.speed == "manual" and resolved.cuda_graphs == "off"
        assert note.startswith("speed auto: measured when the run starts") and answer in note
    compiled, budget = config.replace(torch_compile=True), Budget(gpu_spec, LinearMemory(), GIB)
    assert "may compile again during a capture" in resolve_for_plan(compiled, budget)[1][0]
    assert "cuda_graphs needs a GPU" in resolve_for_plan(config, Budget(None, LinearMemory(), GIB))[1][0]


def test_a_candidate_is_compared_with_what_was_free_before_the_model(monkeypatch):
    room(monkeypatch, 9.6)
    monkeypatch.setattr("everydream_kit.preflight.auto_settings.memory_model", lambda config: LinearMemory())
    config = TrainConfig(resume_ckpt="base", batch_size=1)
    why_too_large = memory_check(Ranks(0, 1, torch.device("cpu")))
    room(monkeypatch, 0)
    answers = [why_too_large(config.replace(batch_size=number)) for number in (1, 4)]
    assert answers == [None, "it does not fit (10.0 GiB estimated, 9.6 GiB available)"]
