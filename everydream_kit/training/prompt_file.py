"""The prompt file: what is sampled while training. Reading it, and naming what is wrong in it.

A `.json` holds EveryDream 2's object: `cfgs`, `scheduler`, `num_inference_steps`, `seed`, `resolution`, `batch_size`,
`generate_samples_every_n_steps`, `generate_pretrain_samples` and `samples`, a list of `{prompt, negative_prompt, seed, size,
aspect_ratio, random_caption, cfgs}`; null means "not given", and `#` comments are allowed, as its own file has them. Any other
file holds one prompt a line.

People edit this file while a run trains, so a mistake costs as little as possible: a wrong value of a sample costs that sample,
any other wrong value is replaced by its default, and each is a problem that the caller reports. Only a file that cannot be read
at all is an error.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from everydream_kit.config.sample_settings import Cfgs, SampleGroup
from everydream_kit.data.textfiles import TextError, read_text, require_text
from everydream_kit.errors import ConfigError
from everydream_kit.models.family import SamplerSpec
from everydream_kit.models.sampling_schedulers import sampler_by_name
from everydream_kit.strict_json import parse_json

LARGEST_SIDE = 4096
"""Of a sample, in pixels: SDXL's largest bucket at twice its resolution."""
MOST_SAMPLES = 1000
"""Read from one file: more would take longer than any training between two samplings."""
MOST_TOGETHER = 4
"""Images that `auto` samples together at most: from there on a GPU is busy, and more take as much longer."""
PIXELS_TOGETHER = 1024 * 1024
"""What `auto` samples together where a training batch has fewer pixels: enough to keep a GPU busy."""
STABLE_DIFFUSION = SamplerSpec()
DOCUMENTATION = ("doc", "documentation", "comment")

Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
"""What torch's generator takes; -1 is another one at each sampling."""
Side = Annotated[int, Field(ge=64, le=LARGEST_SIDE, multiple_of=8)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


class SampleEntry(BaseModel):
    """One entry of `samples`. None: the file's value holds."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    prompt: str = ""
    negative_prompt: str = ""
    seed: Seed | None = None
    size: Annotated[list[Side], Field(min_length=2, max_length=2)] | None = None
    aspect_ratio: Annotated[float, Field(gt=0, le=100)] | None = None
    random_caption: bool = False
    cfgs: Cfgs | None = None

    _one_cfg = field_validator("cfgs", mode="before")(_as_list)
    _text = field_validator("prompt", "negative_prompt")(require_text)


class SampleSettings(BaseModel):
    """The whole prompt file. Field names are EveryDream 2's; `show_progress_bars` is accepted and has no effect.

    What the file does not give comes from the run's settings (`sample_cfgs`, ...).
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    cfgs: Cfgs
    scheduler: str
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)]
    seed: Seed | None = None
    resolution: Side | None = None
    batch_size: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"]
    show_progress_bars: bool = False
    generate_samples_every_n_steps: Annotated[int, Field(ge=0)] | None = None
    generate_pretrain_samples: bool = False
    samples: list[SampleEntry] = []

    _one_cfg = field_validator("cfgs", mode="before")(_as_list)

    @classmethod
    def of(cls, settings: SampleGroup, sampler: SamplerSpec = STABLE_DIFFUSION) -> SampleSettings:
        """What holds where there is no prompt file. Nothing of it counts as set, so that a file is written as it was.

        Args:
            sampler: of the model's family, whose usual values stand for what is not given.
        """
        return cls.model_construct(
            _fields_set=set(),
            cfgs=settings.sample_cfgs or list(sampler.cfgs),
            scheduler=settings.sample_scheduler,
            num_inference_steps=settings.sample_num_inference_steps or sampler.num_steps,
            seed=settings.sample_seed,
            resolution=settings.sample_resolution,
            batch_size=settings.sample_batch_size,
        )

    def images_together(self, width: int, height: int, trained_pixels: int) -> int:
        """Images of this size that are sampled together.

        With as many pixels as a training batch has, samples hold less than a step does: guidance doubles them, but nothing is
        kept for a backward pass.

        Args:
            trained_pixels: of a training batch.
        """
        if self.batch_size != "auto":
            return self.batch_size
        return max(1, min(MOST_TOGETHER, max(PIXELS_TOGETHER, trained_pixels) // (width * height)))

    @field_validator("scheduler")
    @classmethod
    def _check_scheduler(cls, name: str) -> str:
        try:
            sampler_by_name(name)
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("scheduler: ").rstrip(".")) from error
        return name


@dataclass(frozen=True)
class PromptFile:
    """What a prompt file holds.

    Attributes:
        settings: what can be used of it.
        problems: what cannot, and what is done instead, one sentence each.
        num_skipped: entries of `samples` that cannot be used.
    """

    settings: SampleSettings
    problems: tuple[str, ...] = ()
    num_skipped: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether it names samples, and not one of them can be used."""
        return bool(self.num_skipped) and not self.settings.samples


def sampled_texts(group: SampleGroup) -> list[str]:
    """The texts, apart from captions of the dataset, that a run's samples need encoded, as its prompt file is now.

    A file that cannot be used is reported where it is sampled from.
    """
    if group.sample_steps is None:
        return []
    texts = [text for entry in prompts_of(group).settings.samples for text in (entry.prompt, entry.negative_prompt)]
    return list(dict.fromkeys(texts or [""]))


def prompts_of(group: SampleGroup, sampler: SamplerSpec = STABLE_DIFFUSION) -> PromptFile:
    """The prompt file as training would use it; the settings alone where there is none, or it cannot be read."""
    path, defaults = Path(group.sample_prompts), SampleSettings.of(group, sampler)
    if group.sample_steps is None or not path.is_file():
        return PromptFile(defaults)
    try:
        return read_prompt_file(path, defaults)
    except ConfigError as error:
        return PromptFile(defaults, (str(error).removeprefix(f"sample_prompts: {path}: "),))


def read_prompt_file(path: Path, defaults: SampleSettings) -> PromptFile:
    """Read a prompt file, as far as it can be used.

    Args:
        defaults: what holds where the file says nothing, or something wrong.

    Raises:
        ConfigError: it is not there, is not text, or its JSON is invalid or not an object; the message names line and
            column.
    """
    try:
        if not path.is_file():
            raise ConfigError(f"sample_prompts: {path} is not there.")
        text = read_text(path)
        if path.suffix.lower() != ".json":
            return _from_lines(text, defaults)
        values = parse_json(_without_comments(text), f"sample_prompts: {path}", error=ConfigError)
    except OSError as error:
        raise ConfigError(f"sample_prompts: {path} cannot be read: {error.strerror or error}.") from error
    except TextError as error:
        raise ConfigError(f"sample_prompts: {path}: {error}.") from error
    return _from_object(values, defaults)


def _from_lines(text: str, defaults: SampleSettings) -> PromptFile:
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    problems = _too_many(len(prompts))
    samples = [SampleEntry(prompt=prompt) for prompt in prompts[:MOST_SAMPLES]]
    return PromptFile(defaults.model_copy(update={"samples": samples}), problems)


def _from_object(values: dict[str, Any], defaults: SampleSettings) -> PromptFile:
    entries = values.get("samples")
    others, problems = _usable({key: value for key, value in values.items() if key != "samples"}, defaults)
    if entries is not None and not isinstance(entries, list):
        problems.append(
            f"samples: must be a list (got {_shown(entries)}); captions of the dataset are sampled instead."
        )
        entries = None
    samples, num_skipped = [], 0
    for index, entry in enumerate((entries or [])[:MOST_SAMPLES]):
        sample, wrong = _entry(entry, f"samples.{index}")
        problems += wrong
        if sample is None:
            num_skipped += 1
        else:
            samples.append(sample)
    problems += _too_many(len(entries or []))
    return PromptFile(others.model_copy(update={"samples": samples}), tuple(problems), num_skipped)


def _usable(values: dict[str, Any], defaults: SampleSettings) -> tuple[SampleSettings, list[str]]:
    """The file's own values over the defaults; a wrong one is left at its default."""
    given, problems = _known(values, SampleSettings, "")
    plain = defaults.model_dump()
    try:
        return _with_given(defaults, given), problems
    except ValidationError as error:
        wrong = _by_name(error)
    for name, message in wrong.items():
        instead = "the run's own value" if plain[name] is None else _shown(plain[name])
        problems.append(f"{name}: {message}; {instead} is used instead.")
    right = {name: value for name, value in given.items() if name not in wrong}
    return _with_given(defaults, right), problems


def _with_given(defaults: SampleSettings, given: dict[str, Any]) -> SampleSettings:
    """The defaults with the file's own values, which alone count as set."""
    checked = SampleSettings.model_validate({**defaults.model_dump(), **given})
    return defaults.model_copy(update={name: getattr(checked, name) for name in given})


def _entry(entry: Any, place: str) -> tuple[SampleEntry | None, list[str]]:
    """One sample, or None where it cannot be used."""
    if isinstance(entry, str):
        entry = {"prompt": entry}
    if not isinstance(entry, dict):
        return None, [f"{place}: must be an object {{...}} (got {_shown(entry)}); this sample is skipped."]
    given, problems = _known(entry, SampleEntry, f"{place}.")
    if problems and "prompt" not in given and not given.get("random_caption"):
        return None, [*problems, f"{place}: has no prompt; this sample is skipped."]
    try:
        return SampleEntry.model_validate(given), problems
    except ValidationError as error:
        wrong = [f"{place}.{name}: {message}; this sample is skipped." for name, message in _by_name(error).items()]
        return None, problems + wrong


def _known(values: dict[str, Any], schema: type[BaseModel], place: str) -> tuple[dict[str, Any], list[str]]:
    """What was given and is known; the rest is named. Null means "not given", as in EveryDream 2's files."""
    given, problems = {}, []
    for name, value in values.items():
        if value is None or name in DOCUMENTATION:
            continue
        if name in schema.model_fields:
            given[name] = value
            continue
        near = difflib.get_close_matches(name.lower(), list(schema.model_fields), n=1)
        problems.append(f"{place}{name}: unknown setting, not used" + (f"; did you mean {near[0]}?" if near else "."))
    return given, problems


def _by_name(error: ValidationError) -> dict[str, str]:
    """What is wrong with each field, in words; the first problem of each."""
    wrong: dict[str, str] = {}
    for problem in error.errors():
        name = str(problem["loc"][0])
        message = problem["msg"].replace("Input should be", "must be").removeprefix("Value error, ")
        shown = "" if problem["type"] == "value_error" else f" (got {_shown(problem['input'])})"
        wrong.setdefault(name, f"{message}{shown}")
    return wrong


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _too_many(number: int) -> tuple[str, ...]:
    if number <= MOST_SAMPLES:
        return ()
    return (f"samples: the first {MOST_SAMPLES:,} of {number:,} are used.",)


def _without_comments(text: str) -> str:
    """JSON with its `#` and `//` comments blanked out; lines and columns stay."""
    return re.sub(
        r'"(?:\\.|[^"\\\n])*"|#[^\n]*|//[^\n]*',
        lambda found: found[0] if found[0].startswith('"') else " " * len(found[0]),
        text,
    )
