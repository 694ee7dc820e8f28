"""The plan of the training panel: the estimate of a run: at once as far as it is cheap, then in full.

Images, steps and disk come from `estimate` at every change of the form. Memory, time and cost take seconds (the
trainer's own step is gone through without values), so a process of its own estimates them (`background.estimate`) once the
form has rested; the result is kept with its settings. *Make it fit* takes over the changes that it
advises.
"""

from __future__ import annotations

import hashlib
import html
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import ipywidgets as widgets

from everydream_kit.actions.background import PLAN_FILE
from everydream_kit.actions.background_task import BackgroundTask
from everydream_kit.actions.estimate import QuickEstimate, quick_estimate
from everydream_kit.actions.project import Project
from everydream_kit.config import TrainConfig
from everydream_kit.errors import JobError
from everydream_kit.panels import style
from everydream_kit.panels.pages import Fold
from everydream_kit.panels.panel import set_html
from everydream_kit.preflight.gpus import known_gpus

REST_SECONDS = 1.5
"""The form must be left alone for so long before the full plan is made."""
GIB = 2**30


class PlanBox:
    """The plan line, what stands behind it, and *Make it fit*.

    Attributes:
        line: the plan in a line.
        fit_button: takes over what is advised.
        line_row: the line and the button, to show where they stay in view.
        fold: GPU, price and the whole plan, for those who want it.
    """

    def __init__(
        self,
        project: Project,
        apply: Callable[[dict[str, Any]], object],
        say: Callable[[str, style.Tone], object],
        *,
        task: BackgroundTask | None = None,
    ) -> None:
        """Plan nothing yet.

        Args:
            apply: called with settings that make the run fit.
            say: takes messages.
            task: makes the full plan; by default a process below the project folder.
        """
        self._project, self._apply, self._say = project, apply, say
        self._task = task or BackgroundTask(project.folder / "plan")
        self._config: TrainConfig | None = None
        self._quick_estimate: QuickEstimate | None = None
        self._problem = ""
        self._changed_at = 0.0
        self._key = ""
        self._asked = ""
        self._known: dict[str, dict[str, Any]] = {}
        self.line = widgets.HTML(layout=widgets.Layout(flex="1 1 420px", width="auto"))
        self.fit_button = style.button("Make it fit", icon="magic", hint="Change the fewest settings so that it fits")
        self.fit_button.layout.display = "none"
        self.fit_button.on_click(lambda _: self.make_it_fit())
        self.report = widgets.HTML()
        gpus = [("this machine", ""), *((gpu.name, gpu.name) for gpu in known_gpus())]
        self.gpu = style.control(widgets.Dropdown, "Plan for", "300px", label="70px", options=gpus)
        how = {"placeholder": "from the table", "continuous_update": False}
        self.price = style.control(widgets.Text, "$ an hour", "220px", label="70px", **how)
        for control in (self.gpu, self.price):
            control.observe(lambda _: self._changed(), "value")
        self.fold = Fold("What this run takes", lambda: [style.row(self.gpu, self.price), self.report])
        self.line_row = style.row(self.line, self.fit_button)

    @property
    def problem(self) -> str:
        """What keeps the run from working, or an empty text. The dataset is looked at now."""
        if self._config is None:
            return ""
        self._quick_estimate = quick_estimate(self._config, self._project)
        return self._quick_estimate.problem

    @property
    def caution(self) -> str:
        """What to ask before a run of this length or size starts, or an empty text."""
        is_here = self._config is not None and not self.gpu.value  # a plan for another GPU says nothing of this one
        made = self._known.get(self._key, {}) if is_here else {}
        return "" if self._quick_estimate is None else caution_of(self._quick_estimate, made)

    @property
    def refusal(self) -> str:
        """What training would say of these settings, as far as the full plan has found out; else an empty text."""
        return str(self._known.get(self._key, {}).get("error") or "") if self._config is not None else ""

    @property
    def blocked(self) -> bool:
        """Whether the run cannot work, as far as the plan line has seen."""
        return self._quick_estimate is not None and bool(self._quick_estimate.problem)

    def take(self, config: TrainConfig) -> None:
        """Plan for these settings from now on."""
        self._config, self._problem = config, ""
        self._changed()

    def take_errors(self, text: str) -> None:
        """Say what is wrong with the settings instead of a plan."""
        self._config, self._problem = None, text
        self._render()

    def refresh(self, *, may_start: bool) -> None:
        """Look after the process, and start it for settings that have rested; at a beat of the clock.

        Args:
            may_start: False while a run is in progress: it needs the machine.
        """
        status = self._task.poll()
        if status is not None:
            if not status["alive"]:
                self._take_result(status)
            elif not may_start:
                self._give_up()
            return
        if self.blocked and self._config is not None and time.monotonic() - self._changed_at > REST_SECONDS:
            self._changed()  # images may have come, or room on the disk
        rested = time.monotonic() - self._changed_at > REST_SECONDS
        if may_start and rested and self._config is not None and self._asked != self._key:
            self._begin()

    def make_it_fit(self) -> None:
        """Take over the changes that the plan advises."""
        advice = (self._known.get(self._key) or {}).get("advice") or {}
        if advice.get("changes"):
            self._apply(advice["changes"])
            words = "\n".join(["Changed so that it fits:", *advice["reasons"]])
            if not advice["fits"]:
                words = "\n".join(["Changed as far as it goes; it still does not fit:", *advice["reasons"]])
            self._say(words, "good" if advice["fits"] else "warn")

    def _changed(self) -> None:
        self._changed_at = time.monotonic()
        if self._config is not None:
            self._quick_estimate = quick_estimate(self._config, self._project)
            quick = self._quick_estimate
            known = (quick.num_images, quick.num_steps, quick.seconds)
            seen = (self._config.to_json(), self.gpu.value, self.price.value, known)
            self._key = hashlib.blake2b(repr(seen).encode(), digest_size=8).hexdigest()
        self._render()

    def _begin(self) -> None:
        assert self._config is not None
        self._asked = self._key
        if self._key in self._known:
            return
        try:
            price = float(self.price.value) if self.price.value.strip() else None
        except ValueError:
            self._known[self._key] = {"error": f"$ an hour: must be a number (got {self.price.value!r})"}
            self._render()
            return
        wish = {"gpu": self.gpu.value or None, "price": price, "key": self._key}
        try:
            self._task.begin("estimate", self._config.to_json(), json.dumps(wish))
        except JobError:  # another panel on this project plans at this moment
            self._asked = ""

    def _give_up(self) -> None:
        """End the process, so that the run has the machine; the plan is made when the run has ended."""
        self._task.stop()
        self._task.job, self._asked = None, ""

    def _take_result(self, status: Mapping[str, Any]) -> None:
        path = self._task.folder / PLAN_FILE
        if status["state"] == "finished" and path.is_file():
            made = dict(json.loads(path.read_text("utf-8")))
            self._known[made["key"]] = made
        else:
            self._known[self._asked] = {"error": status.get("message") or "The plan could not be made."}
        self._render()

    def _render(self) -> None:
        made = self._known.get(self._key, {}) if self._config is not None else {}
        advice = made.get("advice") or {}
        self.fit_button.layout.display = "" if advice.get("changes") else "none"
        if self._config is None or self._quick_estimate is None:
            set_html(self.line, style.note(self._problem, "bad"))
        elif self._quick_estimate.problem:
            set_html(self.line, style.note(self._quick_estimate.problem, "warn"))
        else:
            text = "\n".join(filter(None, [plan_line(self._quick_estimate, made), made.get("error")]))
            is_odd = made.get("fits") is False or made.get("error") or self.caution
            tone = "edk-note warn" if is_odd else "edk-plan"
            set_html(self.line, f'<div class="{tone}" role="status">{html.escape(text)}</div>')
        words = made.get("error") or made.get("text") or "Estimating memory, time and cost …"
        set_html(self.report, style.document(words, "The plan"))


