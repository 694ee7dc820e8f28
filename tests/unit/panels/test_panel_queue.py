"""The queue of the training panel, on a double of the trainer: add, order, remove, start, watch it continue, stop."""

import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from everydream_kit import jobs
from everydream_kit.hosts import Host
from everydream_kit.panels.train_panel import TrainPanel

DOUBLE = str(Path(__file__).parents[2] / "fakes" / "trainer_double.py")


@pytest.fixture
def panel(tmp_path):
    folder = tmp_path / "jets"
    (folder / "input").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(folder / "input" / "a jet.png")
    panel = TrainPanel(folder, command=[sys.executable, DOUBLE, "{run}", "--steps", "15", "--seconds-a-step", "0.03"])
    yield panel
    if panel.waiting.queue.is_alive():
        panel.waiting.queue.stop()
    for job in jobs.running_jobs(folder / "logs"):
        job.kill()


def wait_until(panel, condition, seconds=90.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, panel.message.value
        time.sleep(0.05)
        panel.refresh()


def lines(panel):
    """(text, {button text: button}) of each line."""
    return [
        (line.children[0].value, {button.description: button for button in line.children[1:]})
        for line in panel.waiting.lines.children
    ]


def add(panel, **values):
    panel.form.set_values(values)
    panel.waiting.add_button.click()


def test_an_empty_queue_says_so_and_cannot_be_started(panel):
    assert "The queue is empty" in panel.waiting.lines.children[0].value
    assert panel.waiting.start_button.disabled and panel.waiting.stop_button.disabled
    assert panel.waiting.clear_button.disabled


def test_settings_are_added_ordered_and_removed(panel):
    for rate in (1e-6, 2e-6, 3e-6):
        add(panel, lr=rate, flip_p=0.5)
    assert ["lr 1e-6" in lines(panel)[0][0], "lr 3e-6" in lines(panel)[2][0]] == [True, True]
    assert "flip_p 0.5" in lines(panel)[0][0] and "batch_size 8" in lines(panel)[0][0]
    assert ">queued<" in lines(panel)[0][0]
    for way, can_move in (("Earlier", [False, True, True]), ("Later", [True, True, False])):
        assert [not buttons[way].disabled for _, buttons in lines(panel)] == can_move
    lines(panel)[2][1]["Earlier"].click()
    lines(panel)[0][1]["Later"].click()
    assert [text.split("lr ")[1][:4] for text, _ in lines(panel)] == ["3e-6", "1e-6", "2e-6"]
    lines(panel)[1][1]["Remove"].click()
    assert len(lines(panel)) == 2
    panel.refresh()
    assert panel.tabs.titles[5].description == "Queue (2)"


def test_a_setting_that_is_wrong_is_not_added(panel):
    panel.form.field("lr").control.value = "fast"
    panel.waiting.add_button.click()
    assert "must be a number" in panel.message.value
    assert len(panel.waiting.queue.entries) == 0


@pytest.mark.background
def test_the_panel_follows_the_queue_from_run_to_run(panel):
    add(panel, max_epochs=1)
    add(panel, max_epochs=2)
    panel.waiting.start_button.click()
    assert panel.waiting.start_button.disabled and not panel.waiting.stop_button.disabled
    wait_until(panel, lambda: panel.job is not None)
    first = panel.job
    wait_until(panel, lambda: panel.job != first)
    wait_until(panel, lambda: [e["state"] for e in panel.waiting.queue.entries] == ["finished"] * 2)
    assert panel.job.name in lines(panel)[1][0]
    wait_until(panel, lambda: not panel.waiting.clear_button.disabled)
    panel.waiting.clear_button.click()
    assert "empty" in panel.waiting.lines.children[0].value


@pytest.mark.background
def test_a_stopped_queue_keeps_what_waits(panel):
    add(panel, max_epochs=1)
    add(panel, max_epochs=2)
    panel._command = panel.waiting._command = [*panel._command[:-3], "900", "--seconds-a-step", "0.03"]
    panel.waiting.start_button.click()
    wait_until(panel, lambda: panel.monitor.bar.value > 0)
    panel.waiting.stop_button.click()
    wait_until(panel, lambda: not panel.waiting.queue.is_alive())
    assert [entry["state"] for entry in panel.waiting.queue.entries] == ["stopped", "waiting"]
    wait_until(panel, lambda: not panel.waiting.start_button.disabled)  # the panel sees it at its next beat


@pytest.mark.background
def test_a_cell_that_keeps_colab_awake_stays_with_the_whole_queue(panel, monkeypatch):
    monkeypatch.setattr(panel, "show", lambda: None)
    monkeypatch.setattr("everydream_kit.panels.train_panel.detect_host", lambda: Host("colab", "Google Colab"))
    add(panel, max_epochs=1)
    add(panel, max_epochs=2)
    panel.waiting.start_button.click()
    wait_until(panel, lambda: panel.job is not None)
    panel.keep_awake()
    assert [entry["state"] for entry in panel.waiting.queue.entries] == ["finished", "finished"]
