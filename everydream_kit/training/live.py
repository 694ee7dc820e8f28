"""Live settings: the few that may change while a run continues, read from `live.json` at each epoch's start.

Only what changes nothing about which images are seen or how the arithmetic is done: the rate's factor, and when to
sample and save. A wrong file is a warning, and the values before it stay.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from everydream_kit.training.checkpoint_saving import Saver
from everydream_kit.training.reports import Listener, StepReport
from everydream_kit.training.resume_state import number_of
from everydream_kit.training.sampling_listener import Sampler, SampleSchedule

if TYPE_CHECKING:
    from everydream_kit.training.run import Run


class LiveSettings(BaseModel):
    """What `live.json` may hold. A setting that is absent stays as it is."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    lr_factor: Annotated[float, Field(ge=0, le=100)] | None = None
    sample_steps: Annotated[int, Field(ge=1)] | None = None
    sample_prompts: str | None = None
    ckpt_every_n_minutes: Annotated[float, Field(gt=0)] | None = None
    save_every_n_epochs: Annotated[int, Field(ge=1)] | None = None
    save_every_n_steps: Annotated[int, Field(ge=1)] | None = None


class LiveSettingsReader(Listener):
    """Reads `live.json` at each epoch's start and puts it to work. The rate's factor is kept over a resume."""

    name = "live"

    def __init__(self, sampler: Sampler, saver: Saver) -> None:
        self.sampler = sampler
        self.saver = saver
        self.lr_factor = 1.0

    def on_start(self, run: Run) -> None:
        run.lr_factor = self.lr_factor
        if run.position.step_in_epoch == 0:
            self._read(run)

    def __call__(self, run: Run, report: StepReport) -> None:
        if report.epoch_ended:
            self._read(run)

    def _read(self, run: Run) -> None:
        path = run.folder.folder / "live.json"
        if not path.is_file():
            return
        try:
            live = LiveSettings.model_validate_json(path.read_text("utf-8"))
        except (ValidationError, UnicodeDecodeError) as error:
            run.warn(f"live.json: {error} The settings before it stay.")
            return
        self._apply(run, live)

    def _apply(self, run: Run, live: LiveSettings) -> None:
        changed = live.model_dump(exclude_none=True)
        if live.lr_factor is not None:
            run.lr_factor = self.lr_factor = live.lr_factor
        if live.sample_steps is not None:
            self.sampler.schedule = SampleSchedule(live.sample_steps, self.sampler.schedule.before_training)
        if live.sample_prompts is not None:
            self.sampler.prompts_path = Path(live.sample_prompts)
        rules = self.saver.rules
        rules.every_n_minutes = live.ckpt_every_n_minutes or rules.every_n_minutes
        rules.every_n_epochs = live.save_every_n_epochs or rules.every_n_epochs
        rules.every_n_steps = live.save_every_n_steps or rules.every_n_steps
        run.report("live settings", step=run.position.step, **changed)

    def state(self) -> dict[str, float]:
        return {"lr_factor": self.lr_factor}

    def restore(self, state: dict[str, float]) -> None:
        self.lr_factor = number_of(state, "lr_factor")
