"""Reading what belongs to a number of images: their headers, captions and masks.

A `Job` is some images of one folder (or of a `.json` index); `read_job` runs in a worker thread and gives rows for
the dataset. Images that the last scan knows, and whose files are as they were, are copied from there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from everydream_kit.data.caption_tables import listed_caption, unread_table
from everydream_kit.data.captions import (
    Caption,
    caption_from_file_name,
    combine_captions,
    encode_caption,
    parse_caption_lines,
    readable,
)
from everydream_kit.data.dataset import (
    FROM_FILE_NAME,
    FROM_JSON,
    FROM_LINES,
    FROM_TEXT,
    Dataset,
    DatasetBuilder,
    Defaults,
)
from everydream_kit.data.folders import SETTINGS_FILES, SIDECAR_EXTENSIONS, Folder, match_key, report_notes
from everydream_kit.data.headers import Header, ImageHeaderError, read_header
from everydream_kit.data.image_settings import (
    ImageSettings,
    caption_of,
    merge_tags,
    parse_settings,
    settings_from_text,
    settings_of,
)
from everydream_kit.data.reading_problems import MASK_SUFFIX, Problem
from everydream_kit.data.scan_cache import NEVER, Remembered
from everydream_kit.data.textfiles import TextError, read_mapping, read_text_and_doubt
from everydream_kit.plain_text import printable

T = TypeVar("T")


class Entry(NamedTuple):
    """One image to read.

    Attributes:
        path: absolute path of the file.
        relative: as the dataset keeps it, with `/`.
        companions: absolute paths of the files that speak about it, in the order in which they are read.
        mask: its loss mask, or None.
        settings: what its folder, or its entry in an index, says.
        settings_word: the same as `hash_settings` gives it, for the stamp; made once for each folder.
        listed: its caption in a table of its folder, which holds where no file of its own gives one; or None.
        unread_table: a table that may hold its caption and cannot be read, where no other table lists one; or None.
    """

    path: str
    relative: str
    companions: Sequence[str]
    mask: str | None
    settings: ImageSettings
    settings_word: int
    listed: str | None = None
    unread_table: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """Images that one worker reads in one go.

    Attributes:
        entries: the images.
        choose_lines: each line of a caption file is a caption of its own.
    """

    entries: tuple[Entry, ...]
    choose_lines: bool


def entries_of_folder(folder: Folder, names: Sequence[str]) -> tuple[Entry, ...]:
    """Images of a folder, each with the files that lie next to it."""
    companions, prefix = folder.companions, f"{folder.relative}/" if folder.relative else ""
    place = os.path.join(folder.path, "")
    settings_word = hash_settings(folder.settings)
    unread = unread_table(folder.tables)
    unread_word = hash_settings(folder.settings, f"\0{unread}")
    entries = []
    for name in names:
        mask = companions.mask_of(name)
        found = (companions.find(name, end) for end in SIDECAR_EXTENSIONS)
        listed = listed_caption(place + name, folder.tables)
        entries.append(
            Entry(
                path=place + name,
                relative=prefix + name,
                companions=[
                    place + file for file in found if file is not None and match_key(file) not in SETTINGS_FILES
                ],
                # masks were taken out of the images, so they are among the companions
                mask=None if mask is None else place + mask,
                settings=folder.settings,
                settings_word=hash_settings(folder.settings, listed)
                if listed is not None
                else settings_word
                if unread is None
                else unread_word,
                listed=listed,
                unread_table=unread if listed is None else None,
            )
        )
    return tuple(entries)


def read_job(job: Job, remembered: Remembered) -> Dataset:
    """Read the images of a job into a small dataset with one root, problems included."""
    builder = DatasetBuilder([""])
    rows = remembered.look_up([entry.relative for entry in job.entries])
    unchanged: list[int] = []
    for entry in job.entries:
        try:
            stamp = _stamp(entry, job.choose_lines)
        except OSError as error:
            builder.problems.append(_problem(entry.path, f"cannot be read: {error.strerror}", "Is it still there?"))
            continue
        row = rows.get(entry.relative)
        if row is not None and remembered.stamps[row] == stamp.files:
            unchanged.append(row)
            continue
        _copy_rows(builder, unchanged, remembered)
        known = None if row is None else remembered.header(row, stamp.file_bytes, stamp.mtime_ns)
        _read_entry(builder, entry, job.choose_lines, stamp, known)
    _copy_rows(builder, unchanged, remembered)
    return builder.build(Defaults())


def _copy_rows(builder: DatasetBuilder, rows: list[int], remembered: Remembered) -> None:
    """Append remembered rows, and empty the list."""
    if rows:
        builder.extend(remembered.rows(rows), root=0)
        rows.clear()


class _Stamp(NamedTuple):
    files: int  # a hash over the state of all files that the row depends on
    file_bytes: int
    mtime_ns: int


def _stamp(entry: Entry, choose_lines: bool) -> _Stamp:
    """The state of an image's files.

    Raises:
        OSError: the image, or a file next to it, has gone.
    """
    own = os.stat(entry.path)
    words = [own.st_size, own.st_mtime_ns, choose_lines, _mask_code(entry), entry.settings_word]
    for path in entry.companions:
        stat = os.stat(path)
        words += (ord(path[-2]), stat.st_size, stat.st_mtime_ns)  # the letter distinguishes text, yaml and json
    # Python's hash of a tuple of integers is 64 bits, not salted, and ten times faster than a digest. Should another
    # Python compute it otherwise, the folder is read again.
    return _Stamp(hash(tuple(words)), own.st_size, own.st_mtime_ns)


def hash_settings(settings: ImageSettings, listed: str = "") -> int:
    """A word for the stamp, equal in every process."""
    return int.from_bytes(hashlib.blake2b((repr(settings) + listed).encode(), digest_size=7).digest(), "little")


def _read_entry(
    builder: DatasetBuilder, entry: Entry, choose_lines: bool, stamp: _Stamp, header: Header | None
) -> None:
    """Read one image and append its row, or its problem."""
    num_problems = len(builder.problems)
    try:
        header = header or read_header(entry.path)
    except ImageHeaderError as error:
        builder.problems.append(_problem(entry.path, error.cause, error.cure))
        return
    if header.note:
        builder.problems.append(Problem(printable(entry.path), header.note, _NOTE_CURE, skipped=False))
    try:
        settings, kind, text = _read_words(entry, choose_lines, builder)
        if kind == FROM_FILE_NAME:
            _note_odd_name(entry, builder)
    except _CompanionError as error:
        builder.problems.append(_problem(*error.args))
        return
    if len(builder.problems) > num_problems:
        stamp = stamp._replace(files=NEVER)  # read it again next time, so that the note is made again
    _append(builder, entry, header, settings, caption=(kind, text), stamp=stamp)


def _read_words(entry: Entry, choose_lines: bool, builder: DatasetBuilder) -> tuple[ImageSettings, int, str]:
    """All settings of an image, and its caption as the dataset keeps it.

    Raises:
        _CompanionError: a file cannot be understood.
    """
    settings = entry.settings
    folder_has_words = settings.main_prompt is not None or bool(settings.tags)
    if not folder_has_words and len(entry.companions) == 1 and _is_caption(entry.companions[0]):
        text = _read_caption(entry.companions[0], builder).strip()
        return settings, (FROM_LINES if choose_lines and "\n" in text else FROM_TEXT), text
    has_own_words = False
    for path in entry.companions:
        if _is_caption(path):
            text = _read_caption(path, builder)
            said = settings_of(parse_caption_lines(text)) if choose_lines else settings_from_text(text)
        else:
            said = _read(path, lambda file: parse_settings(read_mapping(file)))
            report_notes(said, path, builder.problems.append)
        settings = settings.updated(said)
        has_own_words |= said.main_prompt is not None or bool(said.tags)
    if entry.unread_table is not None and not has_own_words:
        cause = f"its caption may be in {entry.unread_table}, of which not everything can be read"
        raise _CompanionError(entry.path, cause, "Fix the table, or put a caption file next to the image.")
    if entry.listed is not None and not has_own_words:
        settings = settings.updated(settings_from_text(entry.listed))
    return settings, *_caption_column(entry, settings)


class _CompanionError(Exception):
    """Of a file next to an image. Args: path, cause, cure."""


def _read(path: str, reader: Callable[[str], T]) -> T:
    try:
        return reader(path)
    except TextError as error:
        cure = "Fix the file or delete it; until then its image is skipped."
        raise _CompanionError(path, str(error), cure) from error
    except OSError as error:
        raise _CompanionError(path, f"cannot be read: {error.strerror}", "Check its permissions.") from error


def _read_caption(path: str, builder: DatasetBuilder) -> str:
    """A caption file's text; a doubt about its encoding is reported."""
    text, doubt = _read(path, read_text_and_doubt)
    if doubt:
        cure = "Save it as UTF-8: its letters are wrong as it is."
        builder.problems.append(Problem(printable(path), doubt, cure, skipped=False))
    return text


