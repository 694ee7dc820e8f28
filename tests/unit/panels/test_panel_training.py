"""The training panel's own buttons on a double of the trainer: start, live view, stop, resume, re-attach."""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from everydream_kit import jobs
from everydream_kit.foreign import Origin, write_origin
from everydream_kit.panels.pictures import DatasetPanel
from everydream_kit.panels.training import TrainPanel
from everydream_kit.workspace import RunFolder

DOUBLE = str(Path(__file__).parents[2] / "fakes" / "trainer_double.py")


def command(*options):
    return [sys.executable, DOUBLE, "{run}", *map(str, options)]


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "jets"
    (folder / "input").mkdir(parents=True)
    for number in range(6):
        Image.new("RGB", (64, 64), (number * 40, 80, 120)).save(folder / "input" / f"a jet_{number}.png")
    yield folder
    for job in jobs.running_jobs(folder / "logs"):
        job.kill()


def wait_until(panel, condition, seconds=90.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, panel.message.value
        time.sleep(0.03)
        panel.refresh()


def test_the_plan_line_says_pictures_epochs_steps_and_disk(project):
    panel = TrainPanel(project)
    panel.form.set_values({"batch_size": 4, "max_epochs": 10})
    assert "6 pictures × 10 epochs → 20 steps" in panel.plan.line.value
    assert "free" in panel.plan.line.value


def test_the_plan_line_counts_steps_as_the_trainer_does(project):
    for number in range(3):  # another bucket: its batch cannot be shared
        Image.new("RGB", (64, 160)).save(project / "input" / f"tall_{number}.png")
    (project / "input" / "broken.png").write_bytes(b"")
    panel = TrainPanel(project, settings={"batch_size": 4, "max_epochs": 1, "resolution": 64})
    assert "9 pictures × 1 epochs → 3 steps" in panel.plan.line.value


def test_an_empty_dataset_is_told_before_anything_starts(tmp_path):
    panel = TrainPanel(tmp_path / "empty")
    assert "No images in the dataset yet" in panel.plan.line.value
    panel.start_button.click()
    assert "No images" in panel.message.value
    assert panel.job is None


def test_a_wrong_setting_closes_the_start_button(project):
    panel = TrainPanel(project)
    panel.form.field("lr").control.value = "x"
    assert panel.start_button.disabled
    assert "1 setting to mend" in panel.plan.line.value


def test_start_shows_progress_curves_samples_and_log_and_then_the_end(project):
    panel = TrainPanel(project, command=command("--steps", 12, "--seconds-a-step", 0.02))
    panel.start_button.click()
    assert panel.job is not None and panel.start_button.disabled and not panel.stop_button.disabled
    wait_until(panel, lambda: "finished" in panel.head.value)
    assert panel.monitor.bar.value == 12
    assert "12 / 12" in panel.monitor.figures.value and "1 / 300" in panel.monitor.figures.value
    assert "<polyline" in panel.monitor.chart.value and "Learning rate" in panel.monitor.rate_chart.value
    assert panel.monitor.gallery.value.count("data:image/jpeg") == 2
    assert "step 12" in panel.monitor.log.value
    assert "Finished" in panel.message.value
    wait_until(panel, lambda: not panel.start_button.disabled)


def empty_run(project):
    """A run folder that a panel finds, without a process."""
    run = RunFolder.create(project / "logs", "jets")
    run.config_path.write_text("{}")
    return run


ELSEWHERE = {"host": "elsewhere", "pid": 4242, "place": "another boot", "started": "1"}
"""Of a process that cannot be looked at from here: it lives as long as its heartbeat is fresh."""


def test_a_drawing_shows_how_far_it_is_and_other_messages_stay(project):
    run = empty_run(project)

    def tell(**facts):  # a run on another machine that shares the disk: it lives as long as its heart beats
        run.write_status({**ELSEWHERE, "step": 4, "num_steps": 9, **facts})

    tell(state="starting", progress=0.125, message="Encoding the pictures once.")
    panel = TrainPanel(project)
    panel.refresh()
    assert "Encoding the pictures once: 12%." in panel.message.value
    tell(state="sampling", progress=0.25)
    panel.refresh()
    assert "Drawing samples: 25%." in panel.message.value
    tell(state="sampling", progress=0.5)
    panel.refresh()
    assert "Drawing samples: 50%." in panel.message.value
    panel.say("The queue stops.", "busy")
    tell(state="sampling", progress=0.75)
    panel.refresh()
    assert "The queue stops." in panel.message.value
    tell(state="running", progress=None)
    panel.refresh()
    assert "Training." in panel.message.value
    tell(state="stopped")
    panel.refresh()
    assert "Resume goes on" in panel.message.value


def test_a_full_disk_is_told_by_the_panel_since_the_trainer_cannot_write_it_down(project, monkeypatch):
    run = empty_run(project)
    run.write_status({**ELSEWHERE, "state": "running"})
    panel = TrainPanel(project)
    panel.refresh()
    assert "Training." in panel.message.value
    with monkeypatch.context() as patch:
        patch.setattr("everydream_kit.panels.training.shutil.disk_usage", lambda path: SimpleNamespace(free=4096))
        panel.refresh()
        assert "full: free some" in panel.message.value
    panel.refresh()
    assert "Training." in panel.message.value
    run.write_status({"host": "elsewhere", "state": "finished"})


def test_a_run_that_saved_nothing_is_not_resumed_and_keeps_its_words(project):
    run = empty_run(project)
    run.write_status({"state": "stopped", "message": "Stopped before training began; nothing was saved."})
    panel = TrainPanel(project)
    panel.refresh()
    assert "before training began" in panel.message.value
    panel.resume_button.click()
    assert "nothing to go on from. Start training instead." in panel.message.value
    assert run.status()["state"] == "stopped"


def test_stop_saves_and_resume_goes_on(project):
    panel = TrainPanel(project, command=command("--steps", 60, "--seconds-a-step", 0.03))
    panel.start_button.click()
    wait_until(panel, lambda: panel.monitor.bar.value >= 3)
    panel.stop_button.click()
    wait_until(panel, lambda: "stopped" in panel.head.value and not panel.resume_button.disabled)
    stopped_at = panel.monitor.bar.value
    panel.resume_button.click()
    wait_until(panel, lambda: "finished" in panel.head.value)
    assert panel.monitor.bar.value == 60 > stopped_at


def test_a_fetched_run_is_resumed_with_the_settings_of_the_form(project):
    run = empty_run(project)
    run.config_path.write_text('{"resume_ckpt": "embedded"}')
    checkpoint = run.checkpoints_folder / "jets-ep01-gs00020"
    checkpoint.mkdir()
    (checkpoint / "model_index.json").write_text("{}")
    write_origin(run.folder, Origin("hf://a/b", "c", "hf://a/b", {"data_root": "/etc", "push_to": "a/b"}))
    panel = TrainPanel(project, command=command("--steps", 1))
    panel.form.set_values({"data_root": str(project / "input")})
    panel.resume_button.click()
    assert "push_to" in panel.message.value
    assert "Give 1 of its settings again" in panel.message.value
    panel.form.set_values({"push_to": "me/jets"})
    panel.resume_button.click()
    assert "Resuming with data_root, push_to from Settings." in panel.message.value
    panel.job.watch()
    assert json.loads(run.config_path.read_text())["push_to"] == "me/jets"


def test_a_new_panel_finds_the_run_in_progress(project):
    first = TrainPanel(project, command=command("--steps", 400))
    first.start_button.click()
    again = TrainPanel(project)
    assert again.job.folder == first.job.folder
    assert again.start_button.disabled
    assert again.tabs.selected_index == 1
    again.kill_button.click()
    wait_until(again, lambda: "died" in again.head.value)
    assert not again.resume_button.disabled


def test_a_second_start_from_another_panel_is_refused_in_words(project):
    first, second = (TrainPanel(project, command=command("--steps", 400)) for _ in range(2))
    first.start_button.click()
    second.start_button.click()
    assert "being trained already" in second.message.value


def test_save_now_and_sample_now_reach_the_trainer(project):
    panel = TrainPanel(project, command=command("--steps", 400, "--seconds-a-step", 0.03))
    panel.start_button.click()
    wait_until(panel, lambda: panel.monitor.bar.value >= 1)
    panel.save_button.click()
    wait_until(panel, lambda: panel.monitor.view.saved)


def test_settings_come_back_in_a_new_panel(project):
    TrainPanel(project).form.field("max_epochs").control.value = "7"
    assert TrainPanel(project).form.config().max_epochs == 7


def test_settings_that_cannot_be_read_are_one_clear_error(project):
    from everydream_kit.errors import ConfigError

    project.joinpath("settings.json").write_text("{")
    with pytest.raises(ConfigError, match=r"settings\.json, line 1, column 2: not valid JSON"):
        TrainPanel(project)


def test_a_look_without_news_changes_no_widget(project):
    panel = TrainPanel(project, command=command("--steps", 3, "--seconds-a-step", 0.01))
    panel.start_button.click()
    wait_until(panel, lambda: "finished" in panel.head.value and not panel.job.is_alive())
    panel.refresh()
    changes = []
    monitor = panel.monitor
    shown = (monitor.figures, monitor.chart, monitor.gallery, monitor.log, monitor.notes)
    for widget in (panel.head, panel.message, *shown):
        widget.observe(changes.append, "value")
    panel.refresh()
    assert changes == []


def test_text_from_a_run_is_escaped(project):
    run = project / "logs" / "jets-20260101-000000"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (run / "train.log").write_text("<script>alert(1)</script>\n")
    (run / "events.jsonl").write_text(json.dumps({"kind": "warning", "message": "<img src=x>"}) + "\n")
    status = {"state": "failed", "message": "<b>no</b>", "pid": os.getpid(), "process_started": 0.0, "step": 0}
    (run / "status.json").write_text(json.dumps(status))
    panel = TrainPanel(project)
    shown = panel.monitor.log.value + panel.monitor.notes.value + panel.message.value
    assert "<script>" not in shown and "<img" not in shown and "<b>no" not in shown
    assert "&lt;b&gt;no" in shown


def test_run_starts_and_shows_the_run_until_it_ends(project):
    panel = TrainPanel(project, command=command("--steps", 4, "--seconds-a-step", 0.02))
    panel.run()
    assert panel.job.status()["state"] == "finished"
    assert "4 / 4" in panel.monitor.figures.value


def test_run_says_why_it_cannot_start_and_watch_that_there_is_no_run(tmp_path):
    panel = TrainPanel(tmp_path / "empty")
    panel.run()
    assert "No images" in panel.message.value
    panel.watch()
    assert "no run yet" in panel.message.value


def test_presets_and_settings_can_be_given(project):
    panel = TrainPanel(project, preset="demo", settings={"max_epochs": 3})
    assert (panel.form.config().resolution, panel.form.config().max_epochs) == (128, 3)


def test_prompts_are_kept_in_the_projects_file_that_the_settings_name(project):
    panel = TrainPanel(project)
    panel.prompts.value = "a red jet\n\na jet at night"
    path = project / "sample_prompts.txt"
    assert panel.form.config().sample_prompts == str(path)
    assert TrainPanel(project).prompts.value == "a red jet\n\na jet at night"
    panel.prompts.value = ""
    assert not path.exists()


def test_two_panels_change_one_settings_file_key_by_key_and_show_each_others_change(project, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (64, 64)).save(other / "x.png")
    training, dataset = TrainPanel(project), DatasetPanel(project)
    training.form.field("max_epochs").control.value = "7"
    dataset.source.value = str(other)
    dataset.source_button.click()
    training.form.field("batch_size").control.value = "3"  # before it has looked at the file again
    held = json.loads((project / "settings.json").read_text())
    assert (held["max_epochs"], held["batch_size"], held["data_root"]) == (7, 3, str(other))
    training.refresh()
    assert training.form.values["data_root"] == str(other)
    assert "1 pictures" in training.plan.line.value
    training.form.set_values({"data_root": str(project / "input")})
    dataset.refresh()
    assert dataset.album.root == project / "input"


def test_a_broken_settings_file_is_refused_and_kept(project):
    panel = TrainPanel(project)
    (project / "settings.json").write_text('{"max_epochs": 7,,}')
    panel.form.field("batch_size").control.value = "3"
    assert (project / "settings.json").read_text() == '{"max_epochs": 7,,}'
    panel.start_button.click()
    assert "settings.json, line 1, column" in panel.message.value


def test_a_fresh_panel_shows_which_of_several_runs_it_shows(project):
    for name in ("jets-20260101-000000", "jets-20260102-000000"):
        run = RunFolder(project / "logs" / name)
        run.folder.mkdir(parents=True)
        (run.folder / "config.json").write_text("{}")
        run.write_status({"state": "finished", "pid": 1, "host": "elsewhere"})
    panel = TrainPanel(project)
    assert panel.job is not None
    assert panel.runs.value == str(panel.job.folder) and panel.runs.index is not None
    assert len(panel.runs.options) == 2
