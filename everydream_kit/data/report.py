"""What a person should know of a dataset before GPU time is spent.

`make_report` gathers it into a `DatasetReport` of plain values: `text` is for people, `to_json()` for programs.
Charts are in `dataset_charts`. Tokens are counted by a function that the caller gives, since this layer does not know
tokenizers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from everydream_kit.data.buckets import assign_buckets, bucket_table, upscale_needed
from everydream_kit.data.dataset import FROM_FILE_NAME, Dataset
from everydream_kit.data.duplicates import find_duplicates
from everydream_kit.data.epoch_plan import PlanSettings, plan_epoch
from everydream_kit.data.reading_problems import Problem
from everydream_kit.data.records import Size
from everydream_kit.plain_text import printable

CLIP_WINDOW = 75
"""Tokens of a caption that CLIP text encoders read, start and end mark not counted."""

NUM_TAGS = 50
"""Most frequent tags that a report lists."""

NUM_LINES = 10
"""Lines of each kind that `text` shows; `to_json` has all."""
NUM_CHARACTERS = 160
"""Of a caption in `text`: captions may be pages long."""


@dataclass(frozen=True)
class BucketFill:
    """A bucket in the first epoch.

    Attributes:
        size: (width, height) in pixels.
        num_images: uses of images.
        num_batches: of them, how many batches.
        fullness: num_images over what those batches could hold.
    """

    size: Size
    num_images: int
    num_batches: int
    fullness: float


@dataclass(frozen=True)
class Undersized:
    """An image that must be enlarged to fill its bucket."""

    path: str
    size: Size
    bucket: Size
    upscale: float


@dataclass(frozen=True)
class LongCaption:
    """A caption that is longer than the text encoder's window. `cut` is what it would not read."""

    path: str
    num_tokens: int
    cut: str


