"""The training panel: settings, the plan line, Start / Stop / Resume / Sample now / Save now, and the live view.

The panel reads the run folder and writes requests into it; it knows nothing that is not on disk, so it can be closed
and made again at any time. All callbacks return at once: training is a process of its own (`jobs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from everydream_kit import jobs
from everydream_kit.errors import ConfigError
from everydream_kit.panels import look
from everydream_kit.panels.board import Board
from everydream_kit.panels.chart import line_chart
from everydream_kit.panels.clock import has_clock, make_clock
from everydream_kit.panels.forecast import forecast
from everydream_kit.panels.form import SettingsForm
from everydream_kit.panels.live import RunView, smooth, thin
from everydream_kit.panels.login import token_environment
from everydream_kit.panels.panel import Panel, display_widget, set_html
from everydream_kit.panels.presets import PRESETS
from everydream_kit.panels.project import Project
from everydream_kit.panels.shots import picture_tag, strip

STATE_TONES: dict[str, look.Tone] = {
    "starting": "busy",
    "running": "busy",
    "saving": "busy",
    "sampling": "busy",
    "finished": "good",
    "stopped": "warn",
    "failed": "bad",
    "died": "bad",
}
SHOWN_STEPS = 6
"""Rows of the samples gallery: the newest steps."""


class TrainPanel(Panel):
    """`edk.panels.train(project)`. `box` is what is shown; `watch()` is the blocking form of the live view.

    Attributes:
        project: the project folder.
        job: the run that is shown: the one in progress, else the newest, or None.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        command: Sequence[str] | None = None,
        environment: dict[str, str] | None = None,
        preset: str | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        """Build the panel, and attach it to the project's run in progress, if there is one.

        Args:
            folder: the project folder; it is made if it does not exist.
            command: what to run instead of the kit's trainer; see `jobs.start`.
            environment: variables for the training process.
            preset: name of a preset that the form begins with.
            settings: further settings that it begins with.
        """
        super().__init__()
        self.project = Project.open(folder)
        self._command, self._environment = command, {**token_environment(), **(environment or {})}
        self.view: RunView | None = None
        self.job: jobs.Job | None = None
        self._shown: dict[str, Any] = {}
        self._build()
        self._list_runs()
        self._attach(self.project.running_job() or next(iter(self.project.jobs()), None))
        begin = {**(PRESETS[preset].settings if preset else {}), **(settings or {})}
        if begin:
            self.form.set_values(begin)
        self._tell_plan()
        if self.job is not None and self.job.is_alive():
            self.tabs.selected_index = 1

    # Building

    def _build(self) -> None:
        self.form = SettingsForm(self.project.settings(), self._settings_changed)
        self.head, self.plan = widgets.HTML(), widgets.HTML()
        self.start_button = look.button("Start training", tone="primary", icon="play", hint="Train with these settings")
        self.stop_button = look.button("Stop", icon="stop", hint="Finish the step, save a checkpoint, and end")
        self.resume_button = look.button("Resume", icon="forward", hint="Go on from the newest checkpoint of this run")
        self.sample_button = look.button("Sample now", icon="picture-o", hint="Draw the sample prompts now")
        self.save_button = look.button("Save now", icon="save", hint="Save a checkpoint now")
        self.kill_button = look.button("End without saving", hint="End the process at once; unsaved steps are lost")
        self.refresh_button = look.button("Refresh", icon="refresh")
        for control, action in (
            (self.start_button, self.start),
            (self.stop_button, self.stop),
            (self.resume_button, self.resume),
            (self.sample_button, lambda: self._ask("sample")),
            (self.save_button, lambda: self._ask("save")),
            (self.kill_button, self.kill),
            (self.refresh_button, self.refresh),
        ):
            self.on_press(control, action)
        self.refresh_button.layout.display = "none" if has_clock() else ""
        self.bar = widgets.IntProgress(min=0, max=1, layout=widgets.Layout(width="100%", height="10px", margin="2px 0"))
        self.figures = widgets.HTML()
        self.runs = widgets.Dropdown(
            description="Run", style={"description_width": "40px"}, layout=widgets.Layout(width="360px")
        )
        self.runs.observe(self._choose_run, "value")
        self.clock = make_clock(self.refresh)
        self.box = look.panel_box(
            [
                self.head,
                self.plan,
                look.row(self.start_button, self.stop_button, self.resume_button, self.sample_button, self.save_button,
                         self.kill_button, self.refresh_button),
                self.bar,
                self.figures,
                self.message,
                self._build_tabs(),
                self.clock,
            ]
        )  # fmt: skip

    def _build_tabs(self) -> widgets.Tab:
        self.chart, self.rate_chart = widgets.HTML(), widgets.HTML()
        self.gallery, self.log, self.notes = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.step_slider = widgets.IntSlider(
            min=0, max=0, description="Sampling", readout=False, style={"description_width": "70px"},
            layout=widgets.Layout(width="420px"),
        )  # fmt: skip
        self.step_slider.observe(lambda _: self._draw_step(), "value")
        self.step_picture = widgets.HTML()
        progress = look.column(self.runs, self.chart, self.rate_chart, self.notes)
        known = self.project.prompts_path
        self.prompts = widgets.Textarea(
            value=known.read_text("utf-8").strip() if known.is_file() else "",
            placeholder="one a line; read anew at every sampling. Empty: captions of your pictures",
            description="Prompts",
            continuous_update=False,
            style={"description_width": "70px"},
            layout=widgets.Layout(width="auto", height="76px"),
        )
        self.prompts.observe(lambda change: self._write_prompts(change["new"]), "value")
        samples = look.column(
            self.prompts, self.step_slider, self.step_picture, look.section("Newest samples"), self.gallery
        )
        self.board = Board(self.project.logdir, self.project.folder / "tensorboard")
        self.board_button, self.board_words = look.button("TensorBoard", icon="line-chart"), widgets.HTML()
        self.on_press(self.board_button, self.switch_board)
        log = look.column(self.log, look.row(self.board_button, self.board_words))
        self._draw_board()
        self.tabs = widgets.Tab(children=[self.form.box, progress, samples, log])
        for index, title in enumerate(("Settings", "Progress", "Samples", "Log")):
            self.tabs.set_title(index, title)
        return self.tabs

    # What the buttons do

    def start(self) -> None:
        """Start training with the form's settings.

        Raises:
            ConfigError, JobError: as `jobs.start`; also where the dataset is empty or the disk is full.
        """
        config = self.form.config()
        problem = forecast(config, self.project).problem
        if problem:
            raise ConfigError(problem)
        self.project.save_settings(self.form.changed_values())
        self._attach(jobs.start(config, command=self._command, environment=self._environment))
        self._list_runs()
        self.tabs.selected_index = 1

    def stop(self) -> None:
        """Ask the run to save and end."""
        self._require_job().stop()
        self.say("Stopping after this step; a checkpoint is saved first.", "busy")

    def resume(self) -> None:
        """Go on with the shown run."""
        job = self._require_job()
        self._attach(jobs.resume(job.folder, command=self._command, environment=self._environment))
        self.tabs.selected_index = 1

    def kill(self) -> None:
        """End the run at once, without saving."""
        self._require_job().kill()
        self.refresh()

    def switch_board(self) -> None:
        """Start TensorBoard, or end it."""
        (self.board.stop if self.board.is_running else self.board.start)()
        self._draw_board()

    def _draw_board(self) -> None:
        self.board_button.description = "Stop TensorBoard" if self.board.is_running else "TensorBoard"
        set_html(self.board_words, self.board.words())

    def watch(self) -> None:
        """Show the run live from the cell until it ends; an interrupt only detaches. Keeps Colab awake."""
        if self.job is None:
            self.say("There is no run yet. Press Start training above, then run this cell again.", "warn")
            display_widget(look.panel_box([self.message]))
            return
        self.show()
        self.job.watch(lambda _: self.refresh())

    def run(self) -> None:
        """Start training with the form's settings, unless a run is in progress, and watch it: both in one call."""
        if self.job is None or not self.job.is_alive():
            before = self.job
            self._press(self.start)
            if self.job is before:
                self.show()  # the panel says why it could not start
                return
        self.watch()

    def _ask(self, action: Any) -> None:
        self._require_job().request(action)
        words = {"sample": "Samples are drawn after this step.", "save": "A checkpoint is saved after this step."}
        self.say(words[action], "busy")

    def _require_job(self) -> jobs.Job:
        if self.job is None:
            raise ConfigError("There is no run yet. Press Start training.")
        return self.job

    def _write_prompts(self, text: str) -> None:
        """Keep the prompts in the project's file; without any, the file goes away and captions are drawn."""
        if text.strip():
            self.project.prompts_path.write_text(text.strip() + "\n", "utf-8")
        else:
            self.project.prompts_path.unlink(missing_ok=True)

    # Settings and the plan line

    def _settings_changed(self) -> None:
        if not self.form.errors:
            self.project.save_settings(self.form.changed_values())
        self._tell_plan()
        self._draw_buttons()

    def _tell_plan(self) -> None:
        errors = self.form.errors
        if errors:
            first = "; ".join(f"{name} {message}" for name, message in list(errors.items())[:3])
            what = "1 setting" if len(errors) == 1 else f"{len(errors)} settings"
            set_html(self.plan, look.note(f"{what} to mend before training can start: {first}", "bad"))
            return
        plan = forecast(self.form.config(), self.project)
        text = plan.problem or plan.sentence()
        set_html(self.plan, look.note(text, "warn" if plan.problem else "plain"))

    # Showing a run

    def _attach(self, job: jobs.Job | None) -> None:
        self.job = job
        self.view = RunView(job.folder) if job is not None else None
        self._shown.clear()
        self.step_slider.max = 0
        self.refresh()

    def _list_runs(self) -> None:
        names = [(job.name, str(job.folder)) for job in self.project.jobs()]
        if names != list(self.runs.options):
            chosen = str(self.job.folder) if self.job else None
            self.runs.unobserve(self._choose_run, "value")
            self.runs.options = names
            if chosen in [value for _, value in names]:
                self.runs.value = chosen
            self.runs.observe(self._choose_run, "value")
        self.runs.layout.display = "" if len(names) > 1 else "none"

    def _choose_run(self, change: dict[str, Any]) -> None:
        if change["new"] and (self.job is None or change["new"] != str(self.job.folder)):
            self._attach(jobs.attach(change["new"]))

    def refresh(self) -> None:
        """Show what is new in the run folder. Cheap where nothing is."""
        status = self.job.status() if self.job is not None else {"state": "", "alive": False}
        self._draw_head(status)
        self._draw_buttons(status)
        self._draw_figures(status)
        if self.view is None or self.job is None:
            self._draw_curves(RunView(self.project.folder))
            self._draw_samples({})
            set_html(self.log, look.log_view([]))
            return
        if self.view.update() or "curves" not in self._shown:
            self._shown["curves"] = True
            self._draw_curves(self.view)
            set_html(self.notes, look.note("\n".join(self.view.messages[-5:]), "warn"))
        self._draw_samples(self.view.sample_steps())
        set_html(self.log, look.log_view(self.job.log_tail()))
        if status.get("state") != self._shown.get("state"):
            self._shown["state"] = status.get("state")
            self._list_runs()
            if status["state"] in jobs.FINAL_STATES:
                self._say_end(status)
                self._tell_plan()

    def _draw_head(self, status: dict[str, Any]) -> None:
        state = status["state"]
        mark = look.badge(state, STATE_TONES.get(state, "plain")) if state else look.badge("no run yet")
        set_html(self.head, look.heading("Training", str(self.project.name), badge=mark))

    def _draw_buttons(self, status: dict[str, Any] | None = None) -> None:
        status = status or (self.job.status() if self.job is not None else {"state": "", "alive": False})
        alive = status["alive"]
        self.start_button.disabled = alive or bool(self.form.errors)
        self.resume_button.disabled = alive or status["state"] not in ("stopped", "died", "failed")
        for control in (self.stop_button, self.sample_button, self.save_button, self.kill_button):
            control.disabled = not alive

    def _draw_figures(self, status: dict[str, Any]) -> None:
        step, total = int(status.get("step") or 0), status.get("num_steps")
        self.bar.max, self.bar.value = max(1, total or 1), min(step, max(1, total or 1))
        self.bar.bar_style = {"good": "success", "bad": "danger", "warn": "warning"}.get(
            STATE_TONES.get(status["state"], ""), "info"
        )
        epoch = status.get("epoch")
        loss, speed = status.get("loss"), status.get("images_per_second")
        entries = [
            ("step", f"{step:,} / {total:,}" if total else f"{step:,}"),
            ("epoch", "–" if epoch is None else self._epoch_words(int(epoch))),
            ("loss", "–" if loss is None else f"{loss:.4f}"),
            ("images per second", "–" if not speed else f"{speed:.1f}"),
            ("time left", look.duration(status.get("eta_seconds")) if status["alive"] else "–"),
            ("memory", look.size(status.get("memory_bytes"))),
        ]
        set_html(self.figures, look.facts(entries))

    def _epoch_words(self, ended: int) -> str:
        """`3 / 16`: the epoch in progress (the last one where all have ended) of those that the run will have."""
        total = self.view.max_epochs if self.view is not None else None
        return f"{min(ended + 1, total)} / {total}" if total else str(ended + 1)

    def _draw_curves(self, view: RunView) -> None:
        raw = thin(view.loss)
        curves = {"raw": raw, "loss": thin(smooth(view.loss)), "validation": thin(view.validation)}
        set_html(self.chart, line_chart(curves, title="Loss", faint="raw"))
        rates = {name.replace("_", " "): thin(points) for name, points in view.learning_rates.items()}
        set_html(self.rate_chart, line_chart(rates, title="Learning rate", height=140))

    def _draw_samples(self, steps: dict[int, list[Path]]) -> None:
        if self._shown.get("samples") == (known := [(step, len(paths)) for step, paths in steps.items()]):
            return
        self._shown["samples"] = known
        follow = self.step_slider.value == self.step_slider.max
        self.step_slider.max = max(0, len(steps) - 1)
        self.step_slider.disabled = len(steps) < 2
        if follow:
            self.step_slider.value = self.step_slider.max
        newest = list(steps)[-SHOWN_STEPS:][::-1]
        rows = (
            [strip([(path, f"step {step:,}") for step in newest for path in steps[step][:8]], side=180)]
            if newest
            else []
        )
        empty = '<div class="edk-empty">Samples appear here, the newest first, as soon as the run draws some.</div>'
        set_html(self.gallery, "".join(rows) or empty)
        self._draw_step()

    def _draw_step(self) -> None:
        steps = self.view.sample_steps() if self.view is not None else {}
        if not steps:
            set_html(self.step_picture, "")
            return
        step = list(steps)[min(self.step_slider.value, len(steps) - 1)]
        pictures = "".join(picture_tag(path, 640, words=f"sample at step {step}") for path in steps[step][:4])
        set_html(
            self.step_picture, f'<div class="edk-section">step {step:,}</div><div class="edk-shots">{pictures}</div>'
        )

    def _say_end(self, status: dict[str, Any]) -> None:
        words = {
            "finished": "Finished. Compare the checkpoints in the next notebook, or export the last one.",
            "stopped": status.get("message") or "Stopped, and saved. Resume goes on exactly where it ended.",
        }
        text = words.get(status["state"]) or status.get("message") or "See the log."
        self.say(text, STATE_TONES[status["state"]])
