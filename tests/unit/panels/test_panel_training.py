"""The training panel's own buttons on a double of the trainer: start, live view, stop, resume, re-attach."""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from everydream_kit import jobs
from everydream_kit.foreign import Origin, write_origin
from everydream_kit.hosts import Host
from everydream_kit.panels import plan_box
from everydream_kit.panels.compare_panel import ComparePanel
from everydream_kit.panels.dataset_panel import DatasetPanel
from everydream_kit.panels.train_panel import TrainPanel
from everydream_kit.runs import RunFolder

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


def test_the_plan_line_says_images_epochs_steps_and_disk(project):
    panel = TrainPanel(project)
    panel.form.set_values({"batch_size": 4, "max_epochs": 10})
    assert "6 images × 10 epochs → 20 steps" in panel.plan.line.value
    assert "free" in panel.plan.line.value


def test_the_plan_line_counts_steps_as_the_trainer_does(project):
    for number in range(3):  # another bucket: its batch cannot be shared
        Image.new("RGB", (64, 160)).save(project / "input" / f"tall_{number}.png")
    (project / "input" / "broken.png").write_bytes(b"")
    panel = TrainPanel(project, settings={"batch_size": 4, "max_epochs": 1, "resolution": 64})
    assert "9 images × 1 epochs → 3 steps" in panel.plan.line.value


def test_an_empty_dataset_is_reported_before_anything_starts(tmp_path):
    panel = TrainPanel(tmp_path / "empty")
    assert "No images in the dataset yet" in panel.plan.line.value
    panel.start_button.click()
    assert "No images" in panel.message.value
    assert panel.job is None


def test_a_wrong_setting_closes_the_start_button(project):
    panel = TrainPanel(project)
    panel.form.field("lr").control.value = "x"
    assert panel.start_button.disabled
    assert "Fix 1 setting to start training" in panel.plan.line.value


def test_start_shows_progress_curves_samples_and_log_and_then_the_end(project):
    panel = TrainPanel(project, command=command("--steps", 12, "--seconds-a-step", 0.02))
    panel.start_button.click()
    assert panel.job is not None and panel.start_button.disabled and not panel.stop_button.disabled
    wait_until(panel, lambda: "finished" in panel.head.value)
    assert panel.monitor.bar.value == 12
    assert "12 / 12" in panel.monitor.figures.value and "1 / 40" in panel.monitor.figures.value
    assert "<polyline" in panel.monitor.curves.chart.value and "learning rate" in panel.monitor.curves.chart.value
    assert "Samples at step 10" in panel.monitor.latest.value
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

    def report(**facts):  # a run on another machine that shares the disk: it lives as long as its heartbeat is written
        run.write_status({**ELSEWHERE, "step": 4, "num_steps": 9, **facts})

    report(state="starting", progress=0.125, message="Encoding the images once.")
    panel = TrainPanel(project)
    panel.refresh()
    assert "Encoding the images once: 12%." in panel.message.value
    report(state="sampling", progress=0.25)
    panel.refresh()
    assert "Generating samples: 25%." in panel.message.value
    report(state="sampling", progress=0.5)
    panel.refresh()
    assert "Generating samples: 50%." in panel.message.value
    panel.say("The queue stops.", "busy")
    report(state="sampling", progress=0.75)
    panel.refresh()
    assert "The queue stops." in panel.message.value
    report(state="running", progress=None)
    panel.refresh()
    assert "Training." in panel.message.value
    report(state="stopped")
    panel.refresh()
    assert "Resume continues" in panel.message.value


def test_a_full_disk_is_reported_by_the_panel_since_the_trainer_cannot_write_it_down(project, monkeypatch):
    run = empty_run(project)
    run.write_status({**ELSEWHERE, "state": "running"})
    panel = TrainPanel(project)
    panel.refresh()
    assert "Training." in panel.message.value
    with monkeypatch.context() as patch:
        patch.setattr("everydream_kit.disk_space.shutil.disk_usage", lambda path: SimpleNamespace(free=4096))
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
    assert "nothing to continue from. Start training instead." in panel.message.value
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
    wait_until(panel, panel.job.run.checkpoints)


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
    curves = monitor.curves
    shown = (monitor.figures, curves.chart, monitor.latest, monitor.gallery, monitor.log, curves.notes)
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
    shown = panel.monitor.log.value + panel.monitor.curves.notes.value + panel.message.value
    assert "<script>" not in shown and "<img" not in shown and "<b>no" not in shown
    assert "&lt;b&gt;no" in shown


WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def shown(monkeypatch):
    """What is displayed below cells."""
    import IPython.display

    outputs = []
    monkeypatch.setattr(IPython.display, "display", lambda output, **options: outputs.append(output))
    return outputs