@dataclass(frozen=True)
class CaptionCounts:
    """How many images take their caption from where.

    Attributes:
        from_file_name: nobody gave a caption.
        empty: the caption is the empty text.
        repeated: captions that several images share, with how many; the commonest first.
    """

    from_file_name: int
    empty: int
    repeated: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class DatasetReport:
    """See the attributes' own classes. Paths are absolute.

    Attributes:
        roots: folders that were scanned.
        dataset_size: that can be used.
        num_images: uses in the first epoch, after multipliers.
        num_steps: optimizer steps of the first epoch.
        batch_size: over all ranks, that `buckets` were counted at.
        buckets: by width over height.
        undersized: the worst first.
        skipped: files that are skipped.
        notes: files that are used, but not the way their settings suggest.
        exact_duplicates, near_duplicates: groups of paths.
        captions: counts.
        long_captions: the longest first; None: nobody counted.
        tags: the most frequent, with the number of images.
    """

    roots: tuple[str, ...]
    dataset_size: int
    num_images: int
    num_steps: int
    batch_size: int
    buckets: tuple[BucketFill, ...]
    undersized: tuple[Undersized, ...]
    skipped: tuple[Problem, ...]
    notes: tuple[Problem, ...]
    exact_duplicates: tuple[tuple[str, ...], ...]
    near_duplicates: tuple[tuple[str, ...], ...]
    captions: CaptionCounts
    long_captions: tuple[LongCaption, ...] | None
    tags: tuple[tuple[str, int], ...]

    def to_json(self) -> dict[str, Any]:
        """All of it as lists, dicts, numbers and texts, for `json.dumps`."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @property
    def text(self) -> str:
        """All of it for people, long lists cut."""
        return "\n".join(_lines(self))


def make_report(
    dataset: Dataset,
    settings: PlanSettings,
    *,
    near_duplicates: bool = True,
    count_tokens: Callable[[str], int] | None = None,
    max_tokens: int = CLIP_WINDOW,
    progress: Callable[[int], None] | None = None,
) -> DatasetReport:
    """Look through a dataset.

    Args:
        dataset: the images.
        settings: batch size and resolutions that it will be trained at.
        near_duplicates: look for images that look alike, which decodes every one, and so finds broken ones, too.
        count_tokens: the number of tokens of a text, without start and end mark; None: long captions are not looked for.
        max_tokens: the text encoder's window.
        progress: called with the number of images decoded so far.
    """
    duplicates = find_duplicates(dataset, near=near_duplicates, progress=progress)
    buckets, num_images, num_steps = fill_buckets(dataset, settings)
    captions, tags, long_captions = _check_captions(dataset, count_tokens, max_tokens)

    def paths(groups: tuple[tuple[int, ...], ...]) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(printable(dataset.path(index)) for index in group) for group in groups)

    return DatasetReport(
        roots=tuple(map(printable, dataset.roots)),
        dataset_size=len(dataset),
        num_images=num_images,
        num_steps=num_steps,
        batch_size=settings.batch_size * settings.num_ranks,
        buckets=buckets,
        undersized=find_undersized(dataset, settings),
        skipped=(*(p for p in dataset.problems if p.skipped), *duplicates.unreadable),
        notes=tuple(p for p in dataset.problems if not p.skipped),
        exact_duplicates=paths(duplicates.exact),
        near_duplicates=paths(duplicates.near),
        captions=captions,
        long_captions=long_captions,
        tags=tags,
    )


def fill_buckets(dataset: Dataset, settings: PlanSettings) -> tuple[tuple[BucketFill, ...], int, int]:
    """Buckets, images and steps of the first epoch; nothing where no image is left."""
    if not np.any(dataset.numbers["multiply"] > 0):
        return (), 0, 0
    plan = plan_epoch(dataset, settings, 0)
    images = np.bincount(plan.batch_bucket, np.diff(plan.batch_starts), len(plan.buckets)).astype(int).tolist()
    batches = np.bincount(plan.batch_bucket, minlength=len(plan.buckets)).tolist()
    full = settings.batch_size * settings.num_ranks
    fills = [
        BucketFill(size, images[i], batches[i], images[i] / (batches[i] * full))
        for i, size in enumerate(plan.buckets)
        if batches[i]
    ]
    return tuple(sorted(fills, key=lambda b: (b.size[0] / b.size[1], b.size))), plan.num_images, plan.num_steps


def find_undersized(dataset: Dataset, settings: PlanSettings) -> tuple[Undersized, ...]:
    """Images that are enlarged even for the smallest resolution, the worst first."""
    table = bucket_table(min(settings.resolutions), settings.bucket_step)
    widths, heights = dataset.numbers["width"], dataset.numbers["height"]
    buckets = np.array(table)[assign_buckets(widths, heights, table)]
    scales = upscale_needed(widths, heights, buckets[:, 0], buckets[:, 1])
    worst_first = np.argsort(-scales, kind="stable")
    return tuple(
        Undersized(
            path=printable(dataset.path(index)),
            size=(int(widths[index]), int(heights[index])),
            bucket=(int(buckets[index, 0]), int(buckets[index, 1])),
            upscale=float(scales[index]),
        )
        for index in worst_first[: int(np.count_nonzero(scales > 1))].tolist()
    )


def write_undersized(path: str | Path, dataset: Dataset, settings: PlanSettings) -> int:
    """Write `undersized_images.txt`: one line for each image that must be enlarged, the worst first.

    Returns:
        Their number; nothing is written where there is none.
    """
    found = find_undersized(dataset, settings)
    if found:
        with Path(path).open("w", encoding="utf-8") as file:
            file.writelines(f"{_undersized_line(item)}\n" for item in found)
    return len(found)


def _undersized_line(item: Undersized) -> str:
    return f"{_size(item.size)} -> {_size(item.bucket)}, enlarged {item.upscale:.2f} x: {item.path}"


def _check_captions(
    dataset: Dataset, count_tokens: Callable[[str], int] | None, max_tokens: int
) -> tuple[CaptionCounts, tuple[tuple[str, int], ...], tuple[LongCaption, ...] | None]:
    """Counts, tag frequencies and captions beyond the window. Every alternative caption counts."""
    texts: Counter[str] = Counter()
    tags: Counter[str] = Counter()
    long_captions = []
    empty = 0
    for index in range(len(dataset)):
        caption = dataset.caption(index)
        empty += not caption.text
        tags.update({tag.text for choice in caption.choices for tag in choice.tags})
        for choice in caption.choices:
            texts[choice.text] += 1
            if count_tokens is not None and (num_tokens := count_tokens(choice.text)) > max_tokens:
                cut = cut_text(choice.text, count_tokens, max_tokens)
                long_captions.append(LongCaption(printable(dataset.path(index)), num_tokens, cut))
    counts = CaptionCounts(
        from_file_name=int(np.count_nonzero(dataset.numbers["caption_kind"] == FROM_FILE_NAME)),
        empty=empty,
        repeated=tuple((text, count) for text, count in texts.most_common() if count > 1 and text),
    )
    found = tuple(sorted(long_captions, key=lambda item: -item.num_tokens))
    return counts, tuple(tags.most_common(NUM_TAGS)), found if count_tokens is not None else None


def cut_text(text: str, count_tokens: Callable[[str], int], max_tokens: int) -> str:
    """The words of `text` that do not fit into `max_tokens` tokens any more."""
    words = text.split(" ")
    low, high = 0, len(words)  # the first `low` words fit, the first `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        if count_tokens(" ".join(words[:middle])) <= max_tokens:
            low = middle
        else:
            high = middle
    return " ".join(words[low:])


def _size(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _lines(report: DatasetReport) -> list[str]:
    r = report
    lines = [f"{r.dataset_size} image{'' if r.dataset_size == 1 else 's'} in {', '.join(r.roots)}"]
    images, steps = (
        f"{n} {what}{'' if n == 1 else 's'}" for n, what in ((r.num_images, "image"), (r.num_steps, "optimizer step"))
    )
    lines.append(f"{images} and {steps} in the first epoch")
    lines += ["", f"Buckets at batch size {r.batch_size}:"]
    lines += [
        f"  {_size(b.size):>11}  {b.num_images:>6} images  {b.num_batches:>5} batches  {b.fullness:>4.0%} full"
        for b in r.buckets
    ]
    lines += _section("Skipped", [str(problem) for problem in r.skipped])
    lines += _section("Used, with a note", [str(problem) for problem in r.notes])
    lines += _section("Smaller than their bucket", [_undersized_line(item) for item in r.undersized])
    lines += _section("Groups of identical files", [", ".join(group) for group in r.exact_duplicates])
    lines += _section("Groups of images that look alike", [", ".join(group) for group in r.near_duplicates])
    if r.long_captions is not None:
        long = [f"{c.num_tokens} tokens, never read: ...{_start(c.cut)} ({c.path})" for c in r.long_captions]
        lines += _section("Captions longer than the text encoder reads", long)
    lines += ["", f"Captions from file names: {r.captions.from_file_name}; empty captions: {r.captions.empty}"]
    lines += _section("Captions shared by several images", [f"{n} x {_start(text)}" for text, n in r.captions.repeated])
    if r.tags:
        lines += ["", "Tags: " + ", ".join(f"{_start(text)} ({count})" for text, count in r.tags[: 2 * NUM_LINES])]
    return lines


def _start(text: str) -> str:
    """A text that may be a page long, so that it fits a line or two."""
    return text if len(text) <= NUM_CHARACTERS else f"{text[:NUM_CHARACTERS]}..."


def _section(title: str, items: list[str]) -> list[str]:
    """A heading with its number of items and the first of them; nothing where there is none."""
    if not items:
        return []
    more = [f"  ... and {len(items) - NUM_LINES} more"] if len(items) > NUM_LINES else []
    return ["", f"{title} ({len(items)}):", *(f"  {item}" for item in items[:NUM_LINES]), *more]
