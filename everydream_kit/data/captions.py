"""Captions: what an image's text is, and what of it the text encoder reads in one epoch.

A caption is a main prompt (up to the first comma) and tags (the rest), each tag with a weight. `compose_caption`
turns it into text with a generator of its own address, so every image, epoch and repeat is shuffled differently.
Where a caption comes from (sidecar files, settings, the file name) is `scanning`'s and `image_settings`'s business;
conditional dropout is the loader's.

In a `Dataset` a caption is kept as short as possible: as the text it was written in, or as JSON where it is more than
text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Tag(NamedTuple):
    """One tag of a caption; heavier ones are named earlier more often when tags are shuffled."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Caption:
    """One caption, or several of which one is drawn for each use.

    Attributes:
        main_prompt: always first, never shuffled or cut.
        tags: in the order written (heavier ones first, where weights differ).
        max_length: in characters; whole tags that would go beyond it are skipped. None: no limit.
        alternatives: further captions; `main_prompt` and `tags` are then the first of them.
    """

    main_prompt: str = ""
    tags: tuple[Tag, ...] = ()
    max_length: int | None = None
    alternatives: tuple[Caption, ...] = ()

    @property
    def text(self) -> str:
        """The caption as written, unshuffled and uncut."""
        return join_caption(self.main_prompt, [tag.text for tag in self.tags])

    @property
    def choices(self) -> tuple[Caption, ...]:
        """Every caption that may be drawn, this one first."""
        return (self, *self.alternatives)


def join_caption(main_prompt: str, tags: Sequence[str]) -> str:
    """Main prompt and tags with commas between; empty parts leave no comma behind."""
    return ", ".join(part for part in (main_prompt, *tags) if part)


def parse_caption(text: str, max_length: int | None = None) -> Caption:
    """Read a caption from one text: line ends count as spaces, the part up to the first comma is the main prompt.

    Repeated and empty tags are kept out. `""` gives the empty caption.
    """
    main_prompt, *rest = (" ".join(part.split()) for part in text.split(","))
    return Caption(main_prompt, tuple(Tag(tag) for tag in dict.fromkeys(rest) if tag), max_length)


def parse_caption_lines(text: str, max_length: int | None = None) -> Caption:
    """Read one caption from each line that is not blank; they become alternatives."""
    return combine_captions([parse_caption(line, max_length) for line in text.splitlines() if line.strip()])


def combine_captions(captions: Sequence[Caption]) -> Caption:
    """Make one caption of several alternatives. No caption at all gives the empty one."""
    if not captions:
        return Caption()
    first, *others = captions
    return Caption(first.main_prompt, first.tags, first.max_length, tuple(others))


def caption_from_file_name(name: str) -> Caption:
    """`a red car, at night_0012.jpg` -> the part up to the first underscore, without the extension."""
    return parse_caption(readable(name.rpartition("/")[2].rpartition(".")[0].split("_")[0]))


_CAMERA_NAME = re.compile(
    r"(im(g|age?s?)|dsc[fn]?|sam|pxl|mvimg|pano|gopr|dji|dcim|p|photo|pic(ture)?|screenshot|snapshot|scan|download|frame"
    r"|unnamed|untitled|whatsapp image|file|foto|bild|[0-9a-f]{8,}(-[0-9a-f]{4,})*)?[-. ()\d]*",
    re.IGNORECASE,
)
"""What cameras, phones and downloads call images; letters of a hash count, too."""


def is_camera_name(caption: str) -> bool:
    """Whether a caption that comes from a file name describes nothing: `IMG`, `DSC`, a number, a hash."""
    return _CAMERA_NAME.fullmatch(caption) is not None


def readable(name: str) -> str:
    """A file name as text. One that is no UTF-8 comes from an old Windows, as a rule: it is read as Windows-1252."""
    if name.isascii() or not any("\udc80" <= letter <= "\udcff" for letter in name):
        return name
    return name.encode("utf-8", "surrogateescape").decode("cp1252", "replace")


def compose_caption(caption: Caption, generator: np.random.Generator, shuffle: bool = False, keep_tags: int = 0) -> str:
    """The text that the encoder reads for one use of an image.

    With alternatives, one is drawn. Then tags are shuffled: the first `keep_tags` stay in front, the others are drawn
    without replacement, heavier ones sooner (Efraimidis & Spirakis 2006, exponential keys); equal weights give every
    order the same chance. At last whole tags are dropped from the end of what would go beyond `max_length`.

    Args:
        caption: of the image.
        generator: addressed by (seed, "caption", epoch, image key, repeat).
        shuffle: shuffle the tags.
        keep_tags: this many tags stay in place.

    Returns:
        Main prompt and tags, joined by commas; "" for the empty caption.
    """
    if caption.alternatives:
        choices = caption.choices
        caption = choices[int(generator.integers(len(choices)))]
    tags = list(caption.tags)
    if shuffle and len(tags) > keep_tags:
        kept, loose = tags[:keep_tags], tags[keep_tags:]
        arrivals = generator.exponential(size=len(loose)) / [max(tag.weight, 1e-9) for tag in loose]
        tags = kept + [loose[i] for i in np.argsort(arrivals, kind="stable")]
    return join_caption(caption.main_prompt, _fit(caption.main_prompt, [tag.text for tag in tags], caption.max_length))


def _fit(main_prompt: str, tags: list[str], max_length: int | None) -> list[str]:
    """The longest head of `tags` whose caption stays within `max_length` characters."""
    if max_length is None:
        return tags
    length = len(main_prompt)
    for count, tag in enumerate(tags):
        length += len(tag) + (2 if length else 0)
        if length > max_length:
            return tags[:count]
    return tags


def encode_caption(caption: Caption) -> str:
    """A caption as compact JSON, for the dataset's table. `decode_caption` reads it back."""
    return json.dumps([[c.main_prompt, *map(_encode_tag, c.tags)] for c in caption.choices], ensure_ascii=False)


def decode_caption(text: str, max_length: int | None = None) -> Caption:
    """Read what `encode_caption` wrote."""
    return combine_captions(
        [Caption(main, tuple(map(_decode_tag, tags)), max_length) for main, *tags in json.loads(text)]
    )


def _encode_tag(tag: Tag) -> str | list[str | float]:
    return tag.text if tag.weight == 1.0 else [tag.text, tag.weight]


def _decode_tag(value: str | list[str | float]) -> Tag:
    return Tag(value) if isinstance(value, str) else Tag(str(value[0]), float(value[1]))
