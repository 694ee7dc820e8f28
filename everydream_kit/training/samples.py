"""Sample pictures while training: reading the prompt file, drawing, and writing the sheets.

The prompt file is read anew at every sampling, so prompts can be changed while a run goes on; a broken file is a warning, and
training goes on. A `.txt` holds one prompt a line. A `.json` holds EveryDream 2's object: `cfgs`, `scheduler`,
`num_inference_steps`, `seed`, `resolution`, `batch_size`, `generate_samples_every_n_steps`, `generate_pretrain_samples` and
`samples`, a list of `{prompt, negative_prompt, seed, size, aspect_ratio, random_caption}`.

All cfg values of a prompt start from the same noise, so the columns of a sheet differ by cfg alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from everydream_kit.atomic import write_atomic
from everydream_kit.data.buckets import assign_bucket, bucket_table
from everydream_kit.draws import derive_seed, generator
from everydream_kit.errors import ConfigError
from everydream_kit.share_bar import ShareBar
from everydream_kit.training.progress import StopAsked, WorkProgress
from everydream_kit.training.reports import Listener, StepReport

if TYPE_CHECKING:
    from everydream_kit.data.dataset import Dataset
    from everydream_kit.models.sampling import SamplePrompt
    from everydream_kit.training.control import StopSignal
    from everydream_kit.training.run import Run

NUM_RANDOM_CAPTIONS = 4
"""Prompts taken from the dataset where there is no prompt file."""


class _SampleEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: str = ""
    negative_prompt: str = ""
    seed: int | None = None
    size: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None
    aspect_ratio: Annotated[float, Field(gt=0)] | None = None
    random_caption: bool = False


class SampleSettings(BaseModel):
    """The prompt file, whole. Field names are EveryDream 2's; `batch_size` and progress bars are accepted and not needed."""

    model_config = ConfigDict(extra="forbid", strict=True)
    cfgs: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)] = [7.0, 4.0, 1.01]
    scheduler: str = "ddim"
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 30
    seed: int | None = None
    resolution: Annotated[int, Field(ge=64)] | None = None
    batch_size: Annotated[int, Field(ge=1)] | None = None
    show_progress_bars: bool = False
    generate_samples_every_n_steps: Annotated[int, Field(ge=1)] | None = None
    generate_pretrain_samples: bool = False
    samples: list[_SampleEntry] = []
    doc: Any = None


def read_sample_settings(path: Path) -> SampleSettings:
    """Read a prompt file.

    Raises:
        ConfigError: it is not there, not text, or its JSON is wrong; the message names line or key.
    """
    if not path.is_file():
        raise ConfigError(f"sample_prompts: {path} is not there.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() != ".json":
            prompts = [line.strip() for line in text.splitlines() if line.strip()]
            return SampleSettings(samples=[_SampleEntry(prompt=prompt) for prompt in prompts])
        return SampleSettings.model_validate_json(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"sample_prompts: {path} is not UTF-8 text.") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"sample_prompts: {path}: {problems}") from error


def plan_prompts(
    settings: SampleSettings, dataset: Dataset, *, seed: int, resolution: int, step: int
) -> list[SamplePrompt]:
    """Turn the file's entries into prompts with sizes and seeds; random captions are drawn from the dataset by address."""
    from everydream_kit.models.sampling import SamplePrompt

    entries = settings.samples or [_SampleEntry(random_caption=True) for _ in range(NUM_RANDOM_CAPTIONS)]
    planned = []
    for index, entry in enumerate(entries):
        prompt = _random_caption(dataset, seed, step, index) if entry.random_caption else entry.prompt
        width, height = _size(entry, settings.resolution or resolution)
        own_seed = next(s for s in (entry.seed, settings.seed, seed) if s is not None)
        if own_seed == -1:
            own_seed = derive_seed(seed, "sample seed", step, index) % 2**31
        planned.append(
            SamplePrompt(
                prompt=prompt,
                negative_prompt=entry.negative_prompt,
                seed=own_seed,
                width=width,
                height=height,
                cfgs=tuple(settings.cfgs),
            )
        )
    return planned


def _random_caption(dataset: Dataset, seed: int, step: int, index: int) -> str:
    picture = int(generator(seed, "sample caption", step, index).integers(len(dataset)))
    return dataset.caption(picture).text


def _size(entry: _SampleEntry, resolution: int) -> tuple[int, int]:
    if entry.size is not None:
        return entry.size[0], entry.size[1]
    if entry.aspect_ratio is not None:
        return assign_bucket(round(1000 * entry.aspect_ratio), 1000, bucket_table(resolution))
    return resolution, resolution


def clean_for_file_name(prompt: str) -> str:
    """A prompt as part of a file name: letters, digits and a few signs, at most 100 characters."""
    return re.sub(r"[^\w\-,. ]+", "", prompt).strip(" .")[:100]


@dataclass(frozen=True)
class SampleSchedule:
    """When to draw: every so many steps (None: never), and before the first one."""

    every_n_steps: int | None
    before_training: bool


