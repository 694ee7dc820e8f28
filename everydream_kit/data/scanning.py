"""Finding images and their settings: folders, `.json` indexes, and several roots at once.

`scan_dataset` walks every root, reads each image's header and the small files next to it in parallel, and gives a
`Dataset`. Only headers are read. A file that cannot be used is skipped and named in `Dataset.problems` with its cause
and cure; one file never ends the scan. A settings or caption file that cannot be understood takes out what it governs:
training an image under the wrong words would be worse than leaving it out.

Walking is done by one thread and reading by many, with a bounded number of images in flight, so memory follows the
number of images only. The scan is remembered (`scan_cache`), and what did not change is not read again.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from everydream_kit.config import default_of
from everydream_kit.data.caption_tables import captions_cure
from everydream_kit.data.captions import caption_from_file_name, is_camera_name
from everydream_kit.data.dataset import (
    DEFAULT_MASK_MODE,
    FROM_FILE_NAME,
    Dataset,
    DatasetBuilder,
    Defaults,
    MaskMode,
)
from everydream_kit.data.dataset_images import Entry, Job, entries_of_folder, hash_settings, read_job
from everydream_kit.data.folders import SIDECAR_EXTENSIONS, FolderFiles, Report, report_notes, walk_folders
from everydream_kit.data.image_digests import map_in_order
from everydream_kit.data.image_files import EXTENSIONS
from everydream_kit.data.image_settings import parse_settings
from everydream_kit.data.reading_problems import Problem
from everydream_kit.data.scan_cache import load_remembered, save_remembered
from everydream_kit.data.sources import ARCHIVES, kind_of_source, open_source
from everydream_kit.data.textfiles import TextError, kind_of, parse_json, require_text
from everydream_kit.errors import DataError
from everydream_kit.plain_text import printable

DataRoot = str | Path | list[Any] | dict[str, Any]

JOB_SIZE = 256
"""Images that a worker reads in one go: enough to make the hand-over cheap, few enough to keep threads busy."""


def scan_dataset(
    data_root: DataRoot,
    *,
    cond_dropout: float = default_of("cond_dropout"),
    flip_p: float = default_of("flip_p"),
    shuffle_tags: bool = default_of("shuffle_tags"),
    keep_tags: int = default_of("keep_tags"),
    caption_lines: Literal["join", "choose"] = default_of("caption_lines"),
    loss_mask: MaskMode = DEFAULT_MASK_MODE,
    cache_dir: str | Path | None = None,
    num_threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Dataset:
    """Find all images of a dataset.

    Args:
        data_root: a folder, a `.json` index, an archive, a Hub dataset id, a list of these, or EveryDream 2's
            `{"resolver": ...}` form.
        cond_dropout, flip_p, shuffle_tags, keep_tags: hold where neither image nor folder says otherwise.
        caption_lines: what several lines in a caption file mean: one caption ("join"), or one each ("choose").
        loss_mask: where loss masks come from.
        cache_dir: folder that remembers the scan; None remembers nothing.
        num_threads: readers; by default four for each core, at most 32, since most of their time is waiting for disks.
        progress: called with the number of images looked at so far, from the calling thread.

    Raises:
        DataError: a root is not there, or is of no kind that is known. What is wrong with single files is in
            `Dataset.problems` instead.
    """
    cache = None if cache_dir is None else Path(cache_dir)
    roots = [_locate(spec, cache) for spec in _flatten(data_root)]
    bases = [str(path.parent if path.is_file() else path) for path in roots]
    defaults = Defaults(cond_dropout, flip_p, shuffle_tags, keep_tags, loss_mask)
    scanner = _Scanner(caption_lines == "choose", num_threads, progress)
    if len(roots) == 1:
        return replace(scanner.scan(roots[0], bases[0], cache), defaults=defaults)
    builder = DatasetBuilder(bases)
    for number, (path, base) in enumerate(zip(roots, bases, strict=True)):
        builder.extend(scanner.scan(path, base, cache), root=number)
    return builder.build(defaults)


def _flatten(data_root: Any) -> list[str]:
    """The single roots that a data_root names."""
    if isinstance(data_root, (str, Path)):
        return [str(data_root)]
    if isinstance(data_root, list):
        if not data_root:
            raise DataError("data_root: the list is empty; name at least one folder.")
        return [spec for item in data_root for spec in _flatten(item)]
    if isinstance(data_root, dict):
        resolver = data_root.get("resolver")
        if resolver == "multi" and isinstance(data_root.get("resolvers"), list):
            return _flatten(data_root["resolvers"])
        if resolver in ("directory", "json") and isinstance(data_root.get("path"), str):
            return [data_root["path"]]
        raise DataError(
            f"data_root: an object names a resolver: directory or json with a path, or multi with a list of resolvers "
            f"(got resolver {resolver!r} with {', '.join(map(str, data_root)) or 'nothing'})."
        )
    raise DataError(f"data_root: a folder is expected, found a {kind_of(data_root)}.")


def _locate(spec: str, cache: Path | None) -> Path:
    """The folder or index file that a root stands for, absolute; archives and Hub datasets are fetched."""
    path, kind = Path(spec).expanduser(), kind_of_source(spec)
    if kind in ("folder", "index"):
        return path.absolute()
    work_dir = cache or (path.parent if kind == "archive" else Path.home() / ".cache" / "everydream_kit")
    return Path(open_source(spec, work_dir)).absolute()


class _Scanner:
    """Reads roots one after another with one setting; counts over all of them."""

    def __init__(self, choose_lines: bool, num_threads: int | None, progress: Callable[[int], None] | None) -> None:
        self._choose_lines = choose_lines
        self._num_threads = num_threads or min(32, 4 * (os.cpu_count() or 1))
        self._progress = progress
        self._num_seen = 0

    def scan(self, path: Path, base: str, cache: Path | None) -> Dataset:
        """One root, as a dataset with a single root."""
        remembered = load_remembered(cache, str(path), in_folder_order=path.is_dir())
        builder = DatasetBuilder([base])
        jobs = self._jobs(path, base, builder.problems.append)
        with warnings.catch_warnings(), ThreadPoolExecutor(self._num_threads, "scan") as pool:
            # of damaged EXIF, and of images half as large as what we (and it) refuse
            warnings.filterwarnings("ignore", module=r"PIL\b")
            read = map_in_order(pool, lambda job: read_job(job, remembered), jobs, ahead=2 * self._num_threads)
            for job, part in read:
                builder.extend(part, root=0)
                self._num_seen += len(job.entries)
                if self._progress is not None:
                    self._progress(self._num_seen)
        dataset = builder.build(Defaults())
        if not len(dataset) and not any(problem.skipped for problem in dataset.problems):
            dataset.problems.append(_no_image(path))
        _note_camera_names(dataset, base)
        if cache is not None and not remembered.is_all_of(dataset):
            save_remembered(cache, str(path), dataset)
        return dataset

    def _jobs(self, path: Path, base: str, report: Report) -> Iterator[Job]:
        if path.is_file():
            entries = tuple(_read_index(path, base, report))
            yield from (Job(entries[i : i + JOB_SIZE], self._choose_lines) for i in range(0, len(entries), JOB_SIZE))
            return
        for folder in walk_folders(base, report):
            for start in range(0, len(folder.images), JOB_SIZE):
                names = folder.images[start : start + JOB_SIZE]
                yield Job(entries_of_folder(folder, names), self._choose_lines)


HOLDS_NO_IMAGE = "holds no image"
"""How the cause of a problem begins that is about a whole root."""


def _no_image(root: Path) -> Problem:
    """What to do about a folder or an index without an image."""
    archives = [name for name in sorted(os.listdir(root)) if name.lower().endswith(ARCHIVES)] if root.is_dir() else []
    if archives:
        cure = f"Give the archive as data_root, such as {root / archives[0]}, or unpack it."
        named = ", ".join(archives[:3]) + (f" and {len(archives) - 3} more" if len(archives) > 3 else "")
        return Problem(printable(str(root)), printable(f"{HOLDS_NO_IMAGE}, but {named}"), printable(cure))
    return Problem(
        printable(str(root)), f"{HOLDS_NO_IMAGE} ({', '.join(EXTENSIONS)})", "Give the folder that holds yours."
    )


def _note_camera_names(dataset: Dataset, base: str) -> None:
    """Report captions that come from file names without meaning."""
    rows = np.flatnonzero(dataset.numbers["caption_kind"] == FROM_FILE_NAME).tolist()
    captions = [caption_from_file_name(dataset.paths[row]).text for row in rows]
    empty = captions.count("")
    odd = [text for text in captions if text and is_camera_name(text)]
    causes = []
    if odd:
        examples = ", ".join(repr(text) for text in list(dict.fromkeys(odd))[:3])
        look = "looks like a name" if len(odd) == 1 else "look like names"
        causes.append(f"{len(odd)} of them {look} from a camera or a download: {examples}")
    if empty:
        has = "has an empty caption" if empty == 1 else "have an empty caption"
        causes.append(f"{empty} of them {has}, since nothing precedes the first underscore")
    if causes:
        come = "1 caption comes from a file name" if len(rows) == 1 else f"{len(rows)} captions come from file names"
        cause = f"{come}, and {', and '.join(causes)}"
        cure = "Put a caption file next to each image (cat.txt for cat.jpg), or rename the images."
        dataset.problems.append(Problem(printable(base), cause, cure, skipped=False))


def _read_index(path: Path, base: str, report: Report) -> Iterator[Entry]:
    """The images that a `.json` index lists. Relative paths start at the index's own folder.

    Raises:
        DataError: the index is not a JSON list of objects.
    """
    try:
        items = parse_json(path.read_text(encoding="utf-8-sig"))
    except (TextError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: {error}. A dataset index is a JSON list of objects with image and caption."
        ) from error
    if not isinstance(items, list):
        cure = f" If it maps images to captions: {captions_cure(path)}" if isinstance(items, Mapping) else ""
        raise DataError(
            f'{path}: holds a {kind_of(items)}, but an index is a list: [{{"image": "a.jpg", "caption": "a cat"}}].{cure}'
        )
    seen: set[str] = set()
    files = FolderFiles()
    for number, item in enumerate(items):
        try:
            entry = _index_entry(item, base, path, files, report)
        except TextError as error:
            report(Problem(f"{path}, entry {number}", str(error), "Fix the entry; until then its image is skipped."))
            continue
        if entry.path in seen:
            report(
                Problem(
                    printable(entry.path), f"listed again in entry {number}", "Used as often as it is listed.", False
                )
            )
        seen.add(entry.path)
        yield entry


def _index_entry(item: Any, base: str, index: Path, files: FolderFiles, report: Report) -> Entry:
    if not isinstance(item, Mapping):
        raise TextError(f"an object with an image is expected, found a {kind_of(item)}")
    image = item.get("image")
    if not isinstance(image, str) or not image.strip():
        raise TextError("there is no image in it")
    settings = parse_settings(item)
    report_notes(settings, str(index), report)
    relative = require_text(image.strip()).replace("\\", "/")
    path = os.path.normpath(os.path.join(base, relative))
    settings = replace(settings, unknown=(), notes=())
    captions, mask = _files_of(Path(path), files)
    # an entry with a caption speaks for itself; others may have one next to the image
    alongside = () if settings.main_prompt is not None else captions
    return Entry(path, relative, alongside, mask, settings, hash_settings(settings))


def _files_of(image: Path, files: FolderFiles) -> tuple[tuple[str, ...], str | None]:
    """Captions and mask of an image; none where its folder is missing, which reading the image reports."""
    try:
        captions = [files.find(image, ending) for ending in SIDECAR_EXTENSIONS]
        mask = files.mask_of(image)
    except OSError:
        return (), None
    return tuple(str(file) for file in captions if file is not None), None if mask is None else str(mask)