def _is_caption(path: str) -> bool:
    return path.lower().endswith((".txt", ".caption"))


def _note_odd_name(entry: Entry, builder: DatasetBuilder) -> None:
    """Report how a file name that is not UTF-8 is read, where it is the caption."""
    name = entry.relative.rpartition("/")[2]
    if readable(name) != name:
        caption = caption_from_file_name(name).text
        cause = f"its name is not UTF-8; the caption from it is read as Windows-1252: {caption!r}"
        cure = "Rename the file, or give it a caption file, if that is wrong."
        builder.problems.append(Problem(printable(entry.path), cause, cure, skipped=False))


_NOTE_CURE = "Nothing needs to be done, unless you meant another file."


def _caption_column(entry: Entry, settings: ImageSettings) -> tuple[int, str]:
    """The caption as the dataset keeps it: as short as it goes."""
    if settings.main_prompt is None and not settings.tags:
        return FROM_FILE_NAME, ""
    caption, needs_json = caption_of(settings, caption_from_file_name(entry.relative))
    if needs_json:
        return FROM_JSON, encode_caption(_with_shared_tags(caption, entry.settings))
    return FROM_TEXT, caption.text


def _with_shared_tags(caption: Caption, shared: ImageSettings) -> Caption:
    """Alternatives get the folder's tags, too, as the first caption did."""
    others = [
        replace(other, tags=merge_tags(other.tags, shared.tags, shared.weighted)) for other in caption.alternatives
    ]
    return combine_captions([replace(caption, alternatives=()), *others])


