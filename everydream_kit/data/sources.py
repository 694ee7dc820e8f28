"""Datasets that are not a folder yet: archives, which are unpacked safely, and Hub datasets, which are fetched.

An archive is untrusted: every entry is looked at before it is written, and what could reach outside of the target
folder (`..`, absolute paths, links, devices) or fill the disk is refused with the entry's name. It is unpacked into a
hidden folder next to the target and renamed when complete, so a refusal or an interruption leaves nothing behind, and a
folder of the final name is complete. Not here: finding images in the folder (`scanning`).
"""

from __future__ import annotations

import hashlib
import logging
import lzma
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

from everydream_kit.atomic import sweep, temporary_path
from everydream_kit.data.caption_tables import FOLDER_TABLES, UNREAD_TABLE, table_cure
from everydream_kit.data.image_files import EXTENSIONS
from everydream_kit.disk_space import compare_sizes, free_disk
from everydream_kit.errors import DataError, DiskSpaceError

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_BYTES = 200 * 2**30
"""Most that one archive may unpack to: about 50 000 large photographs."""
MAX_ENTRIES = 5_000_000
"""Most entries of one archive: a million images with captions, masks and settings."""

MAX_DEPTH = 64
"""Folders in each other; the system itself gives up at some thousand, with an error of its own."""

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 2**20
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$) *(\..*)?", re.IGNORECASE)
"""Names that Windows gives to devices, with any extension (learn.microsoft.com, "Naming Files, Paths, and Namespaces")."""
_NOT_IN_NAMES = re.compile(r'[<>:"|?*\x00-\x1f]')
_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, NotImplementedError)
_HUB_ID = re.compile(r"()([\w.-]+/[\w.-]+)()()")
_HUB_URL = re.compile(r"(hf://datasets/)([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.*))?")
_WANTED = (
    *(name[1:] for name in EXTENSIONS),
    *("txt", "caption", "yaml", "yml", "json"),
    *("zip", "tar", "gz", "tgz", "bz2", "xz"),
)
_HUB_PATTERNS = [
    *(f"*.{spelt}" for name in _WANTED for spelt in (name, name.upper())),
    *(f"*{name}" for name in (*FOLDER_TABLES, UNREAD_TABLE)),
]

Fetch = Callable[[str, str | None], Path]
"""Downloads a Hub dataset: (owner/name, revision or None) -> local folder."""


def kind_of_source(spec: str) -> Literal["folder", "index", "archive", "hub"]:
    """What a person's words for a dataset name.

    Raises:
        DataError: nothing that is there, or a file that is not a dataset; the message says which.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        return "folder"
    if path.is_file():
        name = path.name.lower()
        if name.endswith(ARCHIVES) or name.endswith(".json"):
            return "index" if name.endswith(".json") else "archive"
        raise DataError(f"{path}: not a folder, a .json index or an archive ({', '.join(ARCHIVES)}).{table_cure(path)}")
    if spec.startswith("hf://") or (_HUB_ID.fullmatch(spec) and spec[0] not in "./~"):
        return "hub"
    kind = "file" if path.name.lower().endswith((*ARCHIVES, ".json")) else "folder"
    raise DataError(f"{path.absolute()}: there is no such {kind}. Check the spelling, and that its disk is mounted.")


def open_source(
    spec: str,
    work_dir: Path,
    *,
    max_bytes: int = MAX_BYTES,
    max_entries: int = MAX_ENTRIES,
    fetch: Fetch | None = None,
) -> Path:
    """The folder that an archive or a Hub dataset becomes. A second call finds it there.

    Args:
        spec: path of an archive, `owner/name`, or `hf://datasets/owner/name[@revision][/folder]`.
        work_dir: archives are unpacked into a folder of their own in it.
        max_bytes, max_entries: limits of one archive.
        fetch: downloads Hub datasets; huggingface_hub's `snapshot_download` unless given.

    Raises:
        DataError: the archive is damaged or unsafe, or the dataset cannot be fetched.
        DiskSpaceError: the archive does not fit on the disk.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        return unpack_archive(path, Path(work_dir), max_bytes=max_bytes, max_entries=max_entries)
    match = _HUB_URL.fullmatch(spec) or _HUB_ID.fullmatch(spec)
    if not match:
        raise DataError(f"{spec}: neither an archive ({', '.join(ARCHIVES)}) nor a Hub dataset such as owner/name.")
    _, repo_id, revision, inner = match.groups()
    folder = (fetch or _fetch_snapshot)(repo_id, revision or None)
    return _inside_snapshot(spec, folder, inner, Path(work_dir), (max_bytes, max_entries))


