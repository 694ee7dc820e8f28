"""Walking a folder tree, and what its settings files say.

`walk_folders` gives every folder that may hold images, in an order that is the same on every file system, with the
names in it and the settings that hold there: `global.yaml` for the folder and all below it, `local.yaml` and the
one-value files for the folder alone.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from everydream_kit.data.caption_tables import FOLDER_TABLES, UNREAD_TABLE, FolderTable
from everydream_kit.data.image_files import EXTENSIONS, UNREAD_EXTENSIONS
from everydream_kit.data.image_settings import (
    ImageSettings,
    nearest_setting,
    parse_one_value,
    parse_settings,
)
from everydream_kit.data.reading_problems import MASK_SUFFIX, Problem
from everydream_kit.data.textfiles import TextError, read_mapping, read_text
from everydream_kit.errors import DataError
from everydream_kit.plain_text import printable

GLOBAL_FILES = ("global.yaml", "global.yml")
LOCAL_FILES = (
    "multiply.txt",
    "cond_dropout.txt",
    "flip_p.txt",
    "local.yaml",
    "local.yml",
    "batch_id.txt",
    "loss_scale.txt",
    "shuffle_tags.txt",
)
"""In the order in which they are read: a later one wins, as in EveryDream 2."""
ONE_VALUE_FILES = tuple(name for name in LOCAL_FILES if name.endswith(".txt"))

SETTINGS_FILES = frozenset((*GLOBAL_FILES, *LOCAL_FILES))
SIDECAR_EXTENSIONS = (".txt", ".caption", ".yml", ".yaml", ".json")
"""Of files next to an image that speak about it, in the order in which they are read."""


class Companions:
    """The files of a folder that may speak about an image, found as people mean it.

    A caption or mask belongs to an image if its name is the image's stem and an ending (`a.txt`, `a.mask.png`), or the
    whole name and an ending (`a.png.txt`). Case and Unicode form do not count, unless the file fits another image to the letter.
    """

    def __init__(self, names: frozenset[str], images: tuple[str, ...]) -> None:
        self.names = names
        self._by_key = {match_key(name): name for name in sorted(names)}
        self._stems = frozenset(name[: name.rfind(".")] for name in images)
        self._keys = frozenset(match_key(stem) for stem in (*self._stems, *images))
        self._has_masks = any(key.endswith(MASK_SUFFIX) for key in self._by_key)

    def find(self, image: str, ending: str) -> str | None:
        """The file of this ending that belongs to an image, or None."""
        stem = image[: image.rfind(".")]
        if stem + ending in self.names:
            return stem + ending
        found = self._by_key.get(match_key(stem + ending))
        if found is not None and (found[: -len(ending)] == stem or found[: -len(ending)] not in self._stems):
            return found
        if image + ending in self.names:
            return image + ending
        return self._by_key.get(match_key(image + ending))

    def mask_of(self, image: str) -> str | None:
        """The loss mask that belongs to an image, or None."""
        return self.find(image, MASK_SUFFIX) if self._has_masks else None

    def settings_file(self, name: str) -> str | None:
        """How a settings file is spelled in this folder, or None."""
        return name if name in self.names else self._by_key.get(name)

    def orphans(self) -> list[str]:
        """Caption files that belong to no image."""
        return [
            name
            for name in sorted(self.names)
            if name.lower().endswith(SIDECAR_EXTENSIONS)
            and match_key(name) not in (*SETTINGS_FILES, *FOLDER_TABLES)
            and match_key(name[: name.rfind(".")]) not in self._keys
        ]


class FolderFiles:
    """The files next to images, each folder listed once. Make a new one after a change."""

    def __init__(self) -> None:
        self._folders: dict[Path, Companions] = {}

    def find(self, image: Path, ending: str) -> Path | None:
        """The file of this ending that belongs to an image, or None."""
        name = self._folder(image.parent).find(image.name, ending)
        if name is None or name == image.name or match_key(name) in SETTINGS_FILES:
            return None
        return image.with_name(name)

    def mask_of(self, image: Path) -> Path | None:
        """The loss mask that belongs to an image, or None."""
        name = self._folder(image.parent).mask_of(image.name)
        return None if name is None else image.with_name(name)

    def companions(self, image: Path) -> list[Path]:
        """Caption, settings and mask files of an image."""
        found = [self.find(image, ending) for ending in SIDECAR_EXTENSIONS]
        found.append(self.mask_of(image))
        return [path for path in found if path is not None]

    def _folder(self, folder: Path) -> Companions:
        if folder not in self._folders:
            names = [entry.name for entry in os.scandir(folder) if _kind_of(entry) == "file"]
            images = tuple(name for name in names if os.path.splitext(name)[1].lower() in EXTENSIONS)
            self._folders[folder] = Companions(frozenset(names), images)
        return self._folders[folder]


def match_key(name: str) -> str:
    """What a file name is compared by: case and Unicode form do not count."""
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", name.casefold())


@dataclass(frozen=True, slots=True)
class Folder:
    """One folder of the tree.

    Attributes:
        path: absolute.
        relative: to the root, with `/`; "" for the root itself.
        images: names of the image files, sorted.
        companions: the other files, which may speak about an image: captions, settings, masks.
        settings: of the folder and those above it.
        tables: of captions, of the folder and those above it, the nearest first.
    """

    path: str
    relative: str
    images: tuple[str, ...]
    companions: Companions
    settings: ImageSettings
    tables: tuple[FolderTable, ...] = ()


Report = Callable[[Problem], None]


@dataclass(slots=True)
class _Blocked:
    """A settings file that cannot be parsed, and the images that depend on it."""

    path: str
    cause: str
    num_images: int = 0

    def problem(self) -> Problem:
        return Problem(
            self.path,
            self.cause,
            f"Fix the file or delete it; until then its {self.num_images} images are skipped.",
        )


def walk_folders(root: str, report: Report) -> Iterator[Folder]:
    """Every folder with usable images under `root`, parents first, by name.

    Names that begin with a dot are passed over. Links to folders are followed, unless they lead back up.

    Args:
        root: absolute path of a folder.
        report: called with each problem of a folder or a settings file.
    """
    blocks: list[_Blocked] = []
    yield from _walk(root, "", ImageSettings(), None, frozenset(), tables=(), blocks=blocks, report=report)
    for block in blocks:
        report(block.problem())


def _walk(
    path: str,
    relative: str,
    inherited: ImageSettings,
    block: _Blocked | None,
    above: frozenset[str],
    *,
    tables: tuple[FolderTable, ...],
    blocks: list[_Blocked],
    report: Report,
) -> Iterator[Folder]:
    real = os.path.realpath(path)
    if real in above:
        report(
            Problem(
                printable(path), "a link back to a folder above it", "Nothing to do: its images are read once.", False
            )
        )
        return
    try:
        files, folders = _list(path, report)
    except OSError as error:
        report(Problem(printable(path), f"the folder cannot be read: {error.strerror}", "Check its permissions."))
        return
    names = frozenset(files)
    images = _images_of(files, names)
    companions = Companions(names.difference(images), images)
    _report_strays(path, companions, report)
    settings, block = _read_files(path, companions, GLOBAL_FILES, inherited, block, blocks=blocks, report=report)
    here, local_block = _read_files(path, companions, LOCAL_FILES, settings, block, blocks=blocks, report=report)
    own_tables = _read_tables(path, companions, report)
    tables = (*own_tables, *tables)
    if local_block is not None:
        local_block.num_images += len(images)
    elif images:
        _note_repeats(path, here, report)
        yield Folder(path, relative, images, companions, here, tables)
    del names, files, images, companions
    deeper = above | {real}
    for name in folders:
        below, inner = f"{relative}/{name}" if relative else name, os.path.join(path, name)
        yield from _walk(inner, below, settings, block, deeper, tables=tables, blocks=blocks, report=report)
    for table in own_tables:
        _note_unused_rows(table, path, report)


def _list(path: str, report: Report) -> tuple[list[str], list[str]]:
    """Names of files and of folders, sorted; dead links are reported."""
    files, folders = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            kind = _kind_of(entry)
            if kind == "folder":
                folders.append(entry.name)
            elif kind == "file":
                files.append(entry.name)
            elif os.path.splitext(entry.name)[1].lower() in (*EXTENSIONS, *SIDECAR_EXTENSIONS):
                is_image = os.path.splitext(entry.name)[1].lower() in EXTENSIONS
                cause = "the link leads nowhere" if entry.is_symlink() else "not a regular file"
                cure = f"Put the {'image' if is_image else 'file'} itself there, or delete the entry."
                report(Problem(printable(entry.path), cause, cure, skipped=is_image))
    return sorted(files), sorted(folders)


def _kind_of(entry: os.DirEntry[str]) -> str:
    """What an entry is, links followed: "folder", "file", or "" for everything else, links in a circle included."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else ""
    except OSError:
        return ""


