"""Reading what belongs to a number of pictures: their headers, captions and masks.

A `Job` is some pictures of one folder (or of a `.json` index); `read_job` runs in a worker thread and gives rows for
the dataset. Pictures that the last scan knows, and whose files are as they were, are copied from there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from everydream_kit.data.captions import (
    Caption,
    caption_from_file_name,
    combine_captions,
    encode_caption,
    parse_caption_lines,
)
from everydream_kit.data.dataset import (
    FROM_FILE_NAME,
    FROM_JSON,
    FROM_LINES,
    FROM_TEXT,
    MASK_SUFFIX,
    Dataset,
    DatasetBuilder,
    Defaults,
    Problem,
    printable,
)
from everydream_kit.data.folders import SETTINGS_FILES, SIDECAR_EXTENSIONS, report_unknown
from everydream_kit.data.headers import Header, PictureError, read_header
from everydream_kit.data.scan_cache import Remembered
from everydream_kit.data.settings import PictureSettings, caption_of, parse_settings, settings_from_text
from everydream_kit.data.textfiles import TextError, read_mapping, read_text


@dataclass(frozen=True, slots=True)
class Entry:
    """One picture to read.

    Attributes:
        path: absolute path of the file.
        relative: as the dataset keeps it, with `/`.
        companions: absolute paths of the files that speak about it, in the order in which they are read.
        mask: its loss mask, or None.
        settings: what its folder, or its entry in an index, says.
    """

    path: str
    relative: str
    companions: tuple[str, ...]
    mask: str | None
    settings: PictureSettings


@dataclass(frozen=True, slots=True)
class Job:
    """Pictures that one worker reads in one go.

    Attributes:
        entries: the pictures.
        choose_lines: each line of a caption file is a caption of its own.
    """

    entries: tuple[Entry, ...]
    choose_lines: bool


def entries_of_folder(
    path: str, relative: str, names: Sequence[str], companions: frozenset[str], settings: PictureSettings
) -> tuple[Entry, ...]:
    """The pictures of a folder, each with the files that lie beside it."""
    prefix = f"{relative}/" if relative else ""
    entries = []
    for name in names:
        stem = os.path.splitext(name)[0]
        beside = [stem + extension for extension in SIDECAR_EXTENSIONS]
        mask = stem + MASK_SUFFIX
        entries.append(
            Entry(
                path=os.path.join(path, name),
                relative=prefix + name,
                companions=tuple(
                    os.path.join(path, file) for file in beside if file in companions and file not in SETTINGS_FILES
                ),
                # masks were taken out of the pictures, so they are among the companions
                mask=os.path.join(path, mask) if mask in companions else None,
                settings=settings,
            )
        )
    return tuple(entries)


def read_job(job: Job, remembered: Remembered) -> Dataset:
    """Read the pictures of a job into a small dataset with one root, problems included."""
    builder = DatasetBuilder([""])
    known: list[int] = []
    for entry in job.entries:
        try:
            stamp, size, mtime = _stamp(entry, job.choose_lines)
        except OSError as error:
            builder.problems.append(
                _problem(entry.path, f"cannot be read: {error.strerror}", "Check that it is still there.")
            )
            continue
        index = remembered.find(entry.relative, stamp)
        if index is None:
            _flush(builder, known, remembered)
            _read_entry(builder, entry, job.choose_lines, (stamp, size, mtime), remembered)
        else:
            known.append(index)
            builder.problems += remembered.remarks(entry.path)
    _flush(builder, known, remembered)
    return builder.build(Defaults())


def _flush(builder: DatasetBuilder, known: list[int], remembered: Remembered) -> None:
    """Copy the remembered rows that have gathered."""
    if known:
        builder.extend(remembered.rows(known), root=0)
        known.clear()


def _stamp(entry: Entry, choose_lines: bool) -> tuple[int, int, int]:
    """A hash over the state of all files that the row depends on, and the picture's size and time.

    Raises:
        OSError: the picture, or a file beside it, has gone.
    """
    own = os.stat(entry.path)
    words: list[object] = [own.st_size, own.st_mtime_ns, choose_lines, entry.mask is not None, entry.settings]
    for path in entry.companions:
        stat = os.stat(path)
        words += [os.path.splitext(path)[1], stat.st_size, stat.st_mtime_ns]
    digest = hashlib.blake2b(repr(words).encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True), own.st_size, own.st_mtime_ns


def _read_entry(
    builder: DatasetBuilder, entry: Entry, choose_lines: bool, stamp: tuple[int, int, int], remembered: Remembered
) -> None:
    """Read one picture and append its row, or its problem."""
    try:
        header = remembered.header(entry.relative, *stamp[1:]) or read_header(entry.path)
    except PictureError as error:
        builder.problems.append(_problem(entry.path, error.cause, error.cure))
        return
    settings = entry.settings
    texts: list[str] = []
    try:
        for path in entry.companions:
            settings = settings.updated(_read_companion(path, texts, choose_lines, builder))
    except TextError as error:
        cure = "Mend the file or delete it; until then its picture is left out."
        builder.problems.append(_problem(path, str(error), cure))
        return
    except OSError as error:
        builder.problems.append(_problem(path, f"cannot be read: {error.strerror}", "Check its permissions."))
        return
    if header.remark:
        builder.problems.append(Problem(printable(entry.path), header.remark, _REMARK_CURE, skipped=False))
    kind, text = _caption_column(entry, settings, texts, choose_lines)
    _append(builder, entry, header, settings, caption=(kind, text), stamp=stamp)


_REMARK_CURE = "Nothing needs to be done, unless you meant another file."


def _read_companion(path: str, texts: list[str], choose_lines: bool, builder: DatasetBuilder) -> PictureSettings:
    """What one file beside a picture says. The text of caption files is put into `texts`, too."""
    if path.lower().endswith((".txt", ".caption")):
        text = read_text(path).strip()
        texts.append(text)
        if choose_lines:
            return _settings_from_lines(text)
        return settings_from_text(text)
    said = parse_settings(read_mapping(path))
    report_unknown(said, path, builder.problems.append)
    return said


def _settings_from_lines(text: str) -> PictureSettings:
    caption = parse_caption_lines(text)
    return PictureSettings(main_prompt=caption.main_prompt, tags=caption.tags, alternatives=caption.alternatives)


def _caption_column(entry: Entry, settings: PictureSettings, texts: list[str], choose_lines: bool) -> tuple[int, str]:
    """The caption as the dataset keeps it: as short as it goes."""
    folder_says_nothing = entry.settings.main_prompt is None and not entry.settings.tags
    if folder_says_nothing and len(texts) == len(entry.companions) == 1:
        return (FROM_LINES if choose_lines and "\n" in texts[0] else FROM_TEXT), texts[0]
    if settings.main_prompt is None and not settings.tags:
        return FROM_FILE_NAME, ""
    caption, needs_json = caption_of(settings, caption_from_file_name(entry.relative))
    if needs_json:
        return FROM_JSON, encode_caption(_with_shared_tags(caption, entry.settings))
    return FROM_TEXT, caption.text


def _with_shared_tags(caption: Caption, shared: PictureSettings) -> Caption:
    """Alternatives get the folder's tags, too, as the first caption did."""
    others = [replace(other, tags=(*other.tags, *shared.tags)) for other in caption.alternatives]
    return combine_captions([replace(caption, alternatives=()), *others])


def _append(
    builder: DatasetBuilder,
    entry: Entry,
    header: Header,
    settings: PictureSettings,
    *,
    caption: tuple[int, str],
    stamp: tuple[int, int, int],
) -> None:
    builder.add(
        entry.relative,
        width=header.width,
        height=header.height,
        caption=caption[1],
        caption_kind=caption[0],
        batch_id=settings.batch_id or None,
        stamp=stamp[0],
        file_bytes=stamp[1],
        mtime_ns=stamp[2],
        max_caption_length=settings.max_caption_length,
        multiply=settings.multiply,
        cond_dropout=settings.cond_dropout,
        flip_p=settings.flip_p,
        shuffle_tags=settings.shuffle_tags,
        keep_tags=settings.keep_tags,
        loss_scale=settings.loss_scale,
        rating=settings.rating,
        mask=entry.mask is not None,
        alpha=header.has_alpha,
    )


def _problem(path: str, cause: str, cure: str) -> Problem:
    return Problem(printable(path), cause, cure)
