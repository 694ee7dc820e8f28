"""The training panel: settings, the plan line, Start / Stop / Resume / Sample now / Save now, and the live view.

The panel reads the run folder and writes requests into it; it knows nothing that is not on disk, so it can be closed
and made again at any time. All callbacks return at once: training is a process of its own (`jobs`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from everydream_kit import jobs
from everydream_kit.actions.presets import PRESETS
from everydream_kit.actions.project import Project
from everydream_kit.actions.sample_prompts import prompt_lines, read_prompts, write_prompts
from everydream_kit.actions.tensorboard import TensorBoard
from everydream_kit.config import TrainConfig
from everydream_kit.disk_space import known_free_disk
from everydream_kit.errors import ConfigError
from everydream_kit.foreign import read_origin
from everydream_kit.hosts import detect_host
from everydream_kit.panels import style
from everydream_kit.panels.clock import make_clock, reveal
from everydream_kit.panels.form import SettingsForm
from everydream_kit.panels.hardest_box import HardestBox
from everydream_kit.panels.login import token_environment
from everydream_kit.panels.monitor import STATE_TONES, RunMonitor
from everydream_kit.panels.pages import Pages
from everydream_kit.panels.panel import Panel, attempt, display_widget, set_html
from everydream_kit.panels.plan_box import PlanBox
from everydream_kit.panels.question import Question
from everydream_kit.panels.queue_box import QueueBox
from everydream_kit.runs import Status

if TYPE_CHECKING:
    from everydream_kit.panels.dataset_panel import DatasetPanel

IDLE_WORDS = {
    "": "Nothing has been trained in this project yet. Look through the settings, then press Start training.",
    "starting": "Starting: the model is loaded and the dataset is looked through.",
    "running": "Training. Closing this tab or restarting the kernel does not stop it.",
    "saving": "Saving a checkpoint.",
    "sampling": "Generating samples.",
    "validating": "Measuring the loss on the held-out images.",
    "finished": "Finished. Compare its checkpoints, then export or share the best one.",
    "stopped": "Stopped, and saved. Resume continues exactly where it stopped.",
    "failed": "It failed; the log says why.",
    "died": "The process exited unexpectedly. Resume continues from the latest checkpoint.",
}
"""What the message line says while there is nothing newer to say."""
SETTINGS, PROGRESS, SAMPLES, HARDEST, LOG, QUEUE = range(6)
"""Numbers of the panel's pages."""
FULL_DISK = "The disk of the run folder is full: free some. Training continues meanwhile, and is saved as soon as there is space."
NO_ROOM_BYTES = 1_000_000
"""Free disk below which the trainer cannot be trusted to write a status."""


def has_no_room(folder: Path) -> bool:
    """Whether a folder's disk is full, which the trainer cannot write down for us."""
    free = known_free_disk(folder)  # None: the folder is gone, and other parts of the panel say so
    return free is not None and free < NO_ROOM_BYTES


def as_in_a_file(values: dict[str, Any]) -> dict[str, Any]:
    """Values as JSON gives them back: a tuple becomes a list."""
    return dict(json.loads(json.dumps(values)))


