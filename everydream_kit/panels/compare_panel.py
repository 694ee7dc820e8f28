"""The compare panel: checkpoints next to each other on the same prompts and seeds, before and after, pick a winner."""

from __future__ import annotations

import html
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from everydream_kit import jobs
from everydream_kit.actions.background_task import BackgroundTask
from everydream_kit.actions.bases import recognize_family
from everydream_kit.actions.checkpoint_list import CheckpointList
from everydream_kit.actions.comparison import SAVED_FILE, Comparison
from everydream_kit.actions.project import Project
from everydream_kit.actions.sample_prompts import prompt_lines, read_prompts
from everydream_kit.actions.table import SAMPLE
from everydream_kit.errors import ConfigError, JobError
from everydream_kit.models.families import FAMILIES
from everydream_kit.panels import style
from everydream_kit.panels.action_controls import make_action_control
from everydream_kit.panels.clock import make_clock, reveal
from everydream_kit.panels.login import token_environment
from everydream_kit.panels.pages import Fold, Pages
from everydream_kit.panels.panel import Panel, set_html
from everydream_kit.panels.thumbnails import image_tag

SHOWN_CHECKPOINTS = 12
FIRST_PROMPTS = 3
"""Of the project's own prompts, to begin with."""

NOTHING_YET = "This project has no checkpoint yet. Each appears here as soon as it is saved."


