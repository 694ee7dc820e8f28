"""Settings that lie beside pictures: what a folder's or a picture's own files say.

One vocabulary for all of them: `local.yaml`, `global.yaml`, `.yaml` and `.json` beside a picture, entries of a
`.json` index, and the one-value files (`multiply.txt` ...). A `PictureSettings` holds what was said; what was not
stays None, so "off" in a folder can win over "on" above it. Later words win; tags add up.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from everydream_kit.data.captions import Caption, Tag, join_caption, parse_caption
from everydream_kit.data.textfiles import TextError, kind_of, require_text


@dataclass(frozen=True, slots=True)
class PictureSettings:
    """What settings files say. None, or no tags: nothing."""

    main_prompt: str | None = None
    tags: tuple[Tag, ...] = ()
    alternatives: tuple[Caption, ...] = ()
    rating: float | None = None
    max_caption_length: int | None = None
    multiply: float | None = None
    cond_dropout: float | None = None
    flip_p: float | None = None
    shuffle_tags: bool | None = None
    keep_tags: int | None = None
    batch_id: str | None = None
    loss_scale: float | None = None
    unknown: tuple[str, ...] = field(default=(), compare=False)

    def updated(self, later: PictureSettings) -> PictureSettings:
        """These settings with `later` words over them. Tags of both are kept, the later first."""
        values: dict[str, Any] = {}
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(later, item.name)
            if item.name == "tags":
                values[item.name] = merge_tags(theirs, mine)
            elif item.name == "unknown":
                values[item.name] = mine + theirs
            elif item.name == "alternatives":
                # they belong to the main prompt that they were written with
                values[item.name] = mine if later.main_prompt is None else theirs
            else:
                values[item.name] = mine if theirs is None else theirs
        return PictureSettings(**values)


def merge_tags(first: tuple[Tag, ...], second: tuple[Tag, ...]) -> tuple[Tag, ...]:
    """Both, each text once."""
    if not first or not second:
        return first or second
    seen = {tag.text for tag in first}
    return (*first, *(tag for tag in second if tag.text not in seen))


def settings_from_text(text: str) -> PictureSettings:
    """A caption text as settings: main prompt and tags. An empty text is the empty caption, and says so."""
    caption = parse_caption(text)
    return PictureSettings(main_prompt=caption.main_prompt, tags=caption.tags)


def parse_settings(values: Mapping[str, Any]) -> PictureSettings:
    """Understand a mapping from YAML or JSON. Unknown names are kept in `unknown`.

    Raises:
        TextError: a value is of the wrong type or out of range; the message names all of them.
    """
    found: dict[str, Any] = {}
    problems = []
    unknown = []
    for name, value in values.items():
        if name not in _READERS:
            unknown.append(name)
        elif value is not None or name in ("main_prompt", "caption"):
            try:
                found[name] = _READERS[name](value)
            except TextError as error:
                problems.append(f"{name}: {error}")
    if problems:
        raise TextError("; ".join(problems))
    caption = found.pop("caption", None)
    found.pop("image", None)
    settings = PictureSettings(**found, unknown=tuple(unknown))
    return settings if caption is None else settings.updated(_from_captions(caption))


def _from_captions(captions: list[Caption]) -> PictureSettings:
    first, *others = captions
    return PictureSettings(main_prompt=first.main_prompt, tags=first.tags, alternatives=tuple(others))


def nearest_setting(name: str) -> str | None:
    """The setting whose name looks most like this one."""
    return next(iter(difflib.get_close_matches(name.lower(), _READERS, n=1, cutoff=0.6)), None)


def _read_text(value: Any) -> str:
    if isinstance(value, (dict, list)):
        raise TextError(f"a text is expected, found a {kind_of(value)}")
    return require_text(" ".join(str(value).split())) if value is not None else ""


def _read_main_prompt(value: Any) -> str:
    """One text. EveryDream 2 lets a list stand here and takes its first."""
    if isinstance(value, list):
        if not value:
            return ""
        value = value[0]
    return _read_text(value)


def _read_captions(value: Any) -> list[Caption]:
    """One caption or a list of alternatives."""
    if isinstance(value, list):
        return [caption for item in value for caption in _read_captions(item)] or [Caption()]
    if isinstance(value, dict):
        inner = parse_settings(value)
        return [Caption(inner.main_prompt or "", inner.tags)]
    return [parse_caption(_read_text(value))]


def _read_tags(value: Any) -> tuple[Tag, ...]:
    """A list of texts and of {tag, weight}, or one text with commas."""
    if not isinstance(value, (list, dict)):
        return tuple(Tag(part) for text in _read_text(value).split(",") if (part := text.strip()))
    tags = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict):
            if not set(item) <= {"tag", "weight"} or "tag" not in item:
                raise TextError("a weighted tag has the form {tag: a red hat, weight: 2}")
            weight = 1.0 if item.get("weight") is None else _number(0.0, math.inf)(item["weight"])
            tags.append(Tag(_read_text(item["tag"]), weight))
        elif item is not None:
            tags.append(Tag(_read_text(item)))
    return tuple({tag.text: tag for tag in reversed(tags) if tag.text}.values())[::-1]


def _number(low: float, high: float) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not (low <= number <= high) or math.isinf(number):
            what = str(value)[:40] if isinstance(value, (str, int, float)) else f"a {kind_of(value)}"
            bound = f"from {low:.10g} to {high:.10g}" if not math.isinf(high) else f"of at least {low:.10g}"
            raise TextError(f"a number {bound} is expected, found {what}")
        return number

    return read


def _whole_number(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        number = _number(low, high)(value)
        if number != int(number):
            raise TextError(f"a whole number is expected, found {number:g}")
        return int(number)

    return read


def read_flag(value: Any) -> bool:
    """Understand a yes/no value as people write it.

    Raises:
        TextError: neither yes nor no.
    """
    word = str(value).strip().lower() if isinstance(value, (bool, str, int, float)) else ""
    if word in ("true", "yes", "on", "1", "1.0"):
        return True
    if word in ("false", "no", "off", "0", "0.0"):
        return False
    raise TextError(f"true or false is expected, found {word[:40] or 'a ' + kind_of(value)}")


MAX_MULTIPLY = 10_000
"""Uses of one picture per epoch; beyond it a slip of the keyboard is likelier than a wish."""

_READERS: dict[str, Callable[[Any], Any]] = {
    "main_prompt": _read_main_prompt,
    "tags": _read_tags,
    "caption": _read_captions,
    "image": _read_text,
    "rating": _number(0, 1e6),
    "max_caption_length": _whole_number(1, 1_000_000),
    "multiply": _number(0, MAX_MULTIPLY),
    "cond_dropout": _number(0, 1),
    "flip_p": _number(0, 1),
    "shuffle_tags": read_flag,
    "keep_tags": _whole_number(0, 10_000),
    "batch_id": _read_text,
    "loss_scale": _number(0, 1e6),
}

ONE_VALUE_FILES = (
    "multiply.txt",
    "cond_dropout.txt",
    "flip_p.txt",
    "shuffle_tags.txt",
    "batch_id.txt",
    "loss_scale.txt",
)


def parse_one_value(file_name: str, text: str) -> PictureSettings:
    """Understand a one-value file by its name. An empty `shuffle_tags.txt` means yes.

    Raises:
        TextError: the value is of the wrong type or out of range.
    """
    name = file_name.rpartition(".")[0]
    text = text.strip()
    if name == "shuffle_tags" and not text:
        text = "true"
    return PictureSettings(**{name: _READERS[name](text)})


def caption_of(settings: PictureSettings, fallback: Caption) -> tuple[Caption, bool]:
    """The caption that settings and the file name make together.

    Tags are put in order of weight, heavy first, where weights differ.

    Args:
        settings: all that was said, folder and picture.
        fallback: from the file name, for where nobody gave a main prompt.

    Returns:
        The caption, and whether it is more than the plain text of itself (weights or alternatives).
    """
    if settings.main_prompt is None:
        main, tags = fallback.main_prompt, merge_tags(fallback.tags, settings.tags)
    else:
        main, tags = settings.main_prompt, settings.tags
    tags = tuple(sorted(tags, key=lambda tag: -tag.weight))
    caption = Caption(main, tags, None, settings.alternatives)
    is_plain = not settings.alternatives and all(tag.weight == 1.0 for tag in tags)
    is_plain = is_plain and parse_caption(join_caption(main, [tag.text for tag in tags])) == caption
    return caption, not is_plain