def _images_of(files: list[str], names: frozenset[str]) -> tuple[str, ...]:
    """Names of images. The loss mask of an image is none, whether masks are used or not."""
    images = [name for name in files if name[name.rfind(".") :].lower() in EXTENSIONS]
    masked: set[str] | None = None
    kept = []
    for name in images:
        if match_key(name).endswith(MASK_SUFFIX):
            if masked is None:
                masked = {match_key(other) for image in images for other in (image, os.path.splitext(image)[0])}
            if match_key(name)[: -len(MASK_SUFFIX)] in masked:
                continue
        kept.append(name)
    return tuple(kept)


MOST_NAMED = 10
"""Names in a problem that is about several files."""


def _report_strays(path: str, companions: Companions, report: Report) -> None:
    """Report captions without an image, and images of formats that are not read."""
    orphans = companions.orphans()
    if orphans:
        many = len(orphans) > 1
        cause = f"{len(orphans)} caption file{'s' if many else ''} belong{'' if many else 's'} to no image: "
        cure = "Name a caption like its image (cat.txt for cat.jpg), or delete it."
        report(Problem(printable(path), cause + _name_some(orphans), cure, skipped=False))
    unread: dict[str, list[str]] = {}
    for name in sorted(companions.names):
        ending = os.path.splitext(name)[1].lower()
        if ending in UNREAD_EXTENSIONS:
            unread.setdefault(ending, []).append(name)
    for ending, names in unread.items():
        cause = f"{len(names)} {ending} {'images are' if len(names) > 1 else 'image is'} not read: {_name_some(names)}"
        report(Problem(printable(path), cause, "Save as JPEG, PNG or WebP to train on it."))


