"""`batch_size: auto` becomes a number before the run writes its settings down, and is told."""

import json

import pytest
import torch
from memory_stand_in import GIB, LinearMemory

from everydream_kit.config import TrainConfig
from everydream_kit.errors import MemoryLimitError
from everydream_kit.preflight.auto_batch_size import resolve_batch_size
from everydream_kit.preflight.probe import Probe
from everydream_kit.training.journal import Journal
from everydream_kit.training.ranks import Ranks
from everydream_kit.workspace import RunFolder


@pytest.fixture
def journal(tmp_path):
    journal = Journal(RunFolder.create(tmp_path, "jets"))
    yield journal
    journal.close()


def resolve(journal, memory, measure=None, **settings):
    config = TrainConfig(resume_ckpt="base", **{"batch_size": "auto", **settings})
    return resolve_batch_size(config, Ranks(0, 1, torch.device("cpu")), journal, estimate=memory, measure=measure)


def room(monkeypatch, gib):
    monkeypatch.setattr("everydream_kit.preflight.auto_batch_size.cpu_room", lambda: gib * GIB)


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
