"""The images of a project as a list that can be searched and edited, every change with its undo. No widgets here.

Built on the functions of the command line: captions are read and written by `data.tagging`, so every encoding keeps its
text; each step goes through `data.changes` with a journal on disk, so undo survives the kernel, a full disk and a step
that fails half-way. A caption that is in a `.yaml` or `.json` is shown and not edited, since its tags may carry weights
that a line of text cannot. Nothing is deleted: excluded files are moved into a folder next to the dataset.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from everydream_kit.data.captions import is_camera_name
from everydream_kit.data.changes import Changes, PrepReport, journal_label, undo
from everydream_kit.data.dataset import FROM_FILE_NAME, Dataset
from everydream_kit.data.folders import FolderFiles
from everydream_kit.data.image_settings import parse_settings
from everydream_kit.data.reading_problems import MASK_SUFFIX
from everydream_kit.data.scanning import scan_dataset
from everydream_kit.data.tagging import CaptionSource, caption_source, change_tags, edit_captions, split_tags
from everydream_kit.data.textfiles import TextError, parse_yaml, read_mapping, read_text
from everydream_kit.data.tidying import move_images
from everydream_kit.errors import DataError

SETTINGS = ("multiply", "cond_dropout", "flip_p", "loss_scale")
"""What can be set for a folder or an image here."""

Edit = Callable[[str], str]
"""The new text of a caption file, from its present one."""


class Album:
    """The images below a folder, in the data engine's order.

    Attributes:
        root: the dataset folder.
        excluded: the folder that excluded files are moved to.
        dataset: the last scan.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).resolve()
        self.excluded = self.root.with_name(f"{self.root.name}-excluded")
        self._journals = self.root.with_name(f"{self.root.name}-undo")
        self.reload()

    def reload(self) -> None:
        """Scan again."""
        self.dataset: Dataset = scan_dataset(str(self.root))
        self._forget()

    def _forget(self) -> None:
        self._sources: dict[int, CaptionSource] = {}
        self._files = FolderFiles()

    def __len__(self) -> int:
        return len(self.dataset)

    def path(self, index: int) -> Path:
        return Path(self.dataset.path(index))

    def name(self, index: int) -> str:
        """Path relative to the dataset folder."""
        return str(self.dataset.paths[index])

    def source(self, index: int) -> CaptionSource:
        """Where the caption comes from, and its text."""
        if index not in self._sources:
            self._sources[index] = caption_source(self.dataset, index, self._files)
        return self._sources[index]

    def caption(self, index: int) -> str:
        """The caption as its file spells it, or as the file name gives it. Empty where the name describes nothing."""
        return self.source(index).text.strip()

    def count_captions(self) -> tuple[int, int]:
        """How many images are captioned by their file names, and how many have no caption at all.

        A name that cameras and downloads give (`IMG`, `DSC`, a number) is not a caption.
        """
        names = [i for i, kind in enumerate(self.dataset.numbers["caption_kind"].tolist()) if kind == FROM_FILE_NAME]
        nameless = sum(is_camera_name(self.dataset.caption(index).text) for index in names)
        is_named = set(names)
        empty = sum(1 for index in range(len(self)) if index not in is_named and not self.dataset.caption(index).text)
        return len(names) - nameless, nameless + empty

    def search(self, words: str) -> list[int]:
        """Images whose caption or path holds every word, and none written as `-word`; without words all images."""
        wanted = words.lower().split()
        if not wanted:
            return list(range(len(self)))
        found = []
        for index in range(len(self)):
            text = f"{self.name(index)} {self.caption(index)}".lower()
            if all((word[1:] not in text) if word[:1] == "-" and word[1:] else word in text for word in wanted):
                found.append(index)
        return found

    def count_tags(self, indices: Iterable[int] | None = None, most: int = 24) -> list[tuple[str, int]]:
        """The most frequent tags, with the number of images that have them."""
        counts: dict[str, int] = {}
        for index in indices if indices is not None else range(len(self)):
            for part in set(split_tags(self.caption(index))):
                counts[part] = counts.get(part, 0) + 1
        return sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))[:most]

    def folders(self) -> list[str]:
        """Folders that hold images, relative to the root; the root itself is `.`."""
        return sorted({str(Path(name).parent) for name in self.dataset.paths})

    # Changes

    def set_caption(self, index: int, text: str) -> None:
        """Write a caption to its file.

        Raises:
            DataError: it cannot be edited here; the message says where.
        """
        report = self.edit([index], f"caption of {self.name(index)}", lambda _: text.strip())
        if report.problems:
            raise DataError(f"{self.name(index)}: {report.problems[0].cause} {report.problems[0].cure}")

    def add_tags(self, indices: Sequence[int], tags: str) -> PrepReport:
        """Put tags, with commas between, at the end of captions that do not have them."""
        added = split_tags(tags)
        if not added:
            raise DataError("Type the tags to add, with commas between.")
        return self.edit(indices, f"add {', '.join(added)}", lambda text: change_tags(text, added))

    def remove_tags(self, indices: Sequence[int], tags: str) -> PrepReport:
        """Take tags, with commas between, out of captions. The main prompt, up to the first comma, stays."""
        removed = {tag.lower() for tag in split_tags(tags)}
        if not removed:
            raise DataError("Type the tags to remove, with commas between.")
        return self.edit(indices, f"remove {', '.join(split_tags(tags))}", lambda text: change_tags(text, (), removed))

    def edit(self, indices: Sequence[int], label: str, edit: Edit) -> PrepReport:
        """Rewrite captions as one step. What cannot be rewritten is in the report's problems."""
        return self._step(label, lambda changes: edit_captions(changes, self.dataset, indices, edit))

    def set_captions(self, texts: Mapping[Path, str], label: str) -> PrepReport:
        """Write captions of images, as one step. Images that are gone by now are passed over."""
        indices = {self.path(index): index for index in range(len(self))}

        def write(changes: Changes) -> None:
            contents: dict[Path, bytes] = {}
            for path in texts.keys() & indices.keys():
                source = self.source(indices[path])
                if source.locked:
                    changes.leave(path, f"{source.locked}.", "Edit that file, or save it as UTF-8 text.")
                else:
                    contents[source.file] = texts[path].strip().encode()
            changes.write_many(contents, "captions written")

        return self._step(label, write)

    def mask(self, index: int) -> Path | None:
        """The file of an image's loss mask, or None."""
        return self._files.mask_of(self.path(index))

    def set_mask(self, index: int, mask: bytes | None) -> PrepReport:
        """Write an image's loss mask, a PNG that is white where the image counts; None removes it."""
        path = self.path(index)
        file = self._files.mask_of(path) or path.with_name(path.stem + MASK_SUFFIX)

        def write(changes: Changes) -> None:
            if mask is not None:
                changes.write(file, mask, "masks written", path)
            elif file.is_file():
                changes.remove(file)

        return self._step(f"mask of {self.name(index)}", write)

    def set_for_folder(self, folder: str, name: str, value: float | None) -> PrepReport:
        """Write a one-value file into a folder; None removes it."""
        path, text = self.root / folder / f"{name}.txt", _checked(name, value)

        def write(changes: Changes) -> None:
            if text is None:
                changes.remove(path)
            else:
                changes.write(path, f"{text}\n".encode(), "settings written")

        return self._step(f"{name} of folder {folder}", write)

    def set_for_images(self, indices: Sequence[int], name: str, value: float | None) -> PrepReport:
        """Write a setting into the `.yaml` next to each image, with all else in it as it is; None removes it."""
        text = _checked(name, value)

        def write(changes: Changes) -> None:
            for path in map(self.path, indices):
                try:
                    _set_in_sidecar(changes, path, self._files, name, text)
                except (TextError, OSError) as error:
                    changes.leave(path, f"{error}.", f"Set {name} in that file by hand.")

        return self._step(f"{name} of {len(indices)} images", write)

    def exclude(self, paths: Sequence[str | Path]) -> PrepReport:
        """Move files, with what belongs to them, out of the dataset.

        Raises:
            DataError: one is outside of it.
        """
        wanted = list(map(Path, paths))
        for path in wanted:
            if not path.is_relative_to(self.root):
                raise DataError(f"{path}: is outside of the dataset folder; it is left where it is.")
        label = f"{len(wanted)} file{'s' if len(wanted) != 1 else ''} excluded"
        return self._step(label, lambda changes: move_images(changes, wanted, self.root, self.excluded, "excluded"))

    def record_moves(self, label: str, moves: Sequence[tuple[Path, Path]]) -> PrepReport:
        """Take up files that were moved already, as (from, to) in order, so that undo moves them back."""
        return self._step(label, lambda changes: changes.record_moves(moves))

    def _step(self, label: str, work: Callable[[Changes], None]) -> PrepReport:
        journal = self._journals / f"{self._next_number():06}.jsonl"
        changes = Changes(label, dry_run=False, journal=journal, root=self.root, side=self.excluded, label=label)
        try:
            work(changes)
        finally:  # also what was done before an error is shown, and can be undone
            self.reload()
        return changes.report

    # Undo

    @property
    def last_change(self) -> str:
        """What undo would take back, or an empty text."""
        return next((label for _, label in self._undoable()), "")

    def undo(self) -> PrepReport | None:
        """Take the last change back, whichever panel or kernel made it. None where there is none.

        Raises:
            OSError, DataError: it could not be taken back completely; it stays the last change and can be tried again.
        """
        found = next(iter(self._undoable()), None)
        if found is None:
            return None
        try:
            return undo(found[0], root=self.root, side=self.excluded)
        finally:
            self.reload()

    def _undoable(self) -> Iterable[tuple[Path, str]]:
        """Journals of the steps that were not undone, the last first, with their labels."""
        for path in sorted(self._journals.glob("[0-9]*.jsonl"), reverse=True):
            if (label := journal_label(path)) is not None:
                yield path, label

    def _next_number(self) -> int:
        numbers = [int(match[0]) for path in self._journals.glob("[0-9]*") if (match := re.match(r"\d+", path.name))]
        return max(numbers, default=0) + 1


