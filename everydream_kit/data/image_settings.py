"""Settings that lie next to images: what the files of a folder or an image set.

One vocabulary for all of them: `local.yaml`, `global.yaml`, `.yaml` and `.json` next to an image, entries of a
`.json` index, and the one-value files (`multiply.txt` ...). An `ImageSettings` holds what was set; what was not
stays None, so "off" in a folder can win over "on" above it. Later words win; tags add up. Null and an empty value in
YAML and JSON mean "not given" everywhere: the next source holds.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from everydream_kit.data.captions import Caption, Tag, combine_captions, join_caption, parse_caption
from everydream_kit.data.textfiles import TextError, kind_of, require_text


class Note(NamedTuple):
    """Something in a settings file that is used, but not the way it suggests."""

    cause: str
    cure: str


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """What settings files say. None, or no tags: nothing.

    Attributes:
        weighted: texts of the tags whose weight was given explicitly.
        unknown: names that no setting has.
        notes: what else to report about the file.
    """

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
    weighted: frozenset[str] = field(default=frozenset(), compare=False)
    unknown: tuple[str, ...] = field(default=(), compare=False)
    notes: tuple[Note, ...] = field(default=(), compare=False)

    def updated(self, later: ImageSettings) -> ImageSettings:
        """These settings with `later` words over them. Tags of both are kept, the later first.

        Of a tag that both hold, the weight counts that is given explicitly; of two explicit ones, the later.
        """
        values: dict[str, Any] = {}
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(later, item.name)
            if item.name == "tags":
                explicit = self.weighted - later.weighted
                values[item.name] = merge_tags(theirs, mine, explicit)
            elif item.name == "weighted":
                values[item.name] = mine | theirs
            elif item.name in ("unknown", "notes"):
                values[item.name] = mine + theirs
            elif item.name == "alternatives":
                # they belong to the main prompt that they were written with
                values[item.name] = mine if later.main_prompt is None else theirs
            else:
                values[item.name] = mine if theirs is None else theirs
        return ImageSettings(**values)


def merge_tags(
    first: tuple[Tag, ...], second: tuple[Tag, ...], explicit: frozenset[str] = frozenset()
) -> tuple[Tag, ...]:
    """Both, each text once. Tags of `first` whose text is in `explicit` take the weight that `second` gives."""
    if not first or not second:
        return first or second
    if explicit:
        weights = {tag.text: tag.weight for tag in second if tag.text in explicit}
        first = tuple(Tag(tag.text, weights.get(tag.text, tag.weight)) for tag in first)
    seen = {tag.text for tag in first}
    return (*first, *(tag for tag in second if tag.text not in seen))


def settings_from_text(text: str) -> ImageSettings:
    """A caption text as settings: main prompt and tags. An empty text is the empty caption, explicitly."""
    return settings_of(parse_caption(text))


def settings_of(caption: Caption) -> ImageSettings:
    """A caption, with its alternatives, as settings."""
    return ImageSettings(main_prompt=caption.main_prompt, tags=caption.tags, alternatives=caption.alternatives)


def parse_settings(values: Mapping[str, Any]) -> ImageSettings:
    """Understand a mapping from YAML or JSON. Unknown names are kept in `unknown`.

    Raises:
        TextError: a value is of the wrong type or out of range; the message names all of them.
    """
    found: dict[str, Any] = {}
    problems: list[str] = []
    notes = [_repeated(name) for name in getattr(values, "repeated", ())]
    unknown = []
    for name, value in values.items():
        if name not in _READERS and name not in ("tags", "caption"):
            unknown.append(name)
        elif value is None:
            continue
        else:
            try:
                found[name] = _read_words(name, value, notes) if name in ("tags", "caption") else _READERS[name](value)
            except TextError as error:
                problems.append(f"{name}: {error}")
    if problems:
        raise TextError("; ".join(problems))
    found.pop("image", None)
    caption = found.pop("caption", ImageSettings())
    tags = found.pop("tags", ImageSettings())
    notes += [*_cautions(found), *_dropped_prompts(values.get("main_prompt"))]
    own = ImageSettings(**found, tags=tags.tags, weighted=tags.weighted, unknown=tuple(unknown), notes=tuple(notes))
    return own.updated(caption)


def _repeated(name: str) -> Note:
    return Note(f"{name}: given twice; the last value is used", "Keep one of them.")


def _dropped_prompts(value: Any) -> list[Note]:
    """A note on main prompts after the first, which EveryDream 2 drops, too."""
    given = [item for item in value if item is not None] if isinstance(value, list) else []
    if len(given) < 2:
        return []
    cause = f"main_prompt: of {len(given)} texts only the first is used"
    return [Note(cause, "Write them as a list under caption: one of them is then drawn for each use.")]


def _cautions(found: Mapping[str, Any]) -> list[Note]:
    """Notes on values that are allowed and risky."""
    if found.get("loss_scale") is None or found["loss_scale"] >= 0:
        return []
    return [
        Note(
            f"loss_scale: {found['loss_scale']:g} is negative, so the model unlearns these images",
            "Use it with extreme caution and few steps: it can destroy the model. Remove it if it is not intended.",
        )
    ]


def _read_words(name: str, value: Any, notes: list[Note]) -> ImageSettings:
    """What `tags` or `caption` says; notes are appended."""
    if name == "tags":
        return _read_tags(value, notes)
    captions = _read_captions(value, notes)
    return settings_of(combine_captions(captions)) if captions else ImageSettings()


def nearest_setting(name: str) -> str | None:
    """The setting whose name looks most like this one."""
    names = [*_READERS, "tags", "caption"]
    return next(iter(difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.6)), None)


def _read_text(value: Any) -> str:
    if isinstance(value, (dict, list)):
        raise TextError(f"a text is expected, found a {kind_of(value)}")
    return require_text(" ".join(str(value).split())) if value is not None else ""


def _read_main_prompt(value: Any) -> str | None:
    """One text. EveryDream 2 lets a list stand here and takes its first."""
    if isinstance(value, list):
        if not value:
            return ""
        value = next((item for item in value if item is not None), None)
    return None if value is None else _read_text(value)


def _read_captions(value: Any, notes: list[Note]) -> list[Caption]:
    """One caption or a list of alternatives. None at all where only null is given."""
    if value is None:
        return []
    if isinstance(value, list):
        captions = [caption for item in value for caption in _read_captions(item, notes)]
        return captions if captions or value else [Caption()]
    if isinstance(value, dict):
        inner = parse_settings(value)
        notes += inner.notes
        is_given = inner.main_prompt is not None or bool(inner.tags)
        return [Caption(inner.main_prompt or "", inner.tags)] if is_given or not value else []
    return [parse_caption(_read_text(value))]


def _read_tags(value: Any, notes: list[Note]) -> ImageSettings:
    """A list of texts and of {tag, weight}, or one text with commas. Each text once; an explicit weight counts."""
    if not isinstance(value, (list, dict)):
        texts = (part for text in _read_text(value).split(",") if (part := text.strip()))
        return ImageSettings(tags=tuple(Tag(text) for text in dict.fromkeys(texts)))
    weights: dict[str, float | None] = {}
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict):
            text, weight = _read_weighted(item, notes)
        else:
            text, weight = ("" if item is None else _read_text(item)), None
        if text and weights.get(text) is None:
            weights[text] = weight
    return ImageSettings(
        tags=tuple(Tag(text, 1.0 if weight is None else weight) for text, weight in weights.items()),
        weighted=frozenset(text for text, weight in weights.items() if weight is not None),
    )


def _read_weighted(item: Mapping[str, Any], notes: list[Note]) -> tuple[str, float | None]:
    """Text and weight of a {tag, weight}; the weight is None where it is not given."""
    if "tag" not in item:
        raise TextError(_WEIGHTED_FORM)
    text = "" if item["tag"] is None else _read_text(item["tag"])
    notes += [_repeated(f"tags, {text or 'null'}, {name}") for name in getattr(item, "repeated", ())]
    for name in item:
        if name not in ("tag", "weight"):
            notes.append(
                Note(f"tags: {text or 'null'} has an unknown key {name[:60]!r}", f"{_WEIGHTED_FORM.capitalize()}.")
            )
    weight = item.get("weight")
    if weight is None:
        return text, None
    try:
        return text, _number(0.0, math.inf)(weight)
    except TextError as error:
        negative = _is_negative(weight)
        used = "0 (named last)" if negative else "1"
        notes.append(Note(f"tags: the weight of {text}: {error}; {used} is used", "Correct the weight."))
        return text, 0.0 if negative else None


_WEIGHTED_FORM = "a weighted tag has the form {tag: a red hat, weight: 2}"


def _is_negative(value: Any) -> bool:
    try:
        return float(value) < 0
    except (TypeError, ValueError, OverflowError):
        return False


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


def _integer(low: int, high: int) -> Callable[[Any], int]:
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
"""Uses of one image per epoch; beyond it a slip of the keyboard is likelier than a wish."""

MIN_LOSS_SCALE = -1.0
"""Negative values drive the model away from an image, without any limit to where; never faster than it learns others."""

_READERS: dict[str, Callable[[Any], Any]] = {
    "main_prompt": _read_main_prompt,
    "image": _read_text,
    "rating": _number(0, 1e6),
    "max_caption_length": _integer(1, 1_000_000),
    "multiply": _number(0, MAX_MULTIPLY),
    "cond_dropout": _number(0, 1),
    "flip_p": _number(0, 1),
    "shuffle_tags": read_flag,
    "keep_tags": _integer(0, 10_000),
    "batch_id": _read_text,
    "loss_scale": _number(MIN_LOSS_SCALE, 1e6),
}


def parse_one_value(file_name: str, text: str) -> ImageSettings:
    """Understand a one-value file by its name. An empty `shuffle_tags.txt` means yes; of others, "not given".

    Raises:
        TextError: the value is of the wrong type or out of range.
    """
    name = file_name.rpartition(".")[0]
    text = text.strip()
    if not text and name != "shuffle_tags":
        return ImageSettings(notes=(Note("the file is empty, so it sets nothing", "Write a value, or delete it."),))
    found = {name: _READERS[name](text or "true")}
    return ImageSettings(**found, notes=tuple(_cautions(found)))


def caption_of(settings: ImageSettings, fallback: Caption) -> tuple[Caption, bool]:
    """The caption that settings and the file name make together.

    Tags are put in order of weight, heavy first, where weights differ.

    Args:
        settings: all that was set, for folder and image.
        fallback: from the file name, for where nobody gave a main prompt.

    Returns:
        The caption, and whether it is more than the plain text of itself (weights or alternatives).
    """
    if settings.main_prompt is None:
        main, tags = fallback.main_prompt, merge_tags(fallback.tags, settings.tags, settings.weighted)
    else:
        main, tags = settings.main_prompt, settings.tags
    tags = tuple(sorted(tags, key=lambda tag: -tag.weight))
    caption = Caption(main, tags, None, settings.alternatives)
    is_plain = not settings.alternatives and all(tag.weight == 1.0 for tag in tags)
    is_plain = is_plain and parse_caption(join_caption(main, [tag.text for tag in tags])) == caption
    return caption, not is_plain