class TrainPanel(Panel):
    """`edk.panels.train(project)`: settings, start, stop, resume; the run in view, by the page's clock.

    Attributes:
        project: the project folder.
        job: the run that is shown: the one in progress, else the latest, or None.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        command: Sequence[str] | None = None,
        environment: dict[str, str] | None = None,
        preset: str | None = None,
        settings: dict[str, Any] | None = None,
        demo: bool = False,
    ) -> None:
        """Build the panel, and attach it to the project's run in progress, if there is one.

        Args:
            folder: the project folder; it is made if it does not exist.
            command: what to run instead of the kit's trainer; see `jobs.start`.
            environment: variables for the training process.
            preset: name of a preset that the form begins with.
            settings: further settings that it begins with.
            demo: put the kit's demo images into the project if it has none.
        """
        super().__init__()
        self.project = Project.open(folder)
        if demo:
            self.project.add_demo_images()
        self._command, self._environment = command, {**token_environment(), **(environment or {})}
        self.job: jobs.Job | None = None
        self.dataset: DatasetPanel | None = None  # opened from the table of the hardest images
        self._revealed_at: int | None = None  # a step; 0: the samples of the first are still to come into view
        self._state: str | None = None
        self._state_words = ""  # what the message line says of the state; anything else stays until the next one
        self._build()
        self._list_runs()
        self._attach(self.project.running_job() or next(iter(self.project.jobs()), None))
        self._given = {**(PRESETS[preset].settings_on(self.form.values) if preset else {}), **(settings or {})}
        if self._given:
            self.form.set_values(self._given)
        self._report_plan()
        if self.job is not None and self.job.is_alive():
            self.tabs.selected_index = PROGRESS

    # Building

    def _build(self) -> None:
        self._settings_stamp = self._stamp_settings()
        self.form = SettingsForm(
            self.project.settings(), self._settings_changed, presets_path=self.project.presets_path
        )
        self._saved = as_in_a_file(self.form.values)
        self.monitor = RunMonitor()
        self.waiting = QueueBox(
            jobs.Queue(self.project.folder / "queue.json"), self._checked_config, self.say,
            command=self._command, environment=self._environment,
        )  # fmt: skip
        self.question = Question(self._press)
        self.head, self.plan = widgets.HTML(), PlanBox(self.project, self.form.set_values, self.say)
        self.runs = style.control(widgets.Dropdown, "Run", "360px", label="40px")
        self.runs.observe(self._choose_run, "value")
        self.clock = make_clock(self.on_beat)
        top = style.column(self.head, self.plan.line_row, self._build_buttons(), self.question.box)
        top.add_class("edk-top")  # stays in view, however long the form below is
        self.box = style.panel_box(
            [
                top,
                self.plan.fold.box,
                self.monitor.bar,
                self.monitor.figures,
                self.message,
                self._build_tabs(),
                self.clock,
            ]
        )  # fmt: skip

    def _build_buttons(self) -> widgets.Widget:
        hint = "Train with these settings"
        self.start_button = self.button("Start training", self.start, tone="primary", icon="play", hint=hint)
        hint = "Finish the step, save a checkpoint, and end"
        self.stop_button = self.button("Stop", self.stop, icon="stop", hint=hint)
        hint = "Continue from the latest checkpoint of this run"
        self.resume_button = self.button("Resume", self.resume, icon="forward", hint=hint)
        hint = "Generate the sample prompts now"
        self.sample_button = self.button("Sample now", lambda: self._ask("sample"), icon="picture-o", hint=hint)
        hint = "Save a checkpoint now"
        self.save_button = self.button("Save now", lambda: self._ask("save"), icon="save", hint=hint)
        hint = "End the process at once; unsaved steps are lost"
        self.kill_button = self.button("End without saving", self.kill, hint=hint)
        self.refresh_button = self.make_refresh_button()
        return style.row(
            self.start_button, self.stop_button, self.resume_button, self.sample_button, self.save_button,
            self.kill_button, self.refresh_button,
        )  # fmt: skip

    def _build_tabs(self) -> widgets.Widget:
        progress = style.column(self.runs, self.monitor.latest, self.monitor.curves.box)
        prompts = "\n".join(prompt_lines(read_prompts(self.project.prompts_path)))
        hint = "one a line; read anew at every sampling. Empty: captions of your images"
        how: dict[str, Any] = {"label": "70px", "value": prompts, "placeholder": hint, "continuous_update": False}
        self.prompts = style.control(widgets.Textarea, "Prompts", "auto", **how)
        self.prompts.layout.height = "76px"
        self.prompts.observe(lambda change: self._write_prompts(change["new"]), "value")
        samples = style.column(self.monitor.samples, style.section("Prompts of the next samples"), self.prompts)
        self.board = TensorBoard(self.project.logdir, self.project.folder / "tensorboard")
        self.tensorboard_button = self.button("TensorBoard", self.switch_tensorboard, icon="line-chart")
        self.tensorboard_words = widgets.HTML()
        self.hardest = HardestBox(self._open_image)
        log = style.column(self.monitor.log, style.row(self.tensorboard_button, self.tensorboard_words))
        self._render_tensorboard()
        pages = {
            "Settings": self.form.box,
            "Progress": progress,
            "Samples": samples,
            "Hardest images": self.hardest.box,
        }
        self.tabs = Pages({**pages, "Log": log, "Queue": self.waiting.box})
        return self.tabs.box

    # What the buttons do

    def start(self) -> None:
        """Start training with the form's settings.

        A run that would take days, or does not fit, is asked for first.

        Raises:
            ConfigError, JobError: as `jobs.start`; also where the dataset is empty or the disk is full.
        """
        if self.job is not None and self.job.is_alive():  # a double click
            self.tabs.selected_index = PROGRESS
            return
        config = self._checked_config()
        if caution := self.plan.caution:
            self.question.ask(caution, {"Start anyway": lambda: self._start(config)})
        else:
            self._start(config)

    def _start(self, config: TrainConfig) -> None:
        self._attach(jobs.start(config, command=self._command, environment=self._environment))
        self._list_runs()
        self.tabs.selected_index = PROGRESS

    def _checked_config(self) -> TrainConfig:
        config = self.form.config()
        if problem := self.plan.problem:
            raise ConfigError(problem)
        self._save_settings()
        return config

    def stop(self) -> None:
        """Ask the run to save and end."""
        self._require_job().stop()
        self.say("Stopping after this step; a checkpoint is saved first.", "busy")

    def resume(self) -> None:
        """Continue the shown run. What a fetched run asks for again is taken from the form.

        Raises:
            ConfigError: a setting that the run asks for stands at its default in the form.
        """
        job = self._require_job()
        origin = read_origin(job.folder)
        asked = origin.asked if origin is not None else {}
        changes = {name: value for name, value in self.form.changed_values().items() if name in asked}
        resumed = jobs.resume(job.folder, changes=changes, command=self._command, environment=self._environment)
        self._attach(resumed)
        self.tabs.selected_index = PROGRESS
        if changes:
            self.say(f"Resuming with {', '.join(sorted(changes))} from Settings.", "busy")

    def kill(self) -> None:
        """End the run at once, without saving."""
        self._require_job().kill()
        self.refresh()

    def switch_tensorboard(self) -> None:
        """Start TensorBoard, or end it."""
        (self.board.stop if self.board.is_running else self.board.start)()
        self._render_tensorboard()

    def _render_tensorboard(self) -> None:
        self.tensorboard_button.description = "Stop TensorBoard" if self.board.is_running else "TensorBoard"
        set_html(self.tensorboard_words, self.board.words())

    def watch(self) -> None:
        """Show the run. Returns at once: the page's clock follows it. A script that wants to wait has `job.wait()`."""
        self.tabs.selected_index = PROGRESS
        self.show()
        self.on_beat()

    def run(self) -> None:
        """Continue the project's run, or start one, and show it. Returns at once.

        A run in progress is shown, one that was stopped is resumed, a finished one stays as it is. Where there is none yet, or
        its settings are not those that this panel was made with, a new one starts.
        """
        self._press(self._continue)
        self.tabs.selected_index = PROGRESS if self.job is not None else SETTINGS
        self._revealed_at = 0
        reveal(self.clock)
        self.show()

    def keep_awake(self) -> None:
        """On Colab: show the run from the cell until it ends, since Colab ends sessions in which no cell runs. Elsewhere: a note.

        Other buttons of the notebook answer when this has ended; an interrupt ends it, and not the run.
        """
        if detect_host().name != "colab":
            text = "Nothing to do here: only Colab ends sessions in which no cell runs. Training continues by itself."
        elif self.job is None or not self._is_busy():
            text = "Nothing is training. Press Start training above, then run this cell again."
        else:
            text = ""
        if text:
            self.say(text)
            display_widget(style.panel_box([self.message]))
            return
        self.watch()
        while self._is_busy():
            time.sleep(0.5)
            self.on_beat()

    def _is_busy(self) -> bool:
        """Whether the shown run or the queue is in progress."""
        return (self.job is not None and self.job.is_alive()) or self.waiting.queue.is_alive()

    def _continue(self) -> None:
        if self._is_busy():
            return
        if self.job is None or not self._was_started_with(self.job, self._given):
            self.start()
            return
        if self.job.status()["state"] == "finished":
            return
        if self.job.run.checkpoints():
            self.resume()
        else:  # it saved nothing, so there is nothing to continue
            self.start()

    @staticmethod
    def _was_started_with(job: jobs.Job, settings: dict[str, Any]) -> bool:
        held = job.run.settings()
        return all(held.get(name, value) == value for name, value in as_in_a_file(settings).items())

    def _ask(self, action: Any) -> None:
        self._require_job().request(action)
        words = {"sample": "Samples are generated after this step.", "save": "A checkpoint is saved after this step."}
        self.say(words[action], "busy")

    def _require_job(self) -> jobs.Job:
        if self.job is None:
            raise ConfigError("There is no run yet. Press Start training.")
        return self.job

    def _write_prompts(self, text: str) -> None:
        """Keep the prompts in the project's file."""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        attempt(lambda: write_prompts(self.project.prompts_path, lines), self.say)

    # Settings and the plan line

    def _settings_changed(self) -> None:
        if not self.form.errors:
            attempt(self._save_settings, self.say)
        self._report_plan()
        self._render_buttons()

    def _save_settings(self) -> None:
        """Write what was changed here, key by key: the other panels write theirs into the same file."""
        values = as_in_a_file(self.form.values)
        self.project.save_settings({name: value for name, value in values.items() if value != self._saved.get(name)})
        self._saved = values

    def _stamp_settings(self) -> tuple[int, int] | None:
        """The state of the settings file (time and size), to see that it changed."""
        path = self.project.settings_path
        held = path.stat() if path.is_file() else None
        return (held.st_mtime_ns, held.st_size) if held is not None else None

    def _follow_settings(self) -> None:
        """Show what another panel has written into the settings file since."""
        if (stamp := self._stamp_settings()) == self._settings_stamp:
            return
        self._settings_stamp = stamp
        written = self.project.settings()
        news = {name: value for name, value in written.items() if value != self._saved.get(name)}
        if news:
            self._saved.update(news)
            self.form.set_values(news)
            self.say(f"Changed by another panel: {', '.join(sorted(news))}.")

    def _report_plan(self) -> None:
        errors = self.form.errors
        if errors:
            first = "; ".join(f"{name} {message}" for name, message in list(errors.items())[:3])
            what = "1 setting" if len(errors) == 1 else f"{len(errors)} settings"
            self.plan.take_errors(f"Fix {what} to start training: {first}")
            return
        self.plan.take(self.form.config())

    # Showing a run

    def _attach(self, job: jobs.Job | None) -> None:
        self.job = job
        self.monitor.attach(job)
        self.hardest.attach(job.folder if job is not None else None)
        self._state = None
        self.refresh()

    def _open_image(self, path: Path) -> None:
        """Show an image in a dataset panel, above the table: this notebook may have no other."""
        from everydream_kit.panels.dataset_panel import DatasetPanel

        if self.dataset is None:
            self.dataset = DatasetPanel(self.project.folder)
            self.hardest.slot.children = (self.dataset.box,)
        try:
            self.dataset.show_image(path)
        except ValueError:
            self.say(f"{path} is not in the project's dataset folder any more.", "warn")

    def _list_runs(self) -> None:
        names = [(job.name, str(job.folder)) for job in self.project.jobs()]
        chosen = str(self.job.folder) if self.job else None
        self.runs.unobserve(self._choose_run, "value")
        if names != list(self.runs.options):
            self.runs.options = names
        if chosen in [value for _, value in names] and self.runs.value != chosen:
            self.runs.value = chosen
        self.runs.observe(self._choose_run, "value")
        self.runs.layout.display = "" if len(names) > 1 else "none"

    def _choose_run(self, change: dict[str, Any]) -> None:
        if change["new"] and (self.job is None or change["new"] != str(self.job.folder)):
            self._attach(jobs.attach(change["new"]))

    def refresh(self) -> None:
        """Show what is new in the run folder. Cheap where nothing is."""
        self._follow_settings()
        self.waiting.refresh()
        self.tabs.set_title(QUEUE, f"Queue ({self.waiting.num_queued})" if self.waiting.num_queued else "Queue")
        status = self._status()
        if not status["alive"] and (begun := self.waiting.running_job()) not in (None, self.job):
            self._attach(begun)
            self._list_runs()
            return
        self.plan.refresh(may_start=not status["alive"])
        self.form.show_refusal(self.plan.refusal)
        self._render_head(status)
        self._render_buttons(status)
        self.monitor.show(status)
        if self._revealed_at == 0 and self.monitor.latest_step:  # the first samples of the trained model
            self._revealed_at = self.monitor.latest_step
            reveal(self.clock)
        if self.tabs.selected_index == HARDEST:
            self.hardest.refresh()
        if status["state"] != self._state:
            self._begin_state(status)
        elif self.message.value in ("", self._state_words):
            self._say_state(status)

    def _status(self) -> Status:
        return self.job.status() if self.job is not None else {"state": "", "alive": False}

    def _begin_state(self, status: Status) -> None:
        self._state = status["state"]
        self._list_runs()
        if status["state"] in jobs.FINAL_STATES:
            self._report_plan()
        self._say_state(status)

    def _say_state(self, status: Status) -> None:
        state = status["state"]
        words = IDLE_WORDS.get(state, state)
        if state == "starting":
            words = status.get("message") or words
        if status["alive"] and status.get("progress") is not None:
            words = f"{words.rstrip('.')}: {status['progress']:.0%}."
        if state in ("stopped", "failed", "died"):
            words = status.get("message") or words
        tone = STATE_TONES.get(state, "plain")
        if status["alive"] and self.job is not None and has_no_room(self.job.folder):
            words, tone = FULL_DISK, "bad"
        self.say(words, tone)
        self._state_words = self.message.value

    def _render_head(self, status: Mapping[str, Any]) -> None:
        state = status["state"]
        mark = style.badge(state, STATE_TONES.get(state, "plain")) if state else style.badge("no run yet")
        set_html(self.head, style.heading("Training", str(self.project.name), badge=mark))

    def _render_buttons(self, status: Mapping[str, Any] | None = None) -> None:
        status = status or self._status()
        alive = status["alive"]
        self.start_button.disabled = alive or bool(self.form.errors) or self.plan.blocked
        self.resume_button.disabled = alive or status["state"] not in ("stopped", "died", "failed")
        for control in (self.stop_button, self.sample_button, self.save_button, self.kill_button):
            control.disabled = not alive
