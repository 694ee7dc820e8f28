"""Captions of a whole folder at once: tags added and removed, captions written from a table.

Only plain text captions (`.txt`, `.caption`) are written. An image whose caption is held by a `.yaml` or `.json` file
is left alone and named, because rewriting such a file would lose its comments and order. Every step keeps what it
replaced in a journal for `changes.undo`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from everydream_kit.data.caption_tables import read_table, table_key
from everydream_kit.data.captions import is_camera_name
from everydream_kit.data.changes import Changes, PrepReport
from everydream_kit.data.dataset import FROM_FILE_NAME, FROM_JSON, Dataset
from everydream_kit.data.folders import FolderFiles
from everydream_kit.data.scanning import scan_dataset
from everydream_kit.data.textfiles import TextError, read_mapping, read_text_and_doubt
from everydream_kit.errors import ConfigError

_RICH = (".json", ".yaml", ".yml")
_CAPTION_WORDS = frozenset({"main_prompt", "tags", "caption"})


@dataclass(frozen=True, slots=True)
class CaptionSource:
    """Where the caption of an image comes from.

    Attributes:
        file: the text file that holds, or would hold, the caption.
        text: of the file; without one, what the folder or the image's name gives. Empty where the name is one
            that cameras and downloads give, since such a word is nothing to build a caption on.
        is_own: somebody wrote it; it does not come from the image's name.
        locked: why it cannot be rewritten, or an empty text.
    """

    file: Path
    text: str
    is_own: bool
    locked: str = ""


def caption_source(dataset: Dataset, index: int, files: FolderFiles) -> CaptionSource:
    """Find the caption of an image as the scan finds it, and as its file spells it."""
    path, kind = Path(dataset.path(index)), int(dataset.numbers["caption_kind"][index])
    held = files.find(path, ".caption") or files.find(path, ".txt")
    file = held or path.with_suffix(".txt")
    settings = next((one for ending in _RICH if (one := files.find(path, ending)) and _speaks_of_captions(one)), None)
    if settings is not None or (kind == FROM_JSON and held is None):
        where = settings.name if settings is not None else "a .yaml or .json file"
        return CaptionSource(file, dataset.caption(index).text, True, f"its caption is in {where}")
    if held is not None:
        try:
            text, doubt = read_text_and_doubt(held)
        except (TextError, OSError) as error:
            return CaptionSource(file, "", True, f"{held.name} cannot be read ({error})")
        return CaptionSource(file, text, True, f"{held.name} is {doubt}" if doubt else "")
    text = dataset.caption(index).text
    if kind != FROM_FILE_NAME:
        return CaptionSource(file, text, True)
    return CaptionSource(file, "" if is_camera_name(text) else text, False)


def _speaks_of_captions(path: Path) -> bool:
    """Whether a settings file holds caption words. One that cannot be understood may."""
    try:
        return bool(_CAPTION_WORDS & set(read_mapping(path)))
    except (TextError, OSError):
        return True


def edit_captions(changes: Changes, dataset: Dataset, indices: Iterable[int], edit: Callable[[str], str]) -> None:
    """Rewrite captions, each in its text file.

    Those that cannot be rewritten without loss are left alone and reported: in a settings file, or in an encoding that
    is not known for sure. All files are read before the first is written.

    Args:
        changes: the step; with a journal it can be undone.
        dataset: a scan of the folder as it is now.
        indices: images.
        edit: the new text of a caption file, from its present one.
    """
    files = FolderFiles()
    wanted: dict[Path, tuple[Path, str]] = {}
    for index in indices:
        source = caption_source(dataset, index, files)
        path = Path(dataset.path(index))
        if source.locked:
            changes.leave(path, f"{source.locked}.", "Edit that file, or save it as UTF-8 text.")
            continue
        after = edit(source.text)
        if after.strip() != source.text.strip() and source.file not in wanted:
            wanted[source.file] = path, after + ("\n" if source.text.endswith("\n") else "")
    contents = {file: text.encode() for file, (_, text) in wanted.items()}
    changes.write_many(contents, "captions edited", {file: path for file, (path, _) in wanted.items()})


def in_each_line(text: str, edit: Callable[[str], str]) -> str:
    """Edit every caption of a file that holds one a line; blank lines stay."""
    lines = text.splitlines() or [""]
    return "\n".join(edit(line) if line.strip() or len(lines) == 1 else line for line in lines)


def edit_tags(
    folder: str | Path,
    *,
    add: Sequence[str] = (),
    remove: Sequence[str] = (),
    position: Literal["start", "end"] = "end",
    journal: str | Path | None = None,
    dry_run: bool = False,
) -> PrepReport:
    """Add and remove tags in every caption of a folder.

    A caption is its main prompt (up to the first comma) and tags. Added tags go right after the main prompt
    ("start") or last ("end"), and are not added twice; the main prompt is never removed. Each line of a caption file
    with several lines is edited. An image captioned by its file name gets a `.txt`.

    Args:
        folder: dataset folder.
        add, remove: tags, compared without regard to case.
        position: where added tags go.
        journal: where former captions are kept; by default `<folder>-tags-undo.jsonl` next to it.
        dry_run: only report.
    """
    added = [tag for tag in map(_tidy, add) if tag]
    removed = {_tidy(tag).lower() for tag in remove}
    if not added and not removed:
        raise ConfigError("edit_tags: nothing to add or remove; give add=[...] or remove=[...].")
    if any("," in tag for tag in (*added, *removed)):
        raise ConfigError("edit_tags: a tag holds a comma; give each tag on its own.")
    _, changes, dataset = start_step("Edit tags", folder, journal, "tags", dry_run)
    edit_captions(changes, dataset, range(len(dataset)), lambda text: change_tags(text, added, removed, position))
    return changes.report


def change_tags(
    text: str, added: Sequence[str], removed: Set[str] = frozenset(), position: Literal["start", "end"] = "end"
) -> str:
    """A caption file's text with tags added and removed in every caption; see `edit_tags`.

    Args:
        text: of the file.
        added: tags, tidy.
        removed: tags in lower case.
        position: where added tags go.
    """
    return in_each_line(text, lambda line: _edit_line(line, added, removed, position))


def split_tags(text: str) -> list[str]:
    """Tags as people type them: commas stand between them."""
    return [tag for part in text.split(",") if (tag := _tidy(part))]


def _edit_line(line: str, added: Sequence[str], removed: Set[str], position: Literal["start", "end"]) -> str:
    main, *tags = map(_tidy, line.split(","))
    tags = [tag for tag in tags if tag and tag.lower() not in removed]
    there = {main.lower(), *(tag.lower() for tag in tags)}
    new = [tag for tag in added if tag.lower() not in there]
    parts = [main, *new, *tags] if position == "start" else [main, *tags, *new]
    return ", ".join(part for part in parts if part)


def _tidy(tag: str) -> str:
    return " ".join(tag.split())


def captions_from_table(
    table: str | Path,
    folder: str | Path,
    *,
    overwrite: bool = False,
    journal: str | Path | None = None,
    dry_run: bool = False,
) -> PrepReport:
    """Write captions from a table into text files next to their images.

    Args:
        table: `.csv` or `.tsv` with a header, `.jsonl`, or `.json` with a list of objects or an object name -> caption.
            The image's column is called image, file_name, filename, file, path or name; the caption's caption,
            text, prompt or description. Hugging Face's `metadata.csv` and `metadata.jsonl` are such tables.
        folder: dataset folder. Names are paths in it; a bare file name will do where it is the only one.
        overwrite: replace captions that are there.
        journal: where former captions are kept; by default `<folder>-captions-undo.jsonl` next to it.
        dry_run: only report.

    Raises:
        DataError: the table cannot be read or has no such columns.
    """
    rows = read_table(Path(table))
    root, changes, dataset = start_step(f"Captions from {table}", folder, journal, "captions", dry_run)
    place, files = _places(dataset, root), FolderFiles()
    for name, caption in rows:
        found = place.get(table_key(name)) or place.get(table_key(name).rpartition("/")[2]) or []
        if len(found) != 1:
            several = ", ".join(dataset.paths[index] for index in found[:3]) + (", …" if len(found) > 3 else "")
            cause = (
                f"{len(found)} images have this name: {several}" if found else "there is no such image in the folder"
            )
            changes.leave(name, cause, "Give its path in the folder." if found else "Fix the name, or remove the row.")
            continue
        index = found[0]
        path, source = Path(dataset.path(index)), caption_source(dataset, index, files)
        if source.locked:
            changes.leave(path, f"{source.locked}.", "Edit that file, or save it as UTF-8 text.")
        elif source.file.is_file() and not overwrite:
            changes.leave(path, "has a caption.", "Use overwrite to replace it.")
        else:
            changes.write(source.file, caption.encode(), "captions written", path)
    return changes.report


def _places(dataset: Dataset, root: Path) -> dict[str, list[int]]:
    """Indices of the images by what a table may call them: path in the folder, then bare name, each also without its
    extension, as kohya's tables have it. A nearer meaning replaces the others."""
    paths = [table_key(Path(dataset.path(index)).relative_to(root).as_posix()) for index in range(len(dataset))]
    places: dict[str, list[int]] = {}
    for bare, short in ((True, True), (True, False), (False, True), (False, False)):
        named: dict[str, list[int]] = {}
        for index, path in enumerate(paths):
            name = path.rpartition("/")[2] if bare else path
            named.setdefault(os.path.splitext(name)[0] if short else name, []).append(index)
        places |= named
    return places


def start_step(
    title: str, folder: str | Path, journal: str | Path | None, kind: str, dry_run: bool
) -> tuple[Path, Changes, Dataset]:
    """Scan a folder for a step on its captions. Returns the folder, the step's changes, and the dataset.

    Args:
        title: of the step; the folder is named after it.
        journal: by default `<folder>-<kind>-undo.jsonl` next to the folder.
    """
    root = Path(folder).resolve()
    place = root.with_name(f"{root.name}-{kind}-undo.jsonl") if journal is None else Path(journal)
    dataset = scan_dataset(root)
    changes = Changes(f"{title} in {root}", dry_run=dry_run, journal=place, root=root)
    changes.report.problems.extend(dataset.problems)
    return root, changes, dataset
