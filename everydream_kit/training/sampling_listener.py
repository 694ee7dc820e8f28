"""Samples while training: when they are made, and writing their grids. What is sampled is in `prompt_file.py`.

The prompt file is read again whenever it changes, so prompts can be edited while a run trains. No mistake in it and no
failure while sampling ends a run: each is a warning, which names the grid that it cost; the next grid is made, and
    training continues.

All cfg values of a prompt start from the same noise, so the columns of a grid differ by cfg alone.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everydream_kit.atomic import write_atomic
from everydream_kit.data.buckets import assign_bucket, bucket_table
from everydream_kit.draws import derive_seed, generator
from everydream_kit.errors import ConfigError, KitError
from everydream_kit.models.captures import CAPTURES
from everydream_kit.models.family import has_large_texts
from everydream_kit.models.sampling_schedulers import build_scheduler
from everydream_kit.share_bar import ShareBar
from everydream_kit.training.chunks import cut
from everydream_kit.training.memory_measures import is_out_of_memory
from everydream_kit.training.progress import StopRequested, WorkProgress
from everydream_kit.training.prompt_file import PromptFile, SampleEntry, SampleSettings, prompts_of, read_prompt_file
from everydream_kit.training.reports import Listener, ObservedRun, StepReport

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image

    from everydream_kit.config import TrainConfig
    from everydream_kit.data.dataset import Dataset
    from everydream_kit.models.family import SamplerSpec
    from everydream_kit.models.sampling import SamplePrompt
    from everydream_kit.training.control import StopSignal
    from everydream_kit.training.step import Learner
    from everydream_kit.training.sync import RankSync

NUM_RANDOM_CAPTIONS = 4
"""Prompts taken from the dataset where there is no prompt file."""
IMAGES_OF_A_GROUP = 12
"""Grids of about so many images are made, and then written."""
NAME_BYTES = 120
"""Of a prompt in a file name: with the rest of the name below the 143 of encrypted home folders; others allow 255."""
FAILURES = (
    *(KitError, OSError, MemoryError, RuntimeError, ValueError, TypeError, LookupError, ArithmeticError),
    *(AttributeError, AssertionError, ImportError),
)
"""What can go wrong with samples, of which none is worth a run: each is reported. A stop that was asked for is none of them."""

logger = logging.getLogger("everydream_kit")


def plan_prompts(
    settings: SampleSettings, dataset: Dataset | None, *, seed: int, resolution: int, step: int, multiple: int = 8
) -> list[SamplePrompt]:
    """Turn the file's entries into prompts with sizes and seeds; random captions are drawn from the dataset by
    address.

    Args:
        dataset: None where no entry wants a caption of it.
        multiple: sides that follow from a resolution are rounded down to it (`SamplerSpec.size_multiple`).
    """
    from everydream_kit.models.sampling import SamplePrompt

    entries = settings.samples or [SampleEntry(random_caption=True) for _ in range(NUM_RANDOM_CAPTIONS)]
    planned = []
    for index, entry in enumerate(entries):
        prompt = _random_caption(dataset, seed, step, index) if entry.random_caption else entry.prompt
        width, height = sample_size(entry, settings.resolution or resolution, multiple)
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
                cfgs=tuple(entry.cfgs or settings.cfgs),
            )
        )
    return planned


def texts_of(prompts: Sequence[SamplePrompt]) -> list[str]:
    """Every different prompt and negative prompt."""
    return list(dict.fromkeys(text for one in prompts for text in (one.prompt, one.negative_prompt)))


def _random_caption(dataset: Dataset | None, seed: int, step: int, index: int) -> str:
    assert dataset is not None
    image = int(generator(seed, "sample caption", step, index).integers(len(dataset)))
    return dataset.caption(image).text


def sample_size(entry: SampleEntry, resolution: int, multiple: int) -> tuple[int, int]:
    """Width and height of a sample: as the entry says, or what its resolution gives, rounded down to what the family
    samples."""
    if entry.size is not None:
        return entry.size[0], entry.size[1]
    width = height = resolution
    if entry.aspect_ratio is not None:
        width, height = assign_bucket(round(1000 * entry.aspect_ratio), 1000, bucket_table(resolution))
    return max(width // multiple, 1) * multiple, max(height // multiple, 1) * multiple


def sample_grids(config: TrainConfig, sampler: SamplerSpec) -> list[tuple[tuple[int, int], int]]:
    """Width and height of each grid's images in a sampling, and how many those are.

    Args:
        sampler: of the model's family.
    """
    settings = prompts_of(config, sampler).settings
    side = settings.resolution or max(config.resolutions)
    entries = settings.samples or [SampleEntry()] * NUM_RANDOM_CAPTIONS
    return [(sample_size(entry, side, sampler.size_multiple), len(entry.cfgs or settings.cfgs)) for entry in entries]


def clean_for_file_name(prompt: str) -> str:
    """A prompt as part of a file name: letters, digits and a few signs, at most 100 characters and NAME_BYTES bytes."""
    cleaned = re.sub(r"[^\w\-,. ]+", "", prompt).strip(" .")[:100]
    return cleaned.encode()[:NAME_BYTES].decode(errors="ignore").strip(" .")


@dataclass(eq=False)
class Sampler(Listener):
    """Draws the prompts of the prompt file every `sample_steps` steps, on request, and at the end.

    Attributes:
        prompts_path: the prompt file.
        sync: has the model, whole.
        every_n_steps: unless the prompt file says otherwise; None: never.
        before_training: also before the first step.
        live, averaged: generate with the live weights, with the EMA weights, or both.
        stop: ends sampling in progress: it is saved first, and generated when the run continues.
    """

    name = "sampler"

    prompts_path: Path
    sync: RankSync
    every_n_steps: int | None
    before_training: bool
    live: bool = True
    averaged: bool = False
    stop: StopSignal | None = None

    def __post_init__(self) -> None:
        self._last_step: int | None = None
        self._is_owed = False
        self._read: tuple[object, PromptFile | None] | None = None
        self._logged_numbers: set[tuple[int, int, int]] = set()

    def on_start(self, run: ObservedRun) -> None:
        settings = self._settings(run)  # read here, so that a mistake is reported before the first step
        if self._is_owed:
            self.draw(run)
        if run.position.step:
            return
        if self.before_training or (settings is not None and settings.generate_pretrain_samples):
            self.draw(run)

    def __call__(self, run: ObservedRun, report: StepReport) -> None:
        every = self._every(run)
        if every is not None and report.step % every == 0:
            self.draw(run)

    def on_finish(self, run: ObservedRun) -> None:
        if run.is_complete() and self._every(run) is not None and self._last_step != run.position.step:
            self.draw(run)

    def draw(self, run: ObservedRun) -> None:
        """Sample now. Whatever fails is a warning. Where the run is asked to stop, the rest is sampled later."""
        settings = self._settings(run)
        if settings is None:
            run.journal.warn(
                f"No samples were generated: nothing in {self.prompts_path} can be used. Fix the file to have samples."
            )
            return
        self._last_step = run.position.step
        self._is_owed = False
        try:
            self._sample_variants(run, settings)
        except StopRequested:
            self._is_owed = True
            run.journal.note("Sampling was interrupted; it will run again on resume.")
        except FAILURES as problem:
            logger.debug("sampling failed", exc_info=True)
            run.journal.warn(
                f"The samples of step {run.position.step} failed: {_in_words(problem)}. Training continues."
            )
        run.journal.set_state("running")

    def state(self) -> dict[str, Any]:
        return {"is_owed": self._is_owed}

    def restore(self, state: dict[str, Any]) -> None:
        self._is_owed = bool(state["is_owed"])

    def _sample_variants(self, run: ObservedRun, settings: SampleSettings) -> None:
        variants = [("", False)] * self.live + [("ema-", True)] * self.averaged
        resolution = max(run.plan_settings.resolutions)
        prompts = plan_prompts(
            settings,
            run.dataset,
            seed=run.seed,
            resolution=resolution,
            step=run.position.step,
            multiple=self.sync.learner.model.family.sampler.size_multiple,
        )
        together = self._images_together(run, settings, prompts)
        if has_large_texts(self.sync.learner.model.family):
            # now, so that the text encoder is gone when images are made
            self.sync.learner.encode_captions(texts_of(prompts))
        with ShareBar("samples") as bar:
            progress = WorkProgress(run.journal, "sampling", bar, stop=self.stop, num_parts=len(variants))
            for prefix, averaged in variants:
                learner = self.sync.learner
                with self.sync.full_model(averaged=averaged), learner.precision.autocast(keep_casts=False):
                    _Grids(run, learner, settings, prompts, together, prefix, progress).make()
                progress.end_part()

    def _images_together(
        self, run: ObservedRun, settings: SampleSettings, prompts: Sequence[SamplePrompt]
    ) -> dict[tuple[int, int], int]:
        """Images of each size that are sampled together; what was chosen is logged once."""
        plan = run.plan_settings
        trained_pixels = plan.batch_size * max(plan.resolutions) ** 2
        sizes = dict.fromkeys(map(_size_of, prompts))
        together = {size: settings.images_together(*size, trained_pixels) for size in sizes}
        for (width, height), number in together.items() if settings.batch_size == "auto" else ():
            if (width, height, number) not in self._logged_numbers:
                self._logged_numbers.add((width, height, number))
                run.journal.note(f"sample_batch_size auto: {number} of {width} x {height} px at a time")
        return together

    def _every(self, run: ObservedRun) -> int | None:
        if self.every_n_steps is None:
            return None
        settings = self._settings(run)
        own = settings.generate_samples_every_n_steps if settings is not None else None
        return own or self.every_n_steps

    def _settings(self, run: ObservedRun) -> SampleSettings | None:
        """What the prompt file says now; None where nothing of it can be used. Its problems are reported when it changes."""
        version = _version_of(self.prompts_path)
        if self._read is None or self._read[0] != version:
            self._read = (version, self._read_anew(run))
        file = self._read[1]
        return None if file is None or file.is_empty else file.settings

    def _read_anew(self, run: ObservedRun) -> PromptFile | None:
        defaults = SampleSettings.of(run.config, self.sync.learner.model.family.sampler)
        if _version_of(self.prompts_path)[1] is None:
            if "sample_prompts" in run.config.model_fields_set:
                run.journal.warn(
                    f"sample_prompts: {self.prompts_path} is not there; captions of the dataset are sampled instead."
                )
            return PromptFile(defaults)
        try:
            file = read_prompt_file(self.prompts_path, defaults)
        except ConfigError as error:
            run.journal.warn(f"{error} There are no samples until the file is fixed.")
            return None
        for problem in file.problems:
            run.journal.warn(f"sample_prompts: {self.prompts_path}: {problem}")
        try:
            build_scheduler(self.sync.learner.model, file.settings.scheduler)
        except ConfigError as error:
            run.journal.warn(f"sample_prompts: {self.prompts_path}: {error} ddim is used instead.")
            file = replace(file, settings=file.settings.model_copy(update={"scheduler": "ddim"}))
        return file


@dataclass
class _Grids:
    """The grids of one sampling: made and written group by group; where a group fails, one by one, image by image.

    Attributes:
        together: images of each size, in pixels, that are sampled together.
        prefix: of the file names, behind step and index.
        made: indices of the grids that are written.
    """

    run: ObservedRun
    learner: Learner
    settings: SampleSettings
    prompts: Sequence[SamplePrompt]
    together: Mapping[tuple[int, int], int]
    prefix: str
    progress: WorkProgress
    made: set[int] = field(default_factory=set)

    def make(self) -> None:
        """Make all. A grid that fails is a warning.

        Raises:
            StopRequested: the run should stop.
        """
        groups = list(_groups(self.prompts))
        for number, group in enumerate(groups):

            def report(done: int, total: int, number: int = number) -> None:
                self.progress(number * total + done, len(groups) * total)

            self._try(group, report, together=self.together[_size_of(self.prompts[group[0]])])
            for index in group:
                problem = None if index in self.made else self._try([index], report, together=1)
                if problem is not None:
                    prompt = self.prompts[index]
                    self.run.journal.warn(
                        f"Sample {index} ({prompt.prompt[:60]!r}, {prompt.width} x {prompt.height}) of step "
                        f"{self.run.position.step} failed: {problem}. Training continues."
                    )

    def _try(self, indices: Sequence[int], progress: Callable[[int, int], None], *, together: int) -> str | None:
        """Make and write some grids, so many images together. Returns what went wrong, in words."""
        try:
            self._write(indices, progress, together)
        except FAILURES as problem:
            logger.debug("a grid of samples failed", exc_info=True)
            if is_out_of_memory(problem):
                return f"out of memory ({_in_words(problem)}); make it smaller"
            return _in_words(problem)
        return None

    def _write(self, indices: Sequence[int], progress: Callable[[int, int], None], together: int) -> None:
        from everydream_kit.models.sampling import sample_images

        model = self.learner.model
        images = iter(
            sample_images(
                model,
                [self.prompts[index] for index in indices],
                scheduler=self.settings.scheduler,
                num_inference_steps=self.settings.num_inference_steps,
                clip_skip=self.run.config.clip_skip,
                batch_size=together,
                progress=progress,
                encode=self.learner.encode_captions if has_large_texts(model.family) else None,
                capture=None if self.learner.graphs is None else CAPTURES[model.device.type](),
            )
        )
        for index in indices:
            self._write_grid(index, [next(images) for _ in self.prompts[index].cfgs], together)
            self.made.add(index)

    def _write_grid(self, index: int, row: Sequence[Image], together: int) -> None:
        from everydream_kit.models.sampling import label_grid, save_image

        run, step, prompt = self.run, self.run.position.step, self.prompts[index]
        grid = label_grid([row], column_labels=[f"cfg {cfg:g}" for cfg in prompt.cfgs], title=prompt.prompt)
        name = f"gs{step:05}-{index:03}-{self.prefix}{clean_for_file_name(prompt.prompt)}"
        path = run.folder.samples_folder / f"{name}.jpg"
        save_image(grid, path)
        write_atomic(
            path.with_suffix(".txt"),
            f"{prompt.prompt}\nnegative prompt: {prompt.negative_prompt}\nseed: {prompt.seed}\n",
        )
        run.journal.image(f"sample_{index:03}_{self.prefix}{clean_for_file_name(prompt.prompt)[:60]}", grid, step)
        run.journal.report(
            "sample",
            step=step,
            path=str(path),
            index=index,
            prompt=prompt.prompt,
            seed=prompt.seed,
            images_together=together,
        )


def _size_of(prompt: SamplePrompt) -> tuple[int, int]:
    """Width and height in pixels."""
    return prompt.width, prompt.height


def _groups(prompts: Sequence[SamplePrompt]) -> Iterator[list[int]]:
    """Indices of prompts of one size that are made together: about IMAGES_OF_A_GROUP images, in order."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_size.setdefault(_size_of(prompt), []).append(index)
    for indices in by_size.values():
        yield from cut(indices, lambda index: len(prompts[index].cfgs), IMAGES_OF_A_GROUP, at_most=True)


def _version_of(path: Path) -> tuple[Path, tuple[int, int] | None]:
    """What changes when a file is edited or exchanged; None as the second where there is none."""
    try:
        facts = path.stat()
    except (OSError, ValueError):  # not there, or no name that a file can have
        return path, None
    return path, (facts.st_mtime_ns, facts.st_size)


def _in_words(problem: Exception) -> str:
    """An error's first line, with its kind where the message alone would say little."""
    line = next(iter(str(problem).splitlines()), "").rstrip(".")
    return line if line and isinstance(problem, KitError | OSError) else f"{type(problem).__name__}: {line}"
