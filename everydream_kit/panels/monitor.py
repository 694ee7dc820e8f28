"""The live view of a run: figures, curves, samples by step, and the log. Reads the run folder, decides nothing.

`RunMonitor.show` may be called twice a second: it reads what is new and changes a widget only where its text differs.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from everydream_kit import jobs
from everydream_kit.panels import style
from everydream_kit.panels.curve_box import CurveBox
from everydream_kit.panels.panel import set_html
from everydream_kit.panels.thumbnails import image_tag
from everydream_kit.runs import RunFolder
from everydream_kit.runs.history import RunHistory, Sample

STATE_TONES: dict[str, style.Tone] = {
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
"""Rows of the table of samples: the latest steps."""
SHOWN_PROMPTS = 6
"""Images in each of these rows."""
ALL_PROMPTS = ""
NO_SAMPLES = '<div class="edk-empty">Samples appear here as soon as the run generates some.</div>'


class RunMonitor:
    """What a run folder says, as widgets.

    Attributes:
        view: what has been read of the shown run; None without one.
        bar, figures, latest, curves, samples, log: the pieces, for a panel to place.
    """

    def __init__(self) -> None:
        self.view: RunHistory | None = None
        self._job: jobs.Job | None = None
        self._shown: dict[str, Any] = {}
        self._samples: list[Sample] = []
        self.bar = style.progress_bar()
        self.bar.layout.visibility = "visible"
        self.figures, self.latest, self.log = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.curves = CurveBox()
        self._build_samples()

    def _build_samples(self) -> None:
        self.gallery, self.step_image, self.strip = widgets.HTML(), widgets.HTML(), widgets.HTML()
        wide: dict[str, Any] = {"width": "420px", "label": "70px"}
        self.prompt_choice = style.control(widgets.Dropdown, "Show", options=[("all prompts", ALL_PROMPTS)], **wide)
        self.step_slider = style.control(widgets.IntSlider, "Step", min=0, max=0, readout=False, **wide)
        self.step_words = widgets.HTML()
        self.step_slider.observe(lambda _: self._render_step(), "value")
        self.prompt_choice.observe(lambda _: self._render_step(), "value")
        self.samples = style.column(
            style.row(self.prompt_choice, self.step_slider, self.step_words),
            self.step_image,
            self.strip,
            style.section("By step"),
            self.gallery,
        )

    def attach(self, job: jobs.Job | None) -> None:
        """Begin to show another run."""
        self._job = job
        self.view = RunHistory(job.run) if job is not None else None
        self._shown.clear()
        self.step_slider.max = 0
        self.curves.reset()

    def show(self, status: Mapping[str, Any]) -> None:
        """Show what is new. Cheap where nothing is."""
        self._render_figures(status)
        if self.view is None or self._job is None:
            self.curves.show(RunHistory(RunFolder(Path())))
            self._render_samples([])
            set_html(self.log, style.log_view([]))
            return
        if self.view.update() or "curves" not in self._shown:
            self._shown["curves"] = True
            self.curves.show(self.view)
        self._render_samples(self.view.samples())
        set_html(self.log, style.log_view(self._job.run.log_tail()))

    def _render_figures(self, status: Mapping[str, Any]) -> None:
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
            ("loss, last step", "–" if loss is None else f"{loss:.4f}"),
            ("images per second", "–" if not speed else f"{speed:.1f}"),
            ("time left", style.duration(status.get("eta_seconds")) if status["alive"] else "–"),
            ("memory", style.size(status.get("memory_bytes"))),
        ]
        set_html(self.figures, style.facts(entries))

    def _epoch_words(self, ended: int) -> str:
        """`3 / 16`: the epoch in progress (the last one where all have ended) of those that the run will have."""
        total = self.view.max_epochs if self.view is not None else None
        return f"{min(ended + 1, total)} / {total}" if total else str(ended + 1)

    def _render_samples(self, samples: list[Sample]) -> None:
        if self._shown.get("samples") == samples:
            return
        self._shown["samples"], self._samples = samples, samples
        steps = self._steps()
        follow = self.step_slider.value == self.step_slider.max
        self.step_slider.max = max(0, len(steps) - 1)
        self.step_slider.disabled = len(steps) < 2
        if follow:
            self.step_slider.value = self.step_slider.max
        prompts = [("all prompts", ALL_PROMPTS), *((words, words) for words in dict.fromkeys(s.words for s in samples))]
        if prompts != list(self.prompt_choice.options):
            chosen = self.prompt_choice.value
            self.prompt_choice.options = prompts
            self.prompt_choice.value = chosen if chosen in [value for _, value in prompts] else ALL_PROMPTS
        by_step = {step: [s for s in samples if s.step == step] for step in steps[-SHOWN_STEPS:][::-1]}
        set_html(self.gallery, sample_rows(by_step) or NO_SAMPLES)
        set_html(self.latest, latest_samples(samples) or NO_SAMPLES)
        self._render_step()

    @property
    def latest_step(self) -> int:
        """Step of the latest samples that are shown; 0 without any, and for those before training."""
        return self._samples[-1].step if self._samples else 0

    def _steps(self) -> list[int]:
        return list(dict.fromkeys(sample.step for sample in self._samples))

    def _render_step(self) -> None:
        """The samples of the chosen step; of a chosen prompt, also its strip through all steps."""
        steps, prompt = self._steps(), self.prompt_choice.value
        if not steps:
            for widget in (self.step_image, self.step_words, self.strip):
                set_html(widget, "")
            return
        step = steps[min(self.step_slider.value, len(steps) - 1)]
        set_html(self.step_words, f'<span class="edk-hint">{step:,}</span>')
        chosen = [sample for sample in self._samples if prompt in (ALL_PROMPTS, sample.words)]
        here = [sample for sample in chosen if sample.step == step][:SHOWN_PROMPTS]
        images = "".join(image_tag(sample.path, 640, words=f"{sample.words}, step {step:,}") for sample in here)
        set_html(self.step_image, f'<div class="edk-shots edk-samples">{images}</div>')
        set_html(self.strip, sample_strip(chosen, step) if prompt != ALL_PROMPTS else "")


def latest_samples(samples: list[Sample]) -> str:
    """The samples of the latest step, each with what the base made of the prompt in a corner."""
    if not samples:
        return ""
    step = samples[-1].step
    before = {(s.index, s.words): s for s in samples if s.step == 0 < step}
    figures = []
    for sample in [s for s in samples if s.step == step][:SHOWN_PROMPTS]:
        images = image_tag(sample.path, 320, words=f"{sample.words}, step {step:,}")
        if (first := before.get((sample.index, sample.words))) is not None:
            corner = image_tag(first.path, 120, words=f"{first.words}, before training")
            images += f'<span class="edk-corner">{corner}</span>'
        words = "<figcaption>EMA</figcaption>" if sample.is_averaged else ""  # the grid itself names its prompt
        figures.append(f'<figure><div class="edk-over">{images}</div>{words}</figure>')
    title = f"Samples at step {step:,}" if step else "Samples before training"
    more = ' <span class="edk-hint">in the corner: before training</span>' if before else ""
    return f'<div class="edk-section">{title}{more}</div><div class="edk-shots edk-latest">{"".join(figures)}</div>'


def sample_strip(samples: list[Sample], step: int) -> str:
    """One prompt through all steps, in a row that scrolls."""
    figures = "".join(
        f'<figure class="{"edk-current" if sample.step == step else ""}">'
        f"{image_tag(sample.path, 120, words=f'{sample.words}, step {sample.step:,}')}"
        f"<figcaption>{sample.step:,}</figcaption></figure>"
        for sample in samples
    )
    return f'<div class="edk-shots edk-strip" tabindex="0" role="group" aria-label="All steps">{figures}</div>'


def sample_rows(steps: dict[int, list[Sample]]) -> str:
    """A row of thumbnails for each step, so that one prompt is in one column."""
    rows = []
    for step, samples in steps.items():
        cells = "".join(
            f"<td>{image_tag(sample.path, 200, words=f'{sample.words}, step {step:,}')}</td>"
            for sample in samples[:SHOWN_PROMPTS]
        )
        rows.append(f"<tr><th>{html.escape(f'{step:,}')}</th>{cells}</tr>")
    return f'<div class="edk-wide"><table class="edk-steps">{"".join(rows)}</table></div>' if rows else ""