def _append(
    builder: DatasetBuilder,
    entry: Entry,
    header: Header,
    settings: ImageSettings,
    *,
    caption: tuple[int, str],
    stamp: _Stamp,
) -> None:
    builder.add(
        entry.relative,
        width=header.width,
        height=header.height,
        caption=caption[1],
        caption_kind=caption[0],
        batch_id=settings.batch_id or None,
        stamp=stamp.files,
        file_bytes=stamp.file_bytes,
        mtime_ns=stamp.mtime_ns,
        max_caption_length=settings.max_caption_length,
        multiply=settings.multiply,
        cond_dropout=settings.cond_dropout,
        flip_p=settings.flip_p,
        shuffle_tags=settings.shuffle_tags,
        keep_tags=settings.keep_tags,
        loss_scale=settings.loss_scale,
        rating=settings.rating,
        mask=_mask_code(entry),
        alpha=header.has_alpha,
    )


def _mask_code(entry: Entry) -> int:
    """How the dataset finds the mask again: see its column `mask`."""
    if entry.mask is None:
        return 0
    return 1 if entry.mask == os.path.splitext(entry.path)[0] + MASK_SUFFIX else 2


def _problem(path: str, cause: str, cure: str) -> Problem:
    return Problem(printable(path), cause, cure)
