"""Preparation steps that a person runs on a folder of images: smaller copies, other formats, duplicates, a split.

Each step has a dry run, reports what it did, and leaves the originals' bytes alone: copies go to a target folder, and
what is excluded is moved with its captions, and can be moved back (`changes.undo`). Captions are
`tagging`'s and `captioning`'s business.
"""

from __future__ import annotations

import io
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageOps

from everydream_kit.config import default_of
from everydream_kit.data.caption_tables import FOLDER_TABLES
from everydream_kit.data.changes import Changes, PrepReport, undo
from everydream_kit.data.dataset import Dataset
from everydream_kit.data.duplicates import find_duplicates
from everydream_kit.data.folders import SETTINGS_FILES, SIDECAR_EXTENSIONS, FolderFiles, match_key
from everydream_kit.data.image_files import EXTENSIONS, IMAGE_ERRORS, open_image
from everydream_kit.data.scanning import scan_dataset
from everydream_kit.draws import derive_seed
from everydream_kit.errors import ConfigError

__all__ = ["convert_images", "exclude_duplicates", "resize_images", "split_validation", "undo"]

Progress = Callable[[int, int], None]
"""Called with the number of images done, and how many there are."""

FORMATS = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
"""What can be converted to."""

JOURNAL = "undo.jsonl"