class Sampler(Listener):
    """Draws the prompts of the prompt file every `sample_steps` steps, on request, and at the end.

    Args:
        prompts_path: the prompt file.
        schedule: when, unless the prompt file says otherwise.
        live, averaged: draw with the live weights, with the EMA weights, or both.
        stop: ends a drawing in progress: it is saved first, and drawn when the run goes on.
    """

    name = "sampler"

    def __init__(
        self,
        prompts_path: Path,
        schedule: SampleSchedule,
        *,
        live: bool = True,
        averaged: bool = False,
        stop: StopSignal | None = None,
    ) -> None:
        self.prompts_path = prompts_path
        self.schedule = schedule
        self.live = live
        self.averaged = averaged
        self.stop = stop
        self._last_step: int | None = None
        self._is_owed = False

    def on_start(self, run: Run) -> None:
        if self._is_owed:
            self.draw(run)
        if run.position.step:
            return
        settings = self._settings(run)
        if self.schedule.before_training or (settings is not None and settings.generate_pretrain_samples):
            self.draw(run)

    def __call__(self, run: Run, report: StepReport) -> None:
        every = self._every(run)
        if every is not None and report.step % every == 0:
            self.draw(run)

    def on_finish(self, run: Run) -> None:
        if run.is_complete() and self._every(run) is not None and self._last_step != run.position.step:
            self.draw(run)

    def draw(self, run: Run) -> None:
        """Draw now. A problem with the prompt file is a warning. Where the run is asked to stop, the rest is drawn later."""
        settings = self._settings(run, complain=True)
        if settings is None:
            return
        self._last_step = run.position.step
        self._is_owed = False
        try:
            self._draw_variants(run, settings)
        except StopAsked:
            self._is_owed = True
            run.journal.note("The samples are not drawn to the end: the run stops. They are drawn when it goes on.")
        except OSError as problem:
            run.warn(f"The samples cannot be written: {problem}. Training goes on.")
        run.set_state("running")

    def state(self) -> dict[str, Any]:
        return {"is_owed": self._is_owed}

    def restore(self, state: dict[str, Any]) -> None:
        self._is_owed = bool(state["is_owed"])

    def _draw_variants(self, run: Run, settings: SampleSettings) -> None:
        variants = [("", False)] * self.live + [("ema-", True)] * self.averaged
        with ShareBar("samples") as bar:
            progress = WorkProgress(run.journal, "sampling", bar, stop=self.stop, num_parts=len(variants))
            for prefix, averaged in variants:
                with run.whole_model(), run.sampling_weights(averaged=averaged):
                    self._draw_sheets(run, settings, prefix, progress)
                progress.end_part()

    def _every(self, run: Run) -> int | None:
        if self.schedule.every_n_steps is None:
            return None
        settings = self._settings(run)
        own = settings.generate_samples_every_n_steps if settings is not None else None
        return own or self.schedule.every_n_steps

    def _settings(self, run: Run, *, complain: bool = False) -> SampleSettings | None:
        if not self.prompts_path.is_file():
            return SampleSettings()  # captions of the dataset
        try:
            facts = self.prompts_path.stat()
            return _settings_at(self.prompts_path, facts.st_mtime_ns, facts.st_size)
        except ConfigError as error:
            if complain:
                run.warn(f"{error} No samples were drawn; mend the file and they come back.")
            return None

    def _draw_sheets(self, run: Run, settings: SampleSettings, prefix: str, progress: WorkProgress) -> None:
        from everydream_kit.models.sampling import label_grid, sample_pictures, save_picture

        step = run.position.step
        prompts = plan_prompts(
            settings, run.dataset, seed=run.seed, resolution=max(run.plan_settings.resolutions), step=step
        )
        pictures = sample_pictures(
            run.model,
            [replace(prompt, cfgs=(cfg,)) for prompt in prompts for cfg in prompt.cfgs],
            scheduler=settings.scheduler,
            num_inference_steps=settings.num_inference_steps,
            clip_skip=run.config.clip_skip,
            progress=progress,
        )
        for index, prompt in enumerate(prompts):
            row = pictures[index * len(prompt.cfgs) : (index + 1) * len(prompt.cfgs)]
            sheet = label_grid([row], column_labels=[f"cfg {cfg:g}" for cfg in prompt.cfgs], title=prompt.prompt)
            name = f"gs{step:05}-{index:03}-{prefix}{clean_for_file_name(prompt.prompt)}"
            path = run.folder.samples_folder / f"{name}.jpg"
            save_picture(sheet, path)
            write_atomic(
                path.with_suffix(".txt"),
                f"{prompt.prompt}\nnegative prompt: {prompt.negative_prompt}\nseed: {prompt.seed}\n",
            )
            run.picture(f"sample_{index:03}_{prefix}{clean_for_file_name(prompt.prompt)[:60]}", sheet, step)
            run.tell("sample", step=step, path=str(path), index=index, prompt=prompt.prompt, seed=prompt.seed)


@lru_cache(maxsize=4)
def _settings_at(path: Path, modified_ns: int, size: int) -> SampleSettings:
    """The file's settings, parsed again only when it changed: they are asked for at every step."""
    return read_sample_settings(path)