def _read_tables(path: str, companions: Companions, report: Report) -> list[FolderTable]:
    """The tables of captions that lie in a folder; one that cannot be used is reported."""
    found = []
    for name in FOLDER_TABLES:
        spelled = companions.settings_file(name)
        if spelled is None:
            continue
        file = os.path.join(path, spelled)
        try:
            found.append(FolderTable(file))
            if found[-1].unread:
                cure = "Fix it; until then, images that have no other caption than their file name are skipped."
                report(Problem(printable(file), printable(found[-1].unread), cure, skipped=False))
        except DataError as error:
            cause = str(error).removeprefix(f"{file}: ").rstrip(".")
            report(Problem(printable(file), f"no caption of it is used: {printable(cause)}", _TABLE_CURE, False))
    if (unread := companions.settings_file(UNREAD_TABLE)) is not None:
        cure = "Save it as metadata.jsonl with file_name and text."
        report(Problem(printable(os.path.join(path, unread)), "a table in Parquet is not read", cure, skipped=False))
    return found


_TABLE_CURE = "Fix it, or remove it if it holds no captions (it needs the columns file_name and text)."


def _note_unused_rows(table: FolderTable, path: str, report: Report) -> None:
    """Report rows that name no image, since their captions are used nowhere."""
    if table.num_unused:
        rows = "row" if table.num_rows == 1 else "rows"
        names = "names" if table.num_unused == 1 else "name"
        cause = f"{table.num_unused} of its {table.num_rows} {rows} {names} no image that is here"
        cure = "Names start at the table's folder, such as train/a.png. Fix them, or remove rows whose image is gone."
        if table.has_bare_names:
            cure += (
                " Bare names of images are among them: everydream tidy captions-from-table "
                f"{quote(table.path)} {quote(path)} writes their captions next to the images."
            )
        report(Problem(printable(table.path), cause, printable(cure), skipped=False))


_REPEATS = re.compile(r"([1-9][0-9]{0,2})_.+")
"""kohya's trainer reads a folder `10_cat` as ten repeats of its images."""


def _note_repeats(path: str, settings: ImageSettings, report: Report) -> None:
    """Report a folder whose name says repeats to another trainer, and whose settings say nothing of them."""
    found = _REPEATS.fullmatch(os.path.basename(path))
    if found and int(found[1]) > 1 and settings.multiply is None:
        cause = f"the name asks kohya's trainer for {found[1]} repeats; here a folder's name has no meaning"
        cure = f"To repeat its images, put a file multiply.txt with {found[1]} into it; with 1, this note goes."
        report(Problem(printable(path), cause, cure, skipped=False))


def _name_some(names: list[str]) -> str:
    more = len(names) - MOST_NAMED
    return printable(", ".join(names[:MOST_NAMED])) + (f" and {more} more" if more > 0 else "")


def _read_files(
    path: str,
    companions: Companions,
    wanted: tuple[str, ...],
    settings: ImageSettings,
    block: _Blocked | None,
    *,
    blocks: list[_Blocked],
    report: Report,
) -> tuple[ImageSettings, _Blocked | None]:
    """Settings with those of the wanted files over them, or the first file that blocks the folder."""
    for name in wanted:
        spelled = companions.settings_file(name)
        if spelled is None or block is not None:
            continue
        file = os.path.join(path, spelled)
        try:
            said = (
                parse_one_value(name, read_text(file))
                if name in ONE_VALUE_FILES
                else parse_settings(read_mapping(file))
            )
        except TextError as error:
            block = _Blocked(printable(file), str(error))
        except OSError as error:
            block = _Blocked(printable(file), f"cannot be read: {error.strerror}")
        else:
            settings = settings.updated(said)
            report_notes(said, file, report)
            continue
        blocks.append(block)
    return settings, block


def report_notes(settings: ImageSettings, path: str, report: Report) -> None:
    """Report unknown names of settings, and the notes."""
    for name in settings.unknown:
        near = nearest_setting(name)
        cure = f"Did you mean {near}?" if near else "Remove it, or see the list of settings in docs/data.md."
        report(Problem(printable(path), f"{printable(name)[:60]}: there is no such setting", cure, skipped=False))
    for note in settings.notes:
        report(Problem(printable(path), printable(note.cause), note.cure, skipped=False))