LONG_SECONDS = 24 * 3600.0
"""A run that takes longer is asked for twice: a slip of the keyboard is likelier than a wish."""
MANY_STEPS = 200_000
"""The same, where the time is not known."""


def caution_of(quick: QuickEstimate, made: dict[str, Any]) -> str:
    """Why a run had better be asked for twice, or an empty text.

    Args:
        quick: what is known at once.
        made: the full plan, or nothing.
    """
    reasons = []
    seconds = made.get("seconds") or quick.seconds
    if seconds and seconds > LONG_SECONDS:
        reasons.append(f"takes about {style.duration(seconds)}")
    elif not seconds and (quick.num_steps or 0) > MANY_STEPS:
        reasons.append(f"has {quick.num_steps:,} steps")
    disk = (made.get("disk") or {}).get("most_bytes")
    if disk and quick.free_bytes is not None and disk > quick.free_bytes:
        reasons.append(f"writes up to {style.size(disk)}, and {style.size(quick.free_bytes)} are free")
    if made.get("fits") is False:
        reasons.append("does not fit into the memory of this machine")
    return f"This run {' and '.join(reasons)}." if reasons else ""


def plan_line(quick: QuickEstimate, made: dict[str, Any]) -> str:
    """`32 images × 3 epochs → 24 steps · about 1 min on this CPU · 0.9 of 17.0 GiB memory · 96 MB on disk, 60 GB free`."""
    parts = [quick.steps_words()]
    seconds = made.get("seconds") or quick.seconds
    where = f" on {made['device']}" if made.get("device") else ""
    parts.append(f"about {style.duration(seconds)}{where}" if seconds else "time: known after the first steps")
    memory = made.get("memory")
    if memory:
        words = f"{memory['peak_bytes'] / GIB:.1f} of {made['device_bytes'] / GIB:.1f} GiB memory"
        parts.append(words if made.get("fits") else f"does not fit: {words}")
    disk = (made.get("disk") or {}).get("most_bytes")
    taken = f"{style.size(disk)} on disk" if disk else f"{style.size(quick.checkpoint_bytes)} a checkpoint"
    parts.append(f"{taken}, {style.size(quick.free_bytes)} free")
    if made.get("cost_usd") is not None:
        read_on = (made.get("price") or {}).get("read_on")
        parts.append(f"about ${made['cost_usd']:.2f}" + (f" at the price of {read_on}" if read_on else ""))
    return " · ".join(parts)