def unpack_archive(
    archive: Path, work_dir: Path, *, max_bytes: int = MAX_BYTES, max_entries: int = MAX_ENTRIES
) -> Path:
    """Unpack an archive into a folder of its own, once.

    Args:
        archive: `.zip`, `.tar`, or a compressed tar.
        work_dir: where the folder is made; named after the archive and its size and time.
        max_bytes, max_entries: limits of what comes out.

    Raises:
        DataError: damaged, or an entry is refused; the message names it, and nothing is left behind.
        DiskSpaceError: it does not fit on the disk.
    """
    target = work_dir / f"{archive.name.split('.')[0]}-{_stamp(archive)}"
    if target.is_dir():
        return target
    work_dir.mkdir(parents=True, exist_ok=True)
    sweep(work_dir)  # of what was killed while it unpacked
    unfinished = temporary_path(work_dir)
    unfinished.mkdir()
    try:
        _unpack_into(archive, unfinished, max_bytes, max_entries)
        os.replace(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _stamp(archive: Path) -> str:
    """Names one state of one archive file."""
    status = archive.stat()
    text = f"{archive.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    return hashlib.blake2b(os.fsencode(text), digest_size=5).hexdigest()


@dataclass(frozen=True, slots=True)
class _Entry:
    """One entry of an archive of any kind."""

    name: str
    kind: str  # "file", "folder", or in words what it is instead
    num_bytes: int  # as the archive claims
    open: Callable[[], IO[bytes]]


def _unpack_into(archive: Path, folder: Path, max_bytes: int, max_entries: int) -> None:
    free = free_disk(folder)
    claimed = 0
    name = "its beginning"
    try:
        with ExitStack() as stack:
            for number, entry in enumerate(_entries(archive, stack)):
                name = entry.name
                target = _safe_target(archive, entry, folder)
                claimed += entry.num_bytes
                if number >= max_entries:
                    raise DataError(f"{archive}: more than {max_entries:,} entries, {name!r} is the first too many.")
                if claimed > max_bytes:
                    raise DataError(
                        f"{archive}: unpacks to more than {max_bytes / 2**30:,.1f} GiB, {name!r} goes beyond it. "
                        f"If that is right, unpack it yourself and give the folder."
                    )
                if claimed > free:
                    raise DiskSpaceError(
                        f"{archive}: {compare_sizes(claimed, free)} in {folder.parent}, without the entries after "
                        f"{name!r}. Free some, or unpack it to another disk and give the folder."
                    )
                _write_entry(archive, entry, target)
    except _DAMAGED as error:
        raise DataError(f"{archive}: damaged at {name!r} ({error}). Copy or download it again.") from error
    except (OSError, UnicodeError) as error:
        raise DataError(f"{archive}: {name!r} cannot be unpacked ({error}).") from error


def _write_entry(archive: Path, entry: _Entry, target: Path) -> None:
    """Write one entry, and no more bytes than it claims."""
    if entry.kind == "folder":
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    left = entry.num_bytes
    with entry.open() as source, target.open("xb") as file:
        while chunk := source.read(_CHUNK_BYTES):
            left -= len(chunk)
            if left < 0:
                raise DataError(
                    f"{archive}: {entry.name!r} holds more bytes than it claims; the archive is not trusted."
                )
            file.write(chunk)


def _safe_target(archive: Path, entry: _Entry, folder: Path) -> Path:
    """Where an entry is written; refuses what may not be."""

    def refuse(cause: str) -> DataError:
        return DataError(
            f"{archive}: the entry {entry.name!r} {cause}; nothing was unpacked. "
            f"An archive of images does not need it: create it again, or ask its author."
        )

    if entry.kind not in ("file", "folder"):
        raise refuse(f"is {entry.kind}")
    parts = entry.name.replace("\\", "/").split("/")
    if ".." in parts:
        raise refuse("leads out of the folder ('..')")
    if entry.name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", entry.name):
        raise refuse("is an absolute path")
    if "\0" in entry.name:
        raise refuse("has a zero byte in its name")
    if os.name == "nt" and (part := next(filter(is_refused_by_windows, parts), None)):
        raise refuse(f"has a part that Windows does not allow in names ({part!r})")
    if len(parts) > MAX_DEPTH:
        raise refuse(f"lies {len(parts) - 1} folders deep")
    return folder.joinpath(*(part for part in parts if part not in ("", ".")))


def is_refused_by_windows(part: str) -> bool:
    """Whether a file or folder cannot have this name on Windows, or would get another one there."""
    if part in ("", "."):
        return False
    return bool(_DEVICES.fullmatch(part) or _NOT_IN_NAMES.search(part) or part.endswith((".", " ")))


def _entries(archive: Path, stack: ExitStack) -> Iterator[_Entry]:
    """Entries of a zip or tar, in their order."""
    if zipfile.is_zipfile(archive):
        opened = stack.enter_context(zipfile.ZipFile(archive))
        warned = False
        for info in opened.infolist():
            name = _zip_name(info)
            is_guess = name == info.orig_filename and not name.isascii() and not info.flag_bits & _ZIP_UTF8
            if is_guess and not warned:
                warned = True
                logger.warning(
                    "%s: names such as %r are in an unknown code page; captions from file names will be wrong. Pack it "
                    "again with UTF-8 names, or give caption files.",
                    archive,
                    name,
                )
            yield _Entry(name, _zip_kind(info), info.file_size, partial(opened.open, info))
        return
    # in one pass: a compressed tar is not read twice
    stream = stack.enter_context(tarfile.open(archive, "r|*"))  # noqa: SIM115
    for member in stream:
        yield _Entry(member.name, _tar_kind(member), member.size, partial(_extract, stream, member))


def _extract(stream: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    file = stream.extractfile(member)
    if file is None:  # only of what is not a regular file, which was refused before
        raise tarfile.TarError("no contents")
    return file


_ZIP_UTF8 = 0x800
"""Flag of an entry whose name is UTF-8; without it zipfile reads code page 437, as the format says."""


def _zip_name(info: zipfile.ZipInfo) -> str:
    """The name of an entry. Many tools write UTF-8 and do not say so."""
    if info.flag_bits & _ZIP_UTF8 or info.orig_filename.isascii():
        return info.orig_filename
    try:
        return info.orig_filename.encode("cp437").decode()
    except UnicodeError:
        return info.orig_filename


def _zip_kind(info: zipfile.ZipInfo) -> str:
    if info.flag_bits & 1:
        return "encrypted"
    if info.is_dir():
        return "folder"
    mode = info.external_attr >> 16  # of Unix archives; 0 elsewhere
    if stat.S_ISLNK(mode):
        return "a link"
    return "file" if stat.S_IFMT(mode) in (0, stat.S_IFREG) else "a device or pipe"


def _tar_kind(member: tarfile.TarInfo) -> str:
    if member.isdir():
        return "folder"
    if member.issym() or member.islnk():
        return "a link"
    return "file" if member.isreg() else "a device or pipe"


def _fetch_snapshot(repo_id: str, revision: str | None) -> Path:
    """Download a Hub dataset into the Hub's own cache, which continues where it was interrupted."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    # httpx's HTTPError with huggingface_hub 1.x, httpx2's with 2.x: the client's own error is made of it
    network = [base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"]
    expected: tuple[type[Any], ...] = (OSError, ValueError, *network)
    try:
        folder = snapshot_download(repo_id, repo_type="dataset", revision=revision, allow_patterns=_HUB_PATTERNS)
    except expected as error:
        cause = next(iter(str(error).splitlines()), "no answer")
        raise DataError(
            f"{repo_id}: this dataset cannot be fetched from the Hugging Face Hub ({type(error).__name__}: {cause}). "
            f"Check the name and the network; a private or gated dataset needs a login whose token may read it. "
            f"If you mean a folder: there is none of that name."
        ) from error
    return Path(folder)


def _inside_snapshot(spec: str, folder: Path, inner: str | None, work_dir: Path, limits: tuple[int, int]) -> Path:
    """The folder of images within a fetched dataset: all of it, a subfolder, or its one archive."""
    if inner:
        folder = folder / inner.strip("/")
        if ".." in Path(inner).parts or not folder.exists():
            raise DataError(f"{spec}: the dataset has no folder {inner!r}.")
    if folder.is_file():
        return unpack_archive(folder, work_dir, max_bytes=limits[0], max_entries=limits[1])
    files = [path for path in folder.rglob("*") if path.is_file()]
    archives = [path for path in files if path.name.lower().endswith(ARCHIVES)]
    images = any(path.suffix.lower() in EXTENSIONS for path in files)
    if not images and len(archives) == 1:
        return unpack_archive(archives[0], work_dir, max_bytes=limits[0], max_entries=limits[1])
    if not images:
        cure = ". Datasets kept as tables (parquet) must be saved as a folder of images first."
        cure = f" but {len(archives)} archives; name one: {spec}/{archives[0].name}." if archives else cure
        raise DataError(f"{spec}: this Hub dataset holds no image files{cure}")
    return folder