class ComparePanel(Panel):
    """`edk.panels.compare(project)`: checkpoints next to each other, before and after, pick a winner.

    Attributes:
        project: the project folder.
        comparison: what was sampled, or is being sampled; None before the first.
        sampling: the background task that samples, whichever panel started it.
    """

    def __init__(self, folder: str | Path, *, environment: dict[str, str] | None = None) -> None:
        """Build the panel; the last comparison comes back."""
        super().__init__()
        self.project = Project.open(folder)
        self.sampling = BackgroundTask(self._folder, {**token_environment(), **(environment or {})})
        self.comparison = self._last_comparison()
        self._shown: object = None
        self.checkpoints = CheckpointList(self.project)
        self._is_due = self._began_by_itself = False
        self._has_chosen = self._has_picked = self._quiet = False
        self._build()
        self._render(force=True)

    @property
    def job(self) -> jobs.Job | None:
        """The sampling in progress, or None."""
        return self.sampling.job

    @property
    def _folder(self) -> Path:
        return self.project.folder / "compare"

    def _last_comparison(self) -> Comparison | None:
        path = self._folder / SAVED_FILE
        return Comparison.load(path) if path.is_file() else None

    def _choices(self) -> dict[str, str]:
        """What can be compared: label to checkpoint; the base first, then by step."""
        base = str(self.project.settings()["resume_ckpt"])
        found = {f"base: {Path(base).name}": base}
        for checkpoint in reversed(self.checkpoints.known[:SHOWN_CHECKPOINTS]):
            found[self.checkpoints.label(checkpoint)] = str(checkpoint)
        return found

    def _build(self) -> None:
        self.choices: dict[str, str] = {}
        self.checks: dict[str, widgets.Checkbox] = {}
        self.check_row = style.row(gap="4px 22px")
        self._build_settings()
        self.generate_button = self.button(
            "Generate images", self.draw, tone="primary", icon="paint-brush", hint="Sample what is not there yet"
        )
        hint = "End sampling; the images that are there stay"
        self.stop_button = self.button("Stop", self.stop, icon="stop", hint=hint)
        self.refresh_button = self.make_refresh_button()
        self.head, self.grid, self.pair = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.bar = style.progress_bar()
        self.tabs = Pages({"Before and after": self._build_pair(), "Whole grid": style.column(self.grid)})
        self.clock = make_clock(self.on_beat)
        self.wishes = Fold("Checkpoints and prompts", self._wishes)
        self.wishes.set_open(self.comparison is None)
        self.winner_box = style.column(style.section("The winner"), self._build_winner())
        self.box = style.panel_box(
            [
                self.head,
                self.wishes.box,
                style.actions(self.generate_button, self.stop_button, self.refresh_button, message=self.message),
                self.bar,
                self.tabs.box,
                self.winner_box,
                self.clock,
            ]
        )
        self._offer_checkpoints()

    def _wishes(self) -> Sequence[widgets.Widget]:
        """What is compared; folded away where there is a comparison to look at."""
        return (
            style.section("Checkpoints"),
            self.check_row,
            style.section("Prompts, one a line"),
            self.prompts,
            style.row(self.cfgs, self.size, self.steps, self.seed),
        )

    def _offer_checkpoints(self) -> None:
        """Fill the lists with what can be compared now. Ticks stay; what has come since is ticked as `_is_ticked` says."""
        kept = {self.choices[label]: check.value for label, check in self.checks.items()}
        self.choices, self.checks = self._choices(), {}
        for label, source in self.choices.items():
            value = kept[source] if source in kept and self._has_chosen else self._is_ticked(source)
            check = widgets.Checkbox(value=value, description="Compare", indent=False, layout={"width": "auto"})
            style.set_hint(check, f"Compare {label}")
            check.observe(self._note_choice, "value")
            self.checks[label] = check
        self.check_row.children = tuple(style.named(check, label) for label, check in self.checks.items())
        trained = [(label, source) for label, source in list(self.choices.items())[1:]]
        chosen = self.winner.value if self._has_picked else str(self.project.winner)
        if tuple(trained) != tuple(self.winner.options):
            self._quiet = True
            self.winner.options = trained
            known = [source for _, source in trained]
            self.winner.value = chosen if chosen in known else (known[-1] if known else None)
            self._quiet = False
        self.winner_box.layout.display = "" if trained else "none"

    def _is_ticked(self, source: str) -> bool:
        """To begin with: what was compared last (else the base), and the latest checkpoint, which may have come since."""
        sources = list(self.choices.values())
        asked = self.comparison.checkpoints if self.comparison is not None else sources[:1]
        return source in asked or source == sources[-1]

    def _note_choice(self, change: object) -> None:
        self._has_chosen = True

    def _note_pick(self, change: object) -> None:
        if not self._quiet:
            self._has_picked = True

    def _build_settings(self) -> None:
        last = self.comparison
        settings = self.project.settings()
        family = FAMILIES[recognize_family(settings.get("resume_ckpt"), settings.get("family")) or "sd1"]
        sampling = read_prompts(self.project.prompts_path, family.sampler)
        own = sampling.model_fields_set
        resolution = settings.get("resolution", 512)
        size = last.size if last else (resolution if isinstance(resolution, int) else resolution[0])
        prompts = "\n".join(last.prompts if last else self._first_prompts())
        hint = "a jet over the sea"
        self.prompts = style.control(widgets.Textarea, "Prompts", "auto", label="70px", value=prompts, placeholder=hint)
        self.prompts.layout.height = "82px"
        is_flow = family.objective == "flow"
        usual, most = (family.sampler.cfgs[:1], family.sampler.num_steps) if is_flow else ((4.0,), 20)
        cfgs = ", ".join(f"{cfg:g}" for cfg in (last.cfgs if last else sampling.cfgs if "cfgs" in own else usual))
        steps = last.num_inference_steps if last else min(sampling.num_inference_steps, most)
        narrow: dict[str, Any] = {"width": "152px", "label": "70px"}  # four stand in a row of a narrow panel
        how, seed = SAMPLE.arguments, narrow | ({"value": last.seed} if last else {})
        self.cfgs = make_action_control(how["cfgs"], "cfg", value=cfgs, **narrow)
        self.size = style.control(widgets.BoundedIntText, "Size", value=size, min=64, max=2048, step=8, **narrow)
        self.steps = make_action_control(how["num_inference_steps"], "Steps", value=steps, min=1, max=200, **narrow)
        self.seed = make_action_control(how["seed"], "Seed", **seed)

    def _build_pair(self) -> widgets.Widget:
        wide = {"width": "620px", "label": "84px"}
        self.prompt_choice = style.control(widgets.Dropdown, "Prompt", **wide)
        self.slider = style.control(widgets.IntSlider, "Checkpoint", min=0, max=0, readout=False, **wide)
        for control in (self.prompt_choice, self.slider):
            control.observe(lambda _: self._render_pair(), "value")
        return style.column(self.prompt_choice, self.slider, self.pair)

    def _build_winner(self) -> widgets.Widget:
        self.winner = style.control(widgets.Dropdown, "Winner", "420px", label="70px")
        self.winner.observe(self._note_pick, "value")
        self.winner_button = self.button("Pick this one", self.pick_winner, icon="check")
        return style.row(self.winner, self.winner_button)

    def _first_prompts(self) -> Sequence[str]:
        """To begin with: the project's own prompts, or two captions of the dataset."""
        if prompts := prompt_lines(read_prompts(self.project.prompts_path)):
            return prompts[:FIRST_PROMPTS]
        files = sorted(self.project.dataset_folder.rglob("*.txt"))[:2]
        return [text for text in (path.read_text("utf-8", "replace").strip() for path in files) if text] or ["a photo"]

    # What the buttons do

    def asked(self) -> Comparison:
        """What the controls ask for.

        Raises:
            ConfigError: nothing is chosen, or a number cannot be read.
        """
        try:
            cfgs = tuple(float(text) for text in self.cfgs.value.replace(";", ",").split(",") if text.strip())
        except ValueError as error:
            raise ConfigError(f"cfg: numbers with commas between, such as 1, 4, 7 (got {self.cfgs.value!r})") from error
        return Comparison(
            folder=str(self._folder),
            checkpoints=tuple(self.choices[label] for label, check in self.checks.items() if check.value),
            prompts=tuple(line.strip() for line in self.prompts.value.splitlines() if line.strip()),
            cfgs=cfgs,
            seed=self.seed.value,
            size=self.size.value,
            num_inference_steps=self.steps.value,
            clip_skip=int(self.project.settings().get("clip_skip", 0)),
        )

    def draw(self) -> None:
        """Start sampling what is missing, in a process of its own.

        Raises:
            ConfigError: nothing is chosen, or a number cannot be read.
            JobError: images are being sampled already. What was compared last stays.
        """
        asked = self.asked()
        if asked.count_missing():
            request = asked.save(f"request-{secrets.token_hex(4)}.json")
            try:
                self.sampling.begin("generate", str(request))
            except JobError:
                request.unlink()
                raise
            self.say_progress("Loading the model …")
        self.comparison, self._is_due = asked, False
        asked.save()
        self._render(force=True)

    def stop(self) -> None:
        """End sampling; the images that are there stay."""
        self.sampling.stop()
        self.refresh()

    def run(self) -> None:
        """Show the panel, and sample as soon as the project's run has finished. Returns at once."""
        self.show()
        self._is_due = True
        self.wishes.set_open(False)
        self.on_beat()

    def pick_winner(self) -> None:
        """Remember the winner; the export panel begins with it."""
        self.project.pick_winner(Path(self.winner.value))
        self.say(f"{Path(self.winner.value).name} is the winner: export and share begin with it.", "good")

    # Showing

    def refresh(self) -> None:
        """Show checkpoints and images that have come since the last look."""
        had_none = len(self.choices) < 2
        if self.checkpoints.update():
            self._offer_checkpoints()
            if had_none and len(self.choices) > 1:
                self.say("")  # the sentence of the empty project
        self._follow_sampling()
        if self._is_due and self.job is None:
            self._begin_when_trained()
        self._render()

    def _follow_sampling(self) -> None:
        """Show the progress of sampling, whichever panel started it."""
        if self.job is None and self.sampling.attach():
            self.comparison = self._last_comparison()
        status = self.sampling.poll()
        if status is None:
            return
        style.show_progress(self.bar, status if status["alive"] else None)
        if not status["alive"]:
            if self.say_status(status) and self._began_by_itself:
                self._began_by_itself = False
                reveal(self.clock)
        elif status.get("num_steps"):
            self.say_progress(f"{status['step']} of {status['num_steps']} images.")

    def _begin_when_trained(self) -> None:
        """Sample if the project's latest run has finished; else say what is missing."""
        run = self.project.running_job() or next(iter(self.project.jobs()), None)
        status = run.status() if run is not None else {"state": "", "alive": False}
        if status["state"] == "finished" and not status["alive"]:
            self._is_due, self._began_by_itself = False, True
            self._press(self.draw)
        elif status["alive"]:
            done = f"Step {status['step']:,} of {status['num_steps']:,}. " if status["num_steps"] else ""
            self.say_progress(f"{done}Before and after appears here when training ends.")
        elif run is None:
            self.say("Before and after appears here when training ends. Nothing has been trained yet.")
        else:
            self.say(
                f"The run {run.name} has not finished ({status['state']}). Resume it: before and after appears here when it "
                "ends. Generate images compares what already exists.",
                "warn",
            )

    def _render(self, *, force: bool = False) -> None:
        self.stop_button.disabled = self.job is None
        if self.comparison is None and not self.checkpoints.known and not self.message.value:
            self.say(NOTHING_YET)
        self.generate_button.disabled = self.job is not None
        set_html(
            self.head,
            style.heading("Compare", self.project.name, "The same seeds everywhere, so only the model differs."),
        )
        here = self.comparison
        state = None if here is None else (here, here.count_missing())
        if state == self._shown and not force:
            return
        self._shown = state
        for control in (self.prompt_choice, self.slider):
            control.layout.display = "none" if here is None else ""
        if here is None:
            empty = '<div class="edk-empty">Choose checkpoints and prompts, then press Generate images.</div>'
            set_html(self.grid, empty)
            set_html(self.pair, empty)
            return
        set_html(self.grid, self._grid_html(here))
        rows = [
            (f"{prompt[:80]} · cfg {cfg:g}", json.dumps([prompt, cfg])) for prompt in here.prompts for cfg in here.cfgs
        ]
        if tuple(rows) != tuple(self.prompt_choice.options):
            self.prompt_choice.options = rows
            self.prompt_choice.value = rows[0][1]
        last = max(0, len(here.checkpoints) - 1)
        if self.slider.max != last:
            self.slider.max = last
            self.slider.value = last
        self._render_pair()

    def _label(self, checkpoint: str) -> str:
        names = {source: label for label, source in self.choices.items()}
        return names.get(checkpoint, Path(checkpoint).name)

    def _cell(self, checkpoint: str, prompt: str, cfg: float, side: int) -> str:
        path = (self.comparison or self.asked()).image_path(checkpoint, prompt, cfg)
        if path.is_file():
            return image_tag(path, side, words=f"{prompt}, {self._label(checkpoint)}, cfg {cfg:g}")
        return f'<div class="edk-empty" style="width:{side - 30}px;height:{side - 20}px">not sampled yet</div>'

    def _grid_html(self, here: Comparison) -> str:
        top = "".join(f"<th>{html.escape(self._label(checkpoint))}</th>" for checkpoint in here.checkpoints)
        rows = []
        for prompt in here.prompts:
            for cfg in here.cfgs:
                cells = "".join(f"<td>{self._cell(c, prompt, cfg, 170)}</td>" for c in here.checkpoints)
                rows.append(f"<tr><td>{html.escape(prompt)}<div class='edk-hint'>cfg {cfg:g}</div></td>{cells}</tr>")
        table = f'<table class="edk-table"><tr><th></th>{top}</tr>{"".join(rows)}</table>'
        return f'<div style="overflow-x:auto">{table}</div>'

    def _render_pair(self) -> None:
        here = self.comparison
        if here is None or not self.prompt_choice.value:
            return
        prompt, cfg = json.loads(self.prompt_choice.value)
        first, second = here.checkpoints[0], here.checkpoints[min(self.slider.value, len(here.checkpoints) - 1)]
        shown = [(first, f"before · {self._label(first)}"), (second, f"after · {self._label(second)}")]
        if second == first:
            shown = [(first, self._label(first))]
        figures = "".join(
            f"<figure>{self._cell(source, prompt, cfg, 420)}<figcaption>{html.escape(words)}</figcaption></figure>"
            for source, words in shown
        )
        set_html(self.pair, f'<div class="edk-shots edk-pair">{figures}</div>')
