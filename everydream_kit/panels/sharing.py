"""The export and share panel: a file for image apps, and the model on the Hub with its card."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from everydream_kit import jobs
from everydream_kit.errors import CheckpointError, ExportError
from everydream_kit.panels import look
from everydream_kit.panels.clock import has_clock, make_clock
from everydream_kit.panels.login import token_environment
from everydream_kit.panels.panel import Panel, set_html
from everydream_kit.panels.project import Project

PRECISIONS = {"half (fp16): what apps expect": "fp16", "bfloat16": "bf16", "full (fp32): to train on": "fp32"}
LARGEST_HEADER_BYTES = 100_000_000
BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}


class SharePanel(Panel):
    """`edk.panels.share(project)`: export a checkpoint as one file, push it to the Hub.

    Attributes:
        project: the project folder.
        job: the export or upload in progress, or None.
    """

    def __init__(self, folder: str | Path, *, environment: dict[str, str] | None = None) -> None:
        """Build the panel on the project's checkpoints; the winner is chosen first."""
        super().__init__()
        self.project = Project.open(folder)
        self._environment = {**token_environment(), **(environment or {})}
        self.job: jobs.Job | None = None
        self._build()
        self._foretell()
        self._draw()

    def _build(self) -> None:
        wide = {"style": {"description_width": "110px"}, "layout": widgets.Layout(width="560px", max_width="100%")}
        found = self.project.checkpoints()
        winner = self.project.winner
        options = [(f"{p.name} · {p.parent.parent.name}" + (" · winner" if p == winner else ""), str(p)) for p in found]
        self.checkpoint = widgets.Dropdown(options=options, description="Checkpoint", **wide)
        if winner in found:
            self.checkpoint.value = str(winner)
        self.file_name = widgets.Text(value=f"{self.project.name}.safetensors", description="File", **wide)
        self.precision = widgets.Dropdown(options=list(PRECISIONS.items()), description="Precision", **wide)
        self.size = widgets.HTML()
        self.export_button = look.button("Export", tone="primary", icon="file", hint="Write the file")
        self.repo = widgets.Text(placeholder="me/jets", description="Repository", **wide)
        self.private = widgets.Checkbox(value=True, description="private", **wide)
        self.licence = widgets.Text(placeholder="of the base model", description="Licence", **wide)
        self.what = {
            name: widgets.Checkbox(
                value=name != "single_file", description=text, indent=False, layout={"width": "auto"}
            )
            for name, text in (
                ("diffusers", "diffusers folder"),
                ("single_file", "single file"),
                ("samples", "samples"),
                ("training", "settings and curves"),
            )
        }
        self.preview_button = look.button(
            "Preview", icon="search", hint="Say what would be uploaded, and show the card"
        )
        self.push_button = look.button("Push to the Hub", tone="primary", icon="cloud-upload")
        self.refresh_button = look.button("Refresh", icon="refresh")
        self.refresh_button.layout.display = "none" if has_clock() else ""
        self.on_press(self.export_button, self.export)
        self.on_press(self.preview_button, self.preview)
        self.on_press(self.push_button, self.push)
        self.on_press(self.refresh_button, self.refresh)
        for control in (self.checkpoint, self.precision):
            control.observe(lambda _: self._foretell(), "value")
        self.head, self.preview_text, self.result = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.bar = widgets.IntProgress(min=0, max=1, layout=widgets.Layout(width="100%", height="8px", margin="2px 0"))
        self.clock = make_clock(self.refresh)
        self.box = look.panel_box(
            [
                self.head,
                self.checkpoint,
                self.bar,
                self.message,
                self.result,
                look.section("One file, for image apps"),
                self.file_name,
                self.precision,
                look.row(self.export_button, self.size, self.refresh_button),
                look.section("On the Hugging Face Hub"),
                self.repo,
                self.licence,
                self.private,
                look.row(*self.what.values(), gap="4px 22px"),
                look.row(self.preview_button, self.push_button),
                self.preview_text,
                self.clock,
            ]
        )

    # What the buttons do

    def export(self) -> None:
        """Write the chosen checkpoint as one file, in a process of its own."""
        name = self.file_name.value.strip()
        if Path(name).suffix not in (".safetensors", ".ckpt"):
            raise ExportError(f"{name or 'the file'}: the name must end in .safetensors or .ckpt")
        out = Path(name) if Path(name).is_absolute() else self.project.exports_folder / name
        self._begin(["export", str(self._work), self._chosen(), str(out), self.precision.value], f"Writing {out} …")

    def preview(self) -> None:
        """Show what a push would upload, and the model card."""
        from everydream_kit.export.hub import preview_push

        preview = preview_push(self._source(), self._repo_id(), what=self._what(), license=self.licence.value or None)
        files = [(file.path, look.size(file.num_bytes)) for file in preview.files]
        text = look.table(("file", "size"), files)
        card = f'<div class="edk-doc" tabindex="0">{html.escape(preview.card)}</div>'
        text += f'<div class="edk-section">README.md</div>{card}'
        set_html(self.preview_text, text)
        self.say(f"{len(files)} files, {look.size(preview.num_bytes)}; nothing is uploaded yet.")

    def push(self) -> None:
        """Upload, in a process of its own; after an error, pressing again goes on where it stopped."""
        options = {"private": self.private.value, "what": self._what(), "license": self.licence.value or None}
        arguments = ["push", str(self._work), str(self._source()), self._repo_id(), json.dumps(options)]
        self._begin(arguments, f"Uploading to {self._repo_id()} …")

    def watch(self) -> None:
        """Show the export or upload live from the cell until it ends."""
        self.show()
        if self.job is not None:
            self.job.watch(lambda _: self.refresh())
        self.refresh()

    @property
    def _work(self) -> Path:
        return self.project.folder / "share"

    def _begin(self, arguments: list[str], words: str) -> None:
        set_html(self.result, "")
        self.job = jobs.start_module(
            self._work, "everydream_kit.panels.chores", arguments, environment=self._environment
        )
        self.say(words, "busy")
        self._draw()

    def _chosen(self) -> str:
        if not self.checkpoint.value:
            raise CheckpointError("This project has no checkpoint yet. Train first; the newest then appears here.")
        return str(self.checkpoint.value)

    def _source(self) -> Path:
        """The run, where its newest checkpoint is chosen (its samples and curves go along), else the checkpoint."""
        chosen = Path(self._chosen())
        run = chosen.parent.parent
        newest = next((point for point in self.project.checkpoints() if point.parent.parent == run), None)
        return run if newest == chosen else chosen

    def _repo_id(self) -> str:
        if not self.repo.value.strip():
            raise ExportError("Give the repository, such as me/jets: your Hub name, a slash, the model's name.")
        return str(self.repo.value.strip())

    def _what(self) -> list[Any]:
        return [name for name, check in self.what.items() if check.value]

    # Showing

    def refresh(self) -> None:
        """Show how the export or upload stands."""
        if self.job is None:
            return
        status = self.job.status()
        self.bar.max, self.bar.value = max(1, status.get("num_steps") or 1), status.get("step") or 0
        if status["alive"]:
            self.say(status.get("message") or "At work …", "busy")
            return
        self.job = None
        good = status["state"] == "finished"
        self.say(status.get("message") or status["state"], "good" if good else "bad")
        if good:
            self.bar.value = self.bar.max
            set_html(self.result, self._link(status))
        self._draw()

    @staticmethod
    def _link(status: dict[str, Any]) -> str:
        url = status.get("url")
        if not url:
            return ""
        safe = html.escape(url, quote=True)
        return f'<p><a href="{safe}" target="_blank" rel="noopener">Open {safe}</a></p>'

    def _foretell(self) -> None:
        """How large the file will be: the checkpoint's weights at the chosen precision."""
        if not self.checkpoint.value:
            return
        weights = [f for f in Path(self.checkpoint.value).rglob("*.safetensors") if "resume" not in f.parts]
        try:
            words = f"about {look.size(sum(map(count_weights, weights)) * BYTES[self.precision.value])}"
        except ExportError as error:
            words = str(error)
        set_html(self.size, f'<span class="edk-hint">{html.escape(words)}</span>')

    def _draw(self) -> None:
        set_html(self.head, look.heading("Export and share", self.project.name))
        none = not self.checkpoint.options
        for control in (self.export_button, self.preview_button, self.push_button):
            control.disabled = none or self.job is not None
        if none:
            self.say("This project has no checkpoint yet. Train first; the newest then appears here.", "warn")


def count_weights(path: Path) -> int:
    """Numbers in a safetensors file, from its header alone.

    Raises:
        ExportError: the file is no safetensors file.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < LARGEST_HEADER_BYTES else None
        return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{path.parent.name}/{path.name} is damaged; choose another checkpoint") from error