def _checked(name: str, value: float | None) -> str | None:
    """A setting's value as its file holds it. Raises: DataError if it is out of range."""
    if value is None:
        return None
    try:
        parse_settings({name: value})
    except TextError as error:
        raise DataError(str(error)) from error
    return f"{value:g}"


def _set_in_sidecar(changes: Changes, image: Path, files: FolderFiles, name: str, text: str | None) -> None:
    """Set one value in the `.yaml` next to an image. Raises: TextError if that cannot be done without loss."""
    index = files.find(image, ".json")
    if index is not None and name in read_mapping(index):
        raise TextError(f"{index.name} sets {name}, and wins")
    path = files.find(image, ".yaml") or files.find(image, ".yml")
    if path is None:
        if text is not None:
            changes.write(image.with_suffix(".yaml"), f"{name}: {text}\n".encode(), "settings written", image)
        return
    held, before = read_mapping(path), read_text(path)
    wanted = {key: value for key, value in held.items() if key != name} | ({name: text} if text is not None else {})
    lines = [line for line in before.splitlines() if not re.match(rf"{name}\s*:", line)]
    lines += [f"{name}: {text}"] if text is not None else []
    after = "\n".join(lines) + "\n"
    if not wanted and not after.strip():
        changes.remove(path)
    elif not _says(after, wanted):
        raise TextError(f"{path.name} is not written one setting a line")
    elif wanted != held:
        changes.write(path, after.encode(), "settings written", image)


def _says(text: str, wanted: dict[str, object]) -> bool:
    """Whether a settings file of this text would hold exactly these settings."""
    try:
        return (parse_yaml(text) or {}) == wanted
    except TextError:
        return False