def test_run_starts_returns_at_once_and_beats_of_the_clock_do_the_rest(project, shown):
    panel = TrainPanel(project, command=command("--steps", 400, "--seconds-a-step", 0.01))
    panel.run()
    assert (
        panel.job.is_alive() and panel.tabs.selected_index == 1 and shown[-1][WIDGET]["model_id"] == panel.box.model_id
    )
    wait_until(panel, lambda: panel.monitor.bar.value >= 3)
    panel.stop_button.click()
    assert panel.job.wait(60)["state"] == "stopped"


@pytest.mark.parametrize(
    ("ended_by", "settings"), [("stop", {}), ("kill", {}), ("finish", {}), ("finish", {"lr": 3e-5})]
)
@pytest.mark.usefixtures("shown")
def test_a_cell_that_runs_again_continues_with_the_projects_run(project, ended_by, settings):
    steps = 3 if ended_by == "finish" else 400
    trainer = command("--steps", steps, "--seconds-a-step", 0.02)
    first = TrainPanel(project, command=trainer, settings={"max_epochs": 7})
    first.run()
    again = TrainPanel(project, command=trainer, settings={"max_epochs": 7})
    again.run()
    assert again.job.folder == first.job.folder  # it is in progress
    if ended_by == "stop":
        wait_until(again, lambda: again.monitor.bar.value >= 3)
        again.stop_button.click()
    elif ended_by == "kill":
        again.kill_button.click()
    ended = again.job.wait(60)
    later = TrainPanel(project, command=trainer, settings={"max_epochs": 7, **settings})
    later.run()
    assert len(later.project.jobs()) == (2 if settings or ended_by == "kill" else 1)
    assert (later.job.folder == first.job.folder) == (not settings and ended_by != "kill")
    if ended_by == "stop":  # it is resumed, from where it ended
        wait_until(later, lambda: later.monitor.bar.value > ended["step"])
    elif not settings and ended_by == "finish":  # it stays as it is
        assert later.job.status() == ended


def test_a_panel_comes_into_view_at_the_start_and_with_the_first_trained_samples(project, shown):
    run = empty_run(project)
    run.write_status({**ELSEWHERE, "state": "running"})
    panel = TrainPanel(project)
    assert panel.clock.reveal == 0
    panel.run()
    assert panel.clock.reveal == 1
    for step, reveals in ((0, 1), (40, 2), (80, 2)):
        Image.new("RGB", (8, 8)).save(run.samples_folder / f"gs{step:05}-000-a jet.jpg")
        panel.refresh()
        assert panel.clock.reveal == reveals
    run.write_status({"host": "elsewhere", "state": "finished"})


@pytest.mark.usefixtures("shown")
def test_run_says_why_it_cannot_start(tmp_path):
    panel = TrainPanel(tmp_path / "empty")
    panel.run()
    assert "No images" in panel.message.value and panel.tabs.selected_index == 0


def test_a_double_click_on_start_starts_one_run_without_an_error(project):
    panel = TrainPanel(project, command=command("--steps", 400))
    panel.start_button.click()
    panel.start_button.click()
    assert "edk-note bad" not in panel.message.value
    assert len(panel.project.jobs()) == 1


def test_what_the_plan_finds_refused_stands_at_the_field(project, monkeypatch):
    monkeypatch.setattr("everydream_kit.panels.plan_box.PlanBox.refusal", "lr: no rate for this family")
    panel = TrainPanel(project)
    panel.refresh()
    hint = panel.form.field("lr").box.children[1]
    assert "edk-error" in hint.value and "no rate for this family" in hint.value


def test_a_double_click_on_resume_resumes_once_without_an_error(project):
    panel = TrainPanel(project, command=command("--steps", 60, "--seconds-a-step", 0.03))
    panel.start_button.click()
    wait_until(panel, lambda: panel.job.status()["step"] > 2)
    panel.stop_button.click()
    wait_until(panel, lambda: not panel.resume_button.disabled)
    panel.resume_button.click()
    panel.resume_button.click()
    assert "edk-note bad" not in panel.message.value
    wait_until(panel, lambda: "finished" in panel.head.value)


@pytest.mark.parametrize("host", ["plain", "colab"])
def test_only_on_colab_a_cell_stays_with_the_run(project, shown, monkeypatch, host):
    monkeypatch.setattr("everydream_kit.panels.train_panel.detect_host", lambda: Host(host, host))
    panel = TrainPanel(project, command=command("--steps", 30, "--seconds-a-step", 0.05))
    panel.keep_awake()
    assert ("Nothing is training" if host == "colab" else "only Colab ends sessions") in panel.message.value
    panel.start()
    panel.keep_awake()
    assert panel.job.is_alive() == (host == "plain")


def test_presets_and_settings_can_be_given(project):
    panel = TrainPanel(project, preset="demo", settings={"max_epochs": 3})
    assert (panel.form.config().resolution, panel.form.config().max_epochs) == (128, 3)