def resize_images(
    folder: str | Path,
    target: str | Path,
    *,
    megapixels: float = 1.5,
    quality: int = 95,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PrepReport:
    """Make smaller copies of large images, with captions and settings, for a dataset that loads faster.

    Images that are small enough are copied as they are. EXIF rotation is applied; color profiles stay.

    Args:
        folder: dataset folder.
        target: new folder, of the same tree. What already exists is left alone, so an interrupted step can be continued.
        megapixels: largest area of a copy; 1.5 leaves crop jitter room at 1024 px, 0.4 at 512 px.
        quality: of JPEG and WebP copies, 1 to 100.
        dry_run: only report.
        progress: called with images done and in all.
    """
    if megapixels <= 0:
        raise ConfigError(f"megapixels: must be greater than 0 (got {megapixels})")

    def resize(path: Path, copy: Path) -> bytes | None:
        with open_image(path) as image:
            scale = math.sqrt(megapixels * 1e6 / (image.width * image.height))
            if scale >= 1:
                return None
            upright = ImageOps.exif_transpose(image)
            size = (max(1, round(upright.width * scale)), max(1, round(upright.height * scale)))
            smaller = upright.convert("RGBA") if upright.mode in ("P", "PA") else upright
            resample = Image.Resampling.BOX if smaller.mode.startswith(("I", "1")) else Image.Resampling.LANCZOS
            return _encode(smaller.resize(size, resample), image, copy.suffix, quality)

    return _rewrite("Resize images", folder, target, resize, None, "resized", dry_run, progress)


def convert_images(
    folder: str | Path,
    target: str | Path,
    *,
    suffix: str = ".webp",
    quality: int = 95,
    background: str = default_of("background"),
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PrepReport:
    """Make copies in another format, with captions and settings.

    Args:
        folder: dataset folder.
        target: new folder, of the same tree. What already exists is left alone.
        suffix: ".jpg", ".png" (lossless) or ".webp".
        quality: of JPEG and WebP, 1 to 100.
        background: "#rrggbb" behind transparent images that become JPEGs.
        dry_run: only report.
        progress: called with images done and in all.
    """
    if suffix not in FORMATS:
        raise ConfigError(f"suffix: must be one of {', '.join(FORMATS)} (got {suffix!r})")

    def convert(path: Path, copy: Path) -> bytes | None:
        with open_image(path) as image:
            if image.format == FORMATS[suffix]:
                return None
            upright = ImageOps.exif_transpose(image)
            if suffix == ".jpg" and upright.has_transparency_data:
                behind = Image.new("RGBA", upright.size, background)
                upright = Image.alpha_composite(behind, upright.convert("RGBA"))
            return _encode(upright, image, suffix, quality)

    return _rewrite(f"Convert images to {suffix}", folder, target, convert, suffix, "converted", dry_run, progress)


def _rewrite(  # noqa: PLR0917
    title: str,
    folder: str | Path,
    target: str | Path,
    make: Callable[[Path, Path], bytes | None],
    suffix: str | None,
    what: str,
    dry_run: bool,
    progress: Progress | None,
) -> PrepReport:
    """Copy a dataset, with `make(image, copy)` giving the bytes of what is not copied as it is."""
    root, target = Path(folder).resolve(), Path(target).resolve()
    _refuse_nesting(root, target)
    dataset = scan_dataset(root)
    changes = Changes(f"{title}: {root} to {target}", dry_run=dry_run, root=target)
    changes.report.problems.extend(dataset.problems)
    taken: set[Path] = set()
    for index in range(len(dataset)):
        path = Path(dataset.path(index))
        copy = target / path.relative_to(root)
        copy = copy if suffix is None else copy.with_suffix(suffix)
        if copy in taken:
            changes.leave(path, f"another image becomes {copy.name} too.", "Rename one of them.")
        elif not copy.exists():
            try:
                content = make(path, copy)
            except IMAGE_ERRORS as error:
                changes.leave(path, f"cannot be decoded ({error}).", "Replace it with an intact copy, or delete it.")
                continue
            if content is None:
                changes.copy(path, target / path.relative_to(root))
            else:
                changes.write(copy, content, what, path)
        taken.add(copy)
        if progress is not None:
            progress(index + 1, len(dataset))
    files = FolderFiles()
    companions = {c for i in range(len(dataset)) for c in files.companions(Path(dataset.path(i)))}
    for path in sorted(companions | set(_folder_files(root))):
        if not (target / path.relative_to(root)).exists():
            changes.copy(path, target / path.relative_to(root), "copied next to them")
    return changes.report


def _encode(image: Image.Image, original: Image.Image, suffix: str, quality: int) -> bytes:
    """An image as the bytes of a file; its color profile stays."""
    suffix = suffix.lower()
    name = FORMATS.get(suffix) or EXTENSIONS.get(suffix) or "PNG"
    if name == "JPEG" and image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    options = {} if name in ("PNG", "BMP") else {"quality": quality}
    if name == "JPEG":
        options |= {"subsampling": 0 if quality >= 90 else 2, "optimize": True}
    profile = original.info.get("icc_profile")
    if profile and name != "BMP":
        options["icc_profile"] = profile
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def exclude_duplicates(
    folder: str | Path,
    side_folder: str | Path | None = None,
    *,
    near: bool = True,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PrepReport:
    """Move all but the best of each group of duplicates into a side folder, with their captions.

    The best has the most pixels, then a caption file, then the most bytes. `undo` moves them back.

    Args:
        folder: dataset folder.
        side_folder: by default `<folder>-duplicates` next to it. Must not lie in the dataset.
        near: images that look alike count too, not only equal files.
        dry_run: only report.
        progress: called with images looked at and in all.
    """
    root = Path(folder).resolve()
    side = root.with_name(f"{root.name}-duplicates") if side_folder is None else Path(side_folder).resolve()
    _refuse_nesting(root, side)
    dataset = scan_dataset(root)
    count = len(dataset)
    found = find_duplicates(dataset, near=near, progress=None if progress is None else lambda n: progress(n, count))
    changes = Changes(
        f"Set duplicates in {root} aside to {side}", dry_run=dry_run, journal=side / JOURNAL, root=root, side=side
    )
    changes.report.problems.extend([*dataset.problems, *found.unreadable])
    files = FolderFiles()
    for group in _joined_groups(count, [*found.exact, *found.near]):
        if len(group) > 1:
            best = max(group, key=lambda index: worth(dataset, index, files))
            leaving = [Path(dataset.path(index)) for index in group if index != best]
            name = Path(dataset.path(best)).relative_to(root)
            move_images(changes, leaving, root, side, f"exclude (duplicate of {name})")
    return changes.report


def worth(dataset: Dataset, index: int, files: FolderFiles) -> tuple[int, bool, int, int]:
    """Which of several duplicates is kept: the greatest has the most pixels, then a caption, then the most bytes."""
    numbers = dataset.numbers
    captioned = any(c.suffix in SIDECAR_EXTENSIONS for c in files.companions(Path(dataset.path(index))))
    pixels = int(numbers["width"][index]) * int(numbers["height"][index])
    return (pixels, captioned, int(numbers["file_bytes"][index]), -index)


def split_validation(
    folder: str | Path,
    target: str | Path,
    *,
    share: float = 0.15,
    seed: int = default_of("seed"),
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PrepReport:
    """Move a share of the images into a validation folder, with captions and folder settings.

    Images that look alike stay together, so that validation does not ask for what was trained on. Which groups go is
    drawn from (seed, name of the group's first image): more images later change nothing about the others' draw.

    Args:
        folder: dataset folder.
        target: validation folder; must not lie in the dataset.
        share: of the images, between 0 and 1.
        seed: of the draw.
        dry_run: only report.
        progress: called with images looked at and in all.
    """
    if not 0 < share < 1:
        raise ConfigError(f"share: must lie between 0 and 1 (got {share})")
    root, target = Path(folder).resolve(), Path(target).resolve()
    _refuse_nesting(root, target)
    dataset = scan_dataset(root)
    count = len(dataset)
    found = find_duplicates(dataset, progress=None if progress is None else lambda n: progress(n, count))
    groups = list(_joined_groups(count, [*found.exact, *found.near]))
    groups.sort(key=lambda group: derive_seed(seed, "split", min(map(dataset.key, group))))
    changes = Changes(
        f"Split {share:.0%} of {root} off to {target}",
        dry_run=dry_run,
        journal=target / JOURNAL,
        root=root,
        side=target,
    )
    changes.report.problems.extend([*dataset.problems, *found.unreadable])
    left = max(1, math.ceil(share * count)) if count > 1 else 0
    for group in groups:
        if len(group) <= left:
            left -= len(group)
            paths = [Path(dataset.path(index)) for index in group]
            move_images(changes, paths, root, target, "moved to validation")
    for path in _folder_files(root):
        if changes.report.changes and not (target / path.relative_to(root)).exists():
            changes.copy(path, target / path.relative_to(root), "copied next to them")
    return changes.report


def _joined_groups(count: int, groups: Iterable[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """Every index in exactly one group: groups that share a member are one, the others are groups of one."""
    group_of: dict[int, set[int]] = {index: {index} for index in range(count)}
    for group in groups:
        together = set().union(*(group_of[index] for index in group))
        group_of.update(dict.fromkeys(together, together))
    for index in range(count):
        if min(group_of[index]) == index:
            yield tuple(sorted(group_of[index]))


def move_images(changes: Changes, paths: Sequence[Path], root: Path, target: Path, what: str) -> None:
    """Move images with what belongs to them into a folder of the same tree.

    Captions that another image uses too are copied. Where something of one of their names already exists, all get a
    number: nothing is overwritten, and none is left behind.

    Args:
        paths: files below `root`.
        target: where they go.
        what: in words, for the report.
    """
    leaving, files = set(paths), FolderFiles()
    companions = {path: files.companions(path) for path in paths}
    moved: set[Path] = set()
    for path in paths:
        siblings = {path.with_suffix(suffix) for ext in EXTENSIONS for suffix in (ext, ext.upper())} - leaving - {path}
        stays = any(sibling.exists() for sibling in siblings)
        family = [path, *(one for one in companions[path] if one not in moved)]
        for member, place in zip(family, _free_places(family, root, target), strict=True):
            if member == path:
                changes.move(member, place, what)
            else:
                (changes.copy if stays else changes.move)(member, place, "went with them")
            moved.add(member)
    for table in _tables_of(paths, root):
        if not (target / table.relative_to(root)).exists():
            changes.copy(table, target / table.relative_to(root), "went with them")


def _tables_of(images: Sequence[Path], root: Path) -> list[Path]:
    """Tables that may hold captions of these images."""
    above = {folder for image in images for folder in image.parents if folder == root or root in folder.parents}
    return sorted(path for folder in above for path in folder.iterdir() if match_key(path.name) in FOLDER_TABLES)


def _free_places(family: list[Path], root: Path, target: Path) -> list[Path]:
    """Where the files of an image go so that they replace nothing and still belong together."""
    stem = family[0].stem
    for number in itertools.count(1):
        new = stem if number == 1 else f"{stem}-{number}"
        names = [one.name if number == 1 else new + _ending_of(one.name, family[0]) for one in family]
        places = [target / one.relative_to(root).with_name(name) for one, name in zip(family, names, strict=True)]
        if not any(os.path.lexists(place) for place in places):
            return places
    raise AssertionError("unreachable: numbers do not end")


def _ending_of(name: str, image: Path) -> str:
    """What follows an image's stem in the name of a file that belongs to it, whatever its case and Unicode form."""
    if name.startswith(image.stem):
        return name[len(image.stem) :]
    head, ending = os.path.splitext(name)
    return image.suffix + ending if match_key(head) == match_key(image.name) else ending


def _folder_files(root: Path) -> list[Path]:
    """Files that set something for a whole folder: settings, and tables of captions."""
    names = (*SETTINGS_FILES, *FOLDER_TABLES)
    return sorted(path for path in root.rglob("*") if match_key(path.name) in names and path.is_file())


def _refuse_nesting(root: Path, target: Path) -> None:
    if target == root or root in target.parents or target in root.parents:
        raise ConfigError(
            f"{target}: must lie outside of {root} and not around it, or the copies become part of the dataset."
        )
