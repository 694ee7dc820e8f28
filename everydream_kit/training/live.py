"""Live settings: the few that may change while a run continues, read from `live.json` at each epoch's start.

Only what changes nothing about which images are seen or how the arithmetic is done: the rate's factor, and when to
sample and save. A wrong file is a warning, and the values before it stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from everydream_kit.config import TrainConfig, facts
from everydream_kit.errors import ConfigError
from everydream_kit.runs.resume_state import number_of
from everydream_kit.strict_json import read_json
from everydream_kit.training.checkpoint_saving import Saver
from everydream_kit.training.decisions import Decisions
from everydream_kit.training.reports import Listener, ObservedRun, StepReport
from everydream_kit.training.sampling_listener import Sampler


class _LiveSettings(BaseModel):
    """What `live.json` may hold besides the settings whose facts say "live". What is not given stays as it is."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    lr_factor: Annotated[float, Field(ge=0, le=100)] | None = None


def _live_fields() -> dict[str, Any]:
    """The declarations of the live settings, with None for "not given"."""
    live = {name: TrainConfig.model_fields[name] for name, one in facts().items() if one.change == "live"}
    declared = {name: (field.annotation, *field.metadata) for name, field in live.items()}
    return {name: (Annotated[parts] | None, None) for name, parts in declared.items()}


LiveSettings = create_model("LiveSettings", __base__=_LiveSettings, **_live_fields())


@dataclass(eq=False)
class LiveSettingsReader(Listener):
    """Reads `live.json` at each epoch's start and puts it to work. The rate's factor is kept over a resume."""

    name = "live"

    sampler: Sampler
    saver: Saver
    decisions: Decisions
    lr_factor: float = 1.0

    def on_start(self, run: ObservedRun) -> None:
        self.decisions.lr_factor = self.lr_factor
        if run.position.step_in_epoch == 0:
            self._read(run)

    def __call__(self, run: ObservedRun, report: StepReport) -> None:
        if report.epoch_ended:
            self._read(run)

    def _read(self, run: ObservedRun) -> None:
        path = run.folder.live_settings_path
        if not path.is_file():
            return
        try:
            live = LiveSettings.model_validate(read_json(path, error=ConfigError))
        except (ValidationError, ConfigError) as error:
            run.journal.warn(f"live.json: {error} The settings before it stay.")
            return
        self._apply(run, live)

    def _apply(self, run: ObservedRun, live: LiveSettings) -> None:
        changed = live.model_dump(exclude_none=True)
        if live.lr_factor is not None:
            self.decisions.lr_factor = self.lr_factor = live.lr_factor
        if "sample_steps" in changed:
            self.sampler.every_n_steps = changed["sample_steps"]
        if "sample_prompts" in changed:
            self.sampler.prompts_path = Path(changed["sample_prompts"])
        rules = self.saver.rules
        rules.every_n_minutes = changed.get("ckpt_every_n_minutes", rules.every_n_minutes)
        rules.every_n_epochs = changed.get("save_every_n_epochs", rules.every_n_epochs)
        rules.every_n_steps = changed.get("save_every_n_steps", rules.every_n_steps)
        run.journal.report("live settings", step=run.position.step, **changed)

    def state(self) -> dict[str, float]:
        return {"lr_factor": self.lr_factor}

    def restore(self, state: dict[str, float]) -> None:
        self.lr_factor = number_of(state, "lr_factor")