def test_prompts_are_kept_in_the_projects_file_that_the_settings_name(project):
    panel = TrainPanel(project)
    panel.prompts.value = "a red jet\n\na jet at night"
    path = project / "sample_prompts.txt"
    assert panel.form.config().sample_prompts == str(path)
    assert TrainPanel(project).prompts.value == "a red jet\na jet at night"
    panel.prompts.value = ""
    assert not path.exists()


def test_prompts_of_a_rich_file_keep_what_else_it_says(project):
    path = project / "sample_prompts.json"
    held = {"cfgs": [3.0], "samples": [{"prompt": "a jet", "seed": 7}, {"random_caption": True}]}
    path.write_text(json.dumps(held))
    panel = TrainPanel(project)
    assert panel.prompts.value == "a jet"
    panel.prompts.value = "a boat\na jet"
    samples = [{"prompt": "a boat"}, {"prompt": "a jet", "seed": 7}, {"random_caption": True}]
    assert json.loads(path.read_text()) == {"cfgs": [3.0], "samples": samples}
    path.write_text("{")
    panel.prompts.value = "a boat"
    assert "edk-note bad" in panel.message.value and path.read_text() == "{"


def test_a_new_project_begins_with_what_its_base_was_made_for(tmp_path):
    config = TrainPanel(tmp_path / "new").form.config()
    assert (config.resume_ckpt, config.resolution, config.max_epochs, config.lr) == ("embedded", 128, 40, 3e-4)


def test_the_demo_begins_with_the_prompts_that_show_most_and_samples_before_training(tmp_path):
    panel = TrainPanel(tmp_path / "new", demo=True, preset="demo")
    assert panel.prompts.value.splitlines() == ["guitar, ink drawing", "penguin, ink drawing", "red apple, ink drawing"]
    config = panel.form.config()
    assert (config.sample_before_training, config.sample_steps) == (True, 30)
    assert json.loads(Path(config.sample_prompts).read_text())["cfgs"] == [3.0]
    compare = ComparePanel(tmp_path / "new")
    assert (compare.cfgs.value, compare.steps.value) == ("3", 12)
    assert compare.prompts.value == panel.prompts.value


def write_losses(run, epoch, **losses):
    folder = run / "losses"
    folder.mkdir(exist_ok=True)
    rows = [{"path": path, "mean_loss": loss, "count": 2} for path, loss in losses.items()]
    rows.sort(key=lambda row: -row["mean_loss"])
    (folder / f"ep{epoch}.json").write_text(json.dumps({"epoch": epoch, "worst": rows[:1], "pictures": rows}))


def test_the_hardest_images_are_listed_and_opened_with_their_captions(project):
    run = empty_run(project)
    first, second = (str(project / "input" / f"a jet_{number}.png") for number in (1, 2))
    (project / "input" / "a jet_2.txt").write_text("a <jet> at night")
    write_losses(run.folder, 0, **{first: 0.5, second: 0.25})
    write_losses(run.folder, 1, **{first: 0.125, second: 0.375})
    panel = TrainPanel(project)
    panel.tabs.selected_index = 3
    panel.refresh()
    lines = [list(line.children) for line in panel.hardest.lines.children]
    assert "2 hardest of epoch 2" in panel.hardest.head.value
    assert "a jet_2.png" in lines[0][0].value and "a &lt;jet&gt; at night" in lines[0][0].value
    assert "loss 0.3750 in 2 uses" in lines[0][0].value and "from 0.25 to 0.375" in lines[0][1].value
    assert "a jet_1.png" in lines[1][0].value and "from 0.5 to 0.125" in lines[1][1].value
    lines[0][2].click()
    gallery = panel.dataset.gallery
    assert [panel.dataset.album.name(index) for index in gallery.shown] == ["a jet_2.png"]
    assert panel.hardest.slot.children == (panel.dataset.box,)


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
    assert "1 images" in training.plan.line.value
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


def test_a_million_epochs_are_asked_for_before_they_start(project):
    panel = TrainPanel(project, command=command("--steps", 4, "--seconds-a-step", 0.02))
    panel.form.field("max_epochs").control.value = "1000000"
    assert "edk-note warn" in panel.plan.line.value
    panel.start_button.click()
    assert panel.job is None and panel.question.is_open
    assert "steps" in panel.question.box.children[0].value
    panel.question.buttons[-1].click()
    assert panel.job is None and not panel.question.is_open
    panel.start_button.click()
    panel.question.buttons[0].click()
    assert panel.job is not None
    panel.job.watch(interval_seconds=0.05)


def test_start_is_off_while_the_dataset_folder_is_not_there_and_on_when_it_comes(project, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_box, "REST_SECONDS", 0.0)
    panel = TrainPanel(project)
    assert not panel.start_button.disabled
    folder = tmp_path / "comes later"
    panel.form.field("data_root").control.value = str(folder)
    assert panel.start_button.disabled
    assert f"data_root: {folder}: there is no such folder" in panel.plan.line.value
    shutil.copytree(project / "input", folder)
    panel.refresh()
    panel.refresh()
    assert not panel.start_button.disabled
