"""The live view of a run: figures, curves, samples by step, and the log. Reads the run folder, decides nothing.

`RunMonitor.show` may be called twice a second: it reads what is new and changes a widget only where its text differs.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from everydream_kit import jobs
from everydream_kit.panels import look
from everydream_kit.panels.chart import line_chart
from everydream_kit.panels.live import RunView, smooth, thin
from everydream_kit.panels.panel import set_html
from everydream_kit.panels.shots import picture_tag

STATE_TONES: dict[str, look.Tone] = {
    "starting": "busy",
    "running": "busy",
    "saving": "busy",
    "sampling": "busy",
    "validating": "busy",
    "finished": "good",
    "stopped": "warn",
    "failed": "bad",
    "died": "bad",
}
SHOWN_STEPS = 8
"""Rows of the samples gallery: the newest steps."""
SHOWN_PROMPTS = 6
"""Pictures in each of these rows."""
NO_SAMPLES = '<div class="edk-empty">Samples appear here, the newest first, as soon as the run draws some.</div>'


class RunMonitor:
    """What a run folder tells, as widgets.

    Attributes:
        view: what has been read of the shown run; None without one.
        bar, figures, curves, samples, log: the pieces, for a panel to place.
    """

    def __init__(self) -> None:
        self.view: RunView | None = None
        self._job: jobs.Job | None = None
        self._shown: dict[str, Any] = {}
        self.bar = look.progress_bar()
        self.bar.layout.visibility = "visible"
        self.figures, self.log = widgets.HTML(), widgets.HTML()
        self.chart, self.rate_chart, self.notes = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.curves = look.column(self.chart, self.rate_chart, self.notes)
        self.gallery, self.step_picture = widgets.HTML(), widgets.HTML()
        self.step_slider = widgets.IntSlider(
            min=0, max=0, description="Step", readout=False, style={"description_width": "70px"},
            layout=widgets.Layout(width="420px", max_width="100%"),
        )  # fmt: skip
        self.step_words = widgets.HTML()
        self.step_slider.observe(lambda _: self._draw_step(), "value")
        self.samples = look.column(
            look.row(self.step_slider, self.step_words), self.step_picture, look.section("By step"), self.gallery
        )

    def attach(self, job: jobs.Job | None) -> None:
        """Begin to show another run."""
        self._job = job
        self.view = RunView(job.folder) if job is not None else None
        self._shown.clear()
        self.step_slider.max = 0

    def show(self, status: dict[str, Any]) -> None:
        """Show what is new. Cheap where nothing is."""
        self._draw_figures(status)
        if self.view is None or self._job is None:
            self._draw_curves(RunView(Path()))
            self._draw_samples({})
            set_html(self.log, look.log_view([]))
            return
        if self.view.update() or "curves" not in self._shown:
            self._shown["curves"] = True
            self._draw_curves(self.view)
            set_html(self.notes, look.note("\n".join(self.view.messages[-5:]), "warn"))
        self._draw_samples(self.view.sample_steps())
        set_html(self.log, look.log_view(self._job.log_tail()))

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
        set_html(self.gallery, sample_rows({step: steps[step] for step in newest}) or NO_SAMPLES)
        self._draw_step()

    def _draw_step(self) -> None:
        steps = self.view.sample_steps() if self.view is not None else {}
        if not steps:
            set_html(self.step_picture, "")
            set_html(self.step_words, "")
            return
        step = list(steps)[min(self.step_slider.value, len(steps) - 1)]
        set_html(self.step_words, f'<span class="edk-hint">{step:,}</span>')
        pictures = "".join(
            picture_tag(path, 640, words=f"sample at step {step}") for path in steps[step][:SHOWN_PROMPTS]
        )
        set_html(self.step_picture, f'<div class="edk-shots edk-sheet">{pictures}</div>')


def sample_rows(steps: dict[int, list[Path]]) -> str:
    """A row of thumbnails for each step, so that one prompt stands in one column."""
    rows = []
    for step, paths in steps.items():
        cells = "".join(
            f"<td>{picture_tag(path, 200, words=f'sample {number} at step {step}')}</td>"
            for number, path in enumerate(paths[:SHOWN_PROMPTS], start=1)
        )
        rows.append(f"<tr><th>{html.escape(f'{step:,}')}</th>{cells}</tr>")
    return f'<div class="edk-wide"><table class="edk-steps">{"".join(rows)}</table></div>' if rows else ""
