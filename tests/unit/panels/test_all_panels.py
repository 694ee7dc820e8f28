"""The rules that all panels keep, the set-up panel, and background tasks."""

import json
import sys
from pathlib import Path

import ipywidgets as widgets
import pytest
from panel_parts import all_widgets, make_run_project, texts

from everydream_kit import panels
from everydream_kit.doctor import Check, Diagnosis
from everydream_kit.errors import ExportError
from everydream_kit.panels.setup_panel import SetupPanel

SEEN = Diagnosis((Check("Python", "ok", "3.11"), Check("device", "warning", "CPU", "Use a GPU <b>")))


@pytest.fixture
def project(tmp_path):
    return make_run_project(tmp_path / "jets")


BUILDERS = {
    "setup": lambda folder: panels.setup(folder, diagnosis=SEEN),
    "dataset": panels.dataset,
    "train": panels.train,
    "compare": panels.compare,
    "share": panels.share,
    "action": lambda folder: panels.action(folder, "merge"),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_every_panel_is_built_twice_on_an_empty_project_by_its_public_name(name, tmp_path):
    for _ in range(2):
        panel = BUILDERS[name](tmp_path / "empty")
        assert "edk-head" in texts(panel.box)
        assert callable(getattr(panels, name))


STILL = (widgets.HTML, widgets.Box, widgets.Image, widgets.IntProgress)
"""What a person does not touch; everything else is a control."""
OWN = {"Brush", "Clock", "DropZone", "TokenField", "Viewer"}
"""Our own; what they show is seen in the browser's tests."""


@pytest.mark.parametrize("name", BUILDERS)
def test_every_control_has_a_label_and_a_button_a_hint(name, project):
    panel = BUILDERS[name](project)
    if name == "train":
        for fold in panel.form.folds:
            fold.set_open(True)
    controls = [w for w in all_widgets(panel.box) if not isinstance(w, STILL) and type(w).__name__ not in OWN]
    assert len(controls) > {"setup": 0, "train": 90}.get(name, 9)
    for control in controls:
        assert control.description.strip(), control
        if isinstance(control, widgets.Button):
            assert control.tooltip, control.description


@pytest.mark.parametrize("name", BUILDERS)
def test_no_widget_is_one_that_colab_lacks(name, project):
    kinds = {type(widget).__name__ for widget in all_widgets(BUILDERS[name](project).box)}
    known = "HTML Text Textarea Dropdown IntSlider FloatSlider Checkbox Button IntProgress Image VBox HBox GridBox"
    known += " BoundedIntText IntText IntRangeSlider Brush Clock DropZone TokenField Viewer"
    assert kinds <= set(known.split())


@pytest.mark.parametrize("name", BUILDERS)
def test_every_panel_is_built_without_anywidget(name, project, monkeypatch):
    monkeypatch.setitem(sys.modules, "anywidget", None)
    panel = BUILDERS[name](project)
    assert "edk-head" in texts(panel.box)


def test_a_panel_shows_itself_as_the_last_line_of_a_cell(project, monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda output, **options: shown.append(output))
    panel = panels.share(project)
    panel._ipython_display_()
    note, output = shown
    assert output["application/vnd.jupyter.widget-view+json"]["model_id"] == panel.box.model_id
    assert "Run this cell again." in note["text/html"] and len(output["text/plain"]) < 100


def test_an_error_at_a_beat_of_the_clock_is_reported_and_the_clock_goes_on(project, monkeypatch):
    panel = panels.dataset(project)

    def fail():
        raise ExportError("the disk is <gone>")

    monkeypatch.setattr(panel, "refresh", fail)
    panel.clock.beats += 1
    assert "the disk is &lt;gone&gt;" in panel.message.value


def test_setup_lists_what_is_wrong_with_the_cure(tmp_path):
    panel = SetupPanel(tmp_path / "jets", diagnosis=SEEN)
    shown = texts(panel.box)
    assert "ready, with notes" in shown and "Use a GPU &lt;b&gt;" in shown
    assert (tmp_path / "jets" / "input").is_dir()


def test_what_is_well_is_one_line_that_opens(tmp_path):
    well = Diagnosis(tuple(Check(name, "ok", "fine") for name in ("Python", "torch", "disk")))
    checks = SetupPanel(tmp_path / "jets", diagnosis=well).checks.value
    assert checks.startswith("<details><summary>") and "3 checks passed: Python, torch, disk" in checks
    mixed = SetupPanel(tmp_path / "jets", diagnosis=SEEN).checks.value
    assert mixed.index("Use a GPU") < mixed.index("<details>") and "1 checks" not in mixed


def test_a_refused_token_is_one_sentence_without_the_token(tmp_path, monkeypatch):
    from everydream_kit.errors import HubError
    from everydream_kit.panels import setup_panel

    def refuse(token):
        raise HubError("The Hub refused this token.")

    monkeypatch.setattr(setup_panel, "log_in", refuse)
    panel = SetupPanel(tmp_path / "jets", diagnosis=SEEN)
    panel._take_token("hf_secret")
    assert "refused" in panel.message.value
    states = json.dumps([str(widget.get_state()) for widget in all_widgets(panel.box)])
    assert "hf_secret" not in states


def test_an_unexpected_error_of_a_background_task_is_said_and_raised_on(tmp_path, monkeypatch):
    from everydream_kit.actions import background

    def fail(reported, folder):
        raise RecursionError("too deep")

    monkeypatch.setitem(background.TASKS, "fetch", fail)
    with pytest.raises(RecursionError):
        background.main(["fetch", str(tmp_path)])
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "failed" and "fetch failed: RecursionError: too deep." in status["message"]


def test_background_tasks_report_their_failure_in_words(tmp_path):
    from everydream_kit.actions.background import main

    assert main(["fetch", str(tmp_path / "work"), str(tmp_path / "no.thing")]) == 1
    status = json.loads((tmp_path / "work" / "status.json").read_text())
    assert status["state"] == "failed" and "no.thing" in status["message"]
    assert Path(tmp_path / "work").is_dir()


def test_colabs_secret_reaches_the_child_processes_and_no_other_hosts_does():
    from everydream_kit.hosts import Host
    from everydream_kit.panels.login import token_environment

    class Bridge:
        def read_secret(self, name):
            return {"HF_TOKEN": "hf_from_colab"}.get(name)

    assert token_environment(Host("colab", "Google Colab"), Bridge()) == {"HF_TOKEN": "hf_from_colab"}
    assert token_environment(Host("plain", "this machine"), Bridge()) == {}


@pytest.mark.background
def test_tensorboard_is_started_reached_and_ended(project):
    import time
    import urllib.request

    panel = panels.train(project)
    panel.tensorboard_button.click()
    try:
        assert panel.tensorboard_button.description == "Stop TensorBoard"
        address = panel.tensorboard_words.value.split('href="')[1].split('"')[0]
        end = time.monotonic() + 60
        while True:
            try:
                assert urllib.request.urlopen(address, timeout=5).status == 200
                break
            except OSError:
                assert time.monotonic() < end, panel.tensorboard_words.value
                time.sleep(0.3)
    finally:
        panel.tensorboard_button.click()
    assert not panel.board.is_running and "href" not in panel.tensorboard_words.value
