"""The export and share panel: a file for image apps, and the model on the Hub with its card."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from everydream_kit import jobs
from everydream_kit.actions.background_task import BackgroundTask
from everydream_kit.actions.checkpoint_list import CheckpointList
from everydream_kit.actions.project import Project
from everydream_kit.actions.table import EXPORT, PUSH
from everydream_kit.errors import CheckpointError, ExportError, ModelError
from everydream_kit.export.checkpoint_formats import Format, Option, estimate_bytes, formats_of
from everydream_kit.panels import style
from everydream_kit.panels.action_controls import make_action_control
from everydream_kit.panels.clock import make_clock
from everydream_kit.panels.login import token_environment
from everydream_kit.panels.panel import Panel, set_html
from everydream_kit.panels.question import Question
from everydream_kit.runs import Checkpoint

PRECISIONS = {"fp16": "half (fp16): what apps expect", "bf16": "bfloat16", "fp32": "full (fp32): to train on"}
PARTS = {
    "diffusers": "diffusers folder",
    "single_file": "single file",
    "samples": "samples",
    "training": "settings and curves",
}
"""Parts of a push that the panel offers, and their labels."""
WIDE: dict[str, Any] = {"width": "560px", "label": "110px"}
"""Of a control that is in a line of its own."""
SHOWN_FILES = 8
NOTHING_YET = "This project has no checkpoint yet. Train first; each appears here as soon as it is saved."
READY = "Choose a checkpoint; export it as a file, or push it to the Hub."


class SharePanel(Panel):
    """`edk.panels.share(project)`: export a checkpoint as one file, push it to the Hub.

    Attributes:
        project: the project folder.
        sending: the background task that exports or uploads, whichever panel started it.
    """

    def __init__(self, folder: str | Path, *, environment: dict[str, str] | None = None) -> None:
        """Build the panel on the project's checkpoints; the winner is chosen first."""
        super().__init__()
        self.project = Project.open(folder)
        self.sending = BackgroundTask(self._work, {**token_environment(), **(environment or {})})
        self.checkpoints = CheckpointList(self.project)
        self._shown_winner: Path | None = None
        self._has_chosen = self._quiet = False
        self._state_words = ""  # what the message line says while nothing has happened
        self._build()
        self._offer_checkpoints()
        self._render()

    @property
    def job(self) -> jobs.Job | None:
        """The export or upload in progress, or None."""
        return self.sending.job

    def _build(self) -> None:
        self.checkpoint = style.control(widgets.Dropdown, "Checkpoint", **WIDE)
        self.checkpoint.observe(lambda _: self._choose_checkpoint(), "value")
        self.refresh_button = self.make_refresh_button()
        self.head, self.result = widgets.HTML(), widgets.HTML()
        self.bar = style.progress_bar()
        self.clock = make_clock(self.on_beat)
        above = [self.head, self.checkpoint, self.message, self.bar, self.result]
        self.box = style.panel_box([*above, *self._build_export(), *self._build_push(), self.clock])

    def _build_export(self) -> list[widgets.Widget]:
        """The part that writes a file on this machine."""
        how = EXPORT.arguments
        self.form = style.control(widgets.Dropdown, "Form", **WIDE)
        self.file_name = style.control(widgets.Text, "File", **WIDE)
        self.precision = make_action_control(how["precision"], "Precision", titles=PRECISIONS, **WIDE)
        self.token = style.control(widgets.Dropdown, "Word", **WIDE)
        style.set_hint(self.token, how["token"].help)
        scale: dict[str, Any] = {"value": 1.0, "min": 0.0, "max": 1.5, "step": 0.05, "readout_format": ".2f"}
        self.strength = make_action_control(how["strength"], "Strength", **WIDE, **scale, continuous_update=False)
        self.size = widgets.HTML()
        self.question = Question(self._press)
        self.export_button = self.button("Export", self.export, tone="primary", icon="file", hint="Write the file")
        self.form.observe(lambda _: self._choose_form(), "value")
        self.precision.observe(lambda _: self._estimate(), "value")
        return [
            style.section("On this machine"),
            self.form,
            self.token,
            self.precision,
            self.strength,
            self.file_name,
            style.row(self.export_button, self.size, self.refresh_button),
            self.question.box,
        ]

    def _build_push(self) -> list[widgets.Widget]:
        """The part that uploads to the Hub."""
        how = PUSH.arguments
        self.repo = make_action_control(how["repo_id"], "Repository", placeholder="me/jets", **WIDE)
        self.private = make_action_control(how["private"], "private", **WIDE)
        self.license = make_action_control(how["license"], "License", placeholder="of the base model", **WIDE)
        first = how["what"].default
        self.what = {
            name: style.control(widgets.Checkbox, text, "auto", value=name in first, indent=False)
            for name, text in PARTS.items()
        }
        hint = "Say what would be uploaded, and show the card"
        self.preview_button = self.button("Preview", self.preview, icon="search", hint=hint)
        self.push_button = self.button("Push to the Hub", self.push, tone="primary", icon="cloud-upload")
        self.preview_text = widgets.HTML()
        return [
            style.section("On the Hugging Face Hub"),
            self.repo,
            self.license,
            self.private,
            style.row(*self.what.values(), gap="4px 22px"),
            style.row(self.preview_button, self.push_button),
            self.preview_text,
        ]

    # What the buttons do

    def export(self) -> None:
        """Write the chosen checkpoint in the chosen form, in a process of its own."""
        name, form = self.file_name.value.strip(), self._form
        if form.endings and Path(name).suffix not in form.endings:
            raise ExportError(f"{name or 'the file'}: the name must end in {' or '.join(form.endings)}")
        if not name:
            raise ExportError("Give the folder a name.")
        given = Path(name).expanduser()
        out = given if given.is_absolute() else self.project.exports_folder / given
        options = {name: control.value for name, control in self._controls().items() if name in form.options}
        arguments = [self._chosen(), str(out), json.dumps({"format": form.name, **options})]

        def begin() -> None:
            self._begin("export", arguments, f"Writing {out} …")

        if not out.exists():
            begin()
        elif out.is_dir():
            raise ExportError(f"{out}: is a folder that exists; choose another name")
        else:
            self.question.ask(f"{out} exists already and will be replaced.", {"Replace it": begin})

    def preview(self) -> None:
        """Show what a push would upload, and the model card."""
        from everydream_kit.export.hub import preview_push

        preview = preview_push(self._source(), self._repo_id(), what=self._what(), license=self.license.value or None)
        files = sorted(preview.files, key=lambda file: -file.num_bytes)
        rows = [(file.path, style.size(file.num_bytes)) for file in files[:SHOWN_FILES]]
        if rest := files[SHOWN_FILES:]:
            rows.append((f"and {len(rest)} small files", style.size(sum(file.num_bytes for file in rest))))
        text = style.table(("file", "size"), rows)
        card = style.document(preview.card, "Model card")
        text += f'<div class="edk-section">README.md</div>{card}'
        set_html(self.preview_text, text)
        self.say(f"{len(files)} files, {style.size(preview.num_bytes)}; nothing is uploaded yet.")

    def push(self) -> None:
        """Upload, in a process of its own; after an error, pressing again continues where it stopped."""
        options = {"private": self.private.value, "what": self._what(), "license": self.license.value or None}
        arguments = [str(self._source()), self._repo_id(), json.dumps(options)]
        self._begin("push", arguments, f"Uploading to {self._repo_id()} …")

    @property
    def _work(self) -> Path:
        return self.project.folder / "share"

    def _begin(self, task: str, arguments: list[str], words: str) -> None:
        self.sending.begin(task, *arguments)
        set_html(self.result, "")
        self.say_progress(words)
        self._render()

    def _chosen(self) -> str:
        if not self.checkpoint.value:
            raise CheckpointError(NOTHING_YET)
        return str(self.checkpoint.value)

    def _source(self) -> Path:
        """The run, where its latest checkpoint is chosen (its samples and curves go along), else the checkpoint."""
        chosen = Path(self._chosen())
        run = Checkpoint.at(chosen).run
        latest = run.checkpoints()[-1].folder if run is not None and run.checkpoints() else None
        return run.folder if run is not None and latest == chosen else chosen

    def _repo_id(self) -> str:
        from everydream_kit.export.hub.access import check_repo_id

        name = self.repo.value.strip()
        if not name:
            raise ExportError("Give the repository, such as me/jets: your Hub name, a slash, the model's name.")
        check_repo_id(name)
        if "/" not in name:
            raise ExportError(f"{name}: your Hub name and a slash go before it, such as me/{name}.")
        return str(name)

    def _what(self) -> list[Any]:
        return [name for name, check in self.what.items() if check.value]

    # Showing

    def refresh(self) -> None:
        """Show checkpoints that have come, and the progress of an export or upload, whichever panel started it."""
        if self.checkpoints.update() or self.project.winner != self._shown_winner:
            self._offer_checkpoints()
        self.sending.attach()
        status = self.sending.poll()
        if status is not None:
            style.show_progress(self.bar, status)
            good = self.say_status(status, running="Running …")
            if not status["alive"]:
                set_html(self.result, self._link(status) if good else "")
        self._render()

    @staticmethod
    def _link(status: Mapping[str, Any]) -> str:
        url = status.get("url")
        if not url:
            return ""
        safe = html.escape(url, quote=True)
        return f'<p><a href="{safe}" target="_blank" rel="noopener">Open {safe}</a></p>'

    @property
    def _form(self) -> Format:
        return next(form for form in formats_of(Path(self._chosen())) if form.name == self.form.value)

    def _controls(self) -> dict[Option, widgets.ValueWidget]:
        """What a form's options are given with."""
        return {"precision": self.precision, "strength": self.strength, "token": self.token}

    def _offer_checkpoints(self) -> None:
        """Fill the list with what can be shared now: a person's choice stays, else the winner, else the latest."""
        winner = self._shown_winner = self.project.winner
        known = self.checkpoints.known
        options = [(Checkpoint.at(p).label + (" · winner" if p == winner else ""), str(p)) for p in known]
        before = self.checkpoint.value
        chosen = before if self._has_chosen else str(winner)
        values = [value for _, value in options]
        self._quiet = True
        if options != list(self.checkpoint.options):
            self.checkpoint.options = options
        self.checkpoint.value = chosen if chosen in values else next(iter(values), None)
        self._quiet = False
        if self.checkpoint.value != before:
            self._offer_forms()

    def _choose_checkpoint(self) -> None:
        if not self._quiet:
            self._has_chosen = True
            self._offer_forms()

    def _offer_forms(self) -> None:
        """Offer the forms that the chosen checkpoint can be exported in."""
        if self.checkpoint.value:
            options = [(form.title, form.name) for form in formats_of(Path(self.checkpoint.value))]
            if list(self.form.options) != options:
                self.form.options = options
                self.form.value = options[0][1]
        self._choose_form()

    def _choose_form(self) -> None:
        if not self.checkpoint.value or not self.form.value:
            return
        form = self._form
        for name, control in self._controls().items():
            control.layout.display = "" if name in form.options else "none"
        if "token" in form.options:
            from everydream_kit.export.lora_files import learned_tokens

            self.token.options = learned_tokens(Path(self._chosen()))
        self.file_name.value = f"{self.project.name}{form.end}"
        self._estimate()

    def _estimate(self) -> None:
        """How large the file will be."""
        if not self.checkpoint.value:
            return
        try:
            num_bytes = estimate_bytes(Path(self.checkpoint.value), self._form, self.precision.value)
            words = f"about {style.size(num_bytes)}" if num_bytes else "as large as its base"
        except (ExportError, ModelError) as error:
            words = str(error)
        set_html(self.size, f'<span class="edk-hint">{html.escape(words)}</span>')

    def _render(self) -> None:
        set_html(self.head, style.heading("Export and share", self.project.name))
        none = not self.checkpoint.options
        for control in (self.export_button, self.preview_button, self.push_button):
            control.disabled = none or self.job is not None
        if not self.message.value or self.message.value == self._state_words:
            self.say(*((NOTHING_YET, "warn") if none else (READY, "plain")))
            self._state_words = self.message.value
