"""Issues of a dataset: files that cannot be used, images that are exact duplicates, are too
small, or have captions that are too long. Gathered from the library's report; no widgets here.

What is quick is found at once. What decodes every image (duplicates, broken ones) or reads every caption is found by a
separate process (`background.inspect_folder`), whose result is a file; it holds as long as no image has come since.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everydream_kit.actions.estimate import GUESSED_BATCH_SIZE
from everydream_kit.atomic import write_atomic
from everydream_kit.config import EMBEDDED_MODEL, TrainConfig
from everydream_kit.data.dataset import Dataset
from everydream_kit.data.epoch_plan import PlanSettings
from everydream_kit.data.folders import FolderFiles
from everydream_kit.data.reading_problems import Problem
from everydream_kit.data.report import find_undersized, make_report
from everydream_kit.data.scanning import HOLDS_NO_IMAGE
from everydream_kit.data.tidying import worth
from everydream_kit.errors import KitError


@dataclass(frozen=True)
class Kind:
    """A kind of issue.

    Attributes:
        title: heading above its issues.
        advice: what it means and what to do.
        button: label of the button that excludes all of them; empty: nothing is excluded.
    """

    title: str
    advice: str
    button: str = ""


UNUSABLE = Kind("Cannot be used", "These files are excluded from training.", "Exclude all of them")
DUPLICATE = Kind(
    "Exact duplicates",
    "Equal files: training sees the image once more for each. One of each stays.",
    "Exclude the copies",
)
ALIKE = Kind(
    "Look alike",
    "The same image in another size or compression, or nearly the same. Look before you press: the largest stays.",
    "Keep the largest of each",
)
SMALL = Kind(
    "Smaller than their bucket",
    "They are enlarged, which teaches blur. Use larger originals or a lower resolution, or exclude them.",
    "Exclude all of them",
)
LONG = Kind("Captions that are too long", "The text encoder does not read what is named here. Shorten them.")
NOTE = Kind("Notes", "None of these keeps an image out of training.")
EMPTY = Kind("No images yet", "Drop some under Add images, or name the folder that holds yours there.")
MAX_CUT = 160
"""Characters shown of the words that a text encoder does not read."""


@dataclass(frozen=True)
class Issue:
    """One line of the list.

    Attributes:
        kind: what it is.
        shown: images that belong to it, the best first.
        exclude: files that are excluded when the person wants that.
        text: what was found; names are relative to the dataset folder.
        cure: what the person can do, where the kind's advice does not say it.
    """

    kind: Kind
    shown: tuple[str, ...]
    exclude: tuple[str, ...]
    text: str
    cure: str = ""


def report_settings(config: TrainConfig | None) -> PlanSettings:
    """What the report is made for: the project's resolution and batch, or the defaults where its settings are wrong."""
    if config is None:
        return PlanSettings(batch_size=GUESSED_BATCH_SIZE)
    batch_size = config.batch_size if isinstance(config.batch_size, int) else GUESSED_BATCH_SIZE
    return PlanSettings(batch_size=batch_size, grad_accum=config.grad_accum, resolutions=config.resolutions)


def list_issues(dataset: Dataset, settings: PlanSettings, inspection: Mapping[str, Any]) -> list[Issue]:
    """Everything worth a look, the worst kind first.

    Args:
        dataset: the images as they are now.
        settings: resolution that images must be large enough for.
        inspection: the result of `inspect_dataset`, or nothing.
    """
    here = {dataset.path(index): index for index in range(len(dataset))}
    found = [_problem(problem) for problem in dataset.problems]
    known = {problem.path for problem in dataset.problems}
    found += [
        Issue(UNUSABLE, (), (p["path"],), p["cause"], p["cure"])
        for p in inspection.get("skipped", ())
        if p["path"] in here and p["path"] not in known
    ]
    for kind, name in ((DUPLICATE, "exact_duplicates"), (ALIKE, "near_duplicates")):
        found += [_group(kind, members, dataset, here) for members in _present(inspection.get(name, ()), here)]
    found += [
        Issue(SMALL, (u.path,), (u.path,), f"{_size(u.size)}, enlarged {u.upscale:.2f} × for {_size(u.bucket)}")
        for u in find_undersized(dataset, settings)
    ]
    found += [
        Issue(LONG, (c["path"],), (), f"{c['num_tokens']} tokens; never read: …{_start(c['cut'])}")
        for c in inspection.get("long_captions") or ()
        if c["path"] in here
    ]
    order = [EMPTY, UNUSABLE, DUPLICATE, ALIKE, SMALL, LONG, NOTE]
    return sorted(found, key=lambda issue: order.index(issue.kind))


def is_fresh(dataset: Dataset, inspection: Mapping[str, Any]) -> bool:
    """Whether no image has come or changed since `inspect_dataset`."""
    return set(_signature(dataset)) <= set(inspection.get("images", ()))


def inspect_dataset(
    dataset: Dataset, settings: PlanSettings, base: str, out: Path, progress: Callable[[int], None]
) -> None:
    """Write the library's report, and of which images it speaks, for `list_issues`.

    Args:
        base: `resume_ckpt`; its tokenizer counts the captions where it lies on this disk.
        progress: called with the number of images decoded so far.
    """
    report = make_report(dataset, settings, progress=progress, **_caption_reading(base))
    write_atomic(out, json.dumps({**report.to_json(), "images": _signature(dataset)}))


def _caption_reading(base: str) -> dict[str, Any]:
    """How long captions are found, where the base's tokenizer lies on this disk."""
    from everydream_kit.generation import caption_reading

    if base != EMBEDDED_MODEL and not (Path(base) / "tokenizer").is_dir():
        return {}
    try:
        count_tokens, max_tokens = caption_reading(base)
    except (KitError, OSError):  # the trainer says what is wrong with the base
        return {}
    return {"count_tokens": count_tokens, "max_tokens": max_tokens}


def _signature(dataset: Dataset) -> list[str]:
    sizes = dataset.numbers["file_bytes"].tolist()
    return [f"{num_bytes} {name}" for num_bytes, name in zip(sizes, dataset.paths, strict=True)]


def _present(groups: Sequence[Sequence[str]], here: Mapping[str, int]) -> Iterator[list[str]]:
    """Groups of which two or more are still there."""
    for group in groups:
        members = [path for path in group if path in here]
        if len(members) > 1:
            yield members


def _group(kind: Kind, members: Sequence[str], dataset: Dataset, here: Mapping[str, int]) -> Issue:
    numbers, files = dataset.numbers, FolderFiles()
    best_first = sorted(members, key=lambda path: worth(dataset, here[path], files), reverse=True)
    sizes = ", ".join(
        _size((int(numbers["width"][here[path]]), int(numbers["height"][here[path]]))) for path in best_first[:4]
    )
    return Issue(kind, tuple(best_first), tuple(best_first[1:]), sizes)


def _problem(problem: Problem) -> Issue:
    if problem.cause.startswith(HOLDS_NO_IMAGE):  # about the folder: it is no file to exclude
        return Issue(EMPTY, (), (), f"{problem.path} {problem.cause}.", problem.cure)
    if problem.skipped:
        return Issue(UNUSABLE, (), (problem.path,), problem.cause, problem.cure)
    return Issue(NOTE, (), (), f"{Path(problem.path).name}: {problem.cause}", problem.cure)


def _start(text: str) -> str:
    return text if len(text) <= MAX_CUT else f"{text[:MAX_CUT]} …"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"
