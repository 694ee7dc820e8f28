"""The dataset: what the scan found, a million images in a few arrays.

A `Dataset` is columns: one numpy array for each number and one `StringColumn` for each text, about 250 bytes an
image where a Python object would take two thousand. `image(i)` makes the object on demand. Values that
an image or its folder does not set are kept as "unset" and filled from the run's defaults at that moment, so a
cached scan serves every configuration.

Not here: reading folders (`scanning`), choosing batches (`epoch_plan`).
"""

from __future__ import annotations

import hashlib
import math
import os
import unicodedata
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from everydream_kit.config import default_of
from everydream_kit.data.captions import (
    Caption,
    caption_from_file_name,
    decode_caption,
    parse_caption,
    parse_caption_lines,
)
from everydream_kit.data.reading_problems import MASK_SUFFIX, Problem
from everydream_kit.data.strings import StringColumn, StringColumnBuilder
from everydream_kit.plain_text import printable

MaskMode = Literal["off", "file", "alpha"]
DEFAULT_MASK_MODE: MaskMode = default_of("loss_mask")

FROM_FILE_NAME, FROM_TEXT, FROM_LINES, FROM_JSON = range(4)
"""How the caption column's text is to be read: not at all, as one caption, as one caption a line, as JSON."""


UNSET = -1
"""In integer columns: neither the image nor its folder says anything."""


@dataclass(frozen=True, slots=True)
class DatasetImage:
    """Everything the scan knows of one image, with the run's defaults filled in.

    Attributes:
        path: absolute.
        width, height: pixels, after EXIF rotation.
        caption: as written; `captions.compose_caption` makes the text of one use.
        multiply: uses per epoch; a fraction is spread over epochs.
        cond_dropout: probability of the empty prompt.
        flip_p: probability of being mirrored.
        shuffle_tags, keep_tags: how the caption is shuffled.
        batch_id: images of one name share batches, or None.
        loss_scale: weight in the loss.
        rating: weight in the draw of rated datasets.
        mask_path: loss mask; the image's own path where its transparency is the mask, or None.
    """

    path: str
    width: int
    height: int
    caption: Caption
    multiply: float
    cond_dropout: float
    flip_p: float
    shuffle_tags: bool
    keep_tags: int
    batch_id: str | None
    loss_scale: float
    rating: float
    mask_path: str | None


@dataclass(frozen=True, slots=True)
class Defaults:
    """What holds for an image that neither its own files nor its folder's say otherwise about."""

    cond_dropout: float = default_of("cond_dropout")
    flip_p: float = default_of("flip_p")
    shuffle_tags: bool = default_of("shuffle_tags")
    keep_tags: int = default_of("keep_tags")
    loss_mask: MaskMode = DEFAULT_MASK_MODE


NUMBERS: dict[str, str] = {
    "root": "h",  # index into Dataset.roots
    "width": "i",
    "height": "i",
    "file_bytes": "q",
    "mtime_ns": "q",
    "caption_kind": "b",  # FROM_...
    "max_caption_length": "i",  # characters, or UNSET
    "multiply": "d",
    "cond_dropout": "f",  # NaN: unset, here and below
    "flip_p": "f",
    "shuffle_tags": "b",  # 0, 1 or UNSET
    "keep_tags": "h",
    "batch": "i",  # index into Dataset.batch_names, or UNSET
    "loss_scale": "f",
    "rating": "f",
    "mask": "b",  # 1: a mask file of the image's own name lies next to it; 2: one of another spelling does
    "alpha": "b",  # 1: the image has transparency
    "stamp": "q",  # of the image and of all files that speak about it; the scan cache compares it
}
"""Number columns with their `array` type codes."""


@dataclass(frozen=True)
class Dataset:
    """Images in scan order. Frozen: `subset` makes another one.

    Attributes:
        roots: absolute folder of each root; an image's path is relative to its own.
        paths: relative, with `/` between folders.
        captions: text of each caption; `numbers["caption_kind"]` says how it is to be read.
        numbers: the columns of `NUMBERS`.
        batch_names: names that `batch_id` settings use.
        problems: what the scan could not use, or used otherwise.
        defaults: the run's.
    """

    roots: tuple[str, ...]
    paths: StringColumn
    captions: StringColumn
    numbers: Mapping[str, np.ndarray]
    batch_names: tuple[str, ...] = ()
    problems: list[Problem] = field(default_factory=list)
    defaults: Defaults = field(default_factory=Defaults)

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        """Absolute path of an image."""
        root = self.roots[int(self.numbers["root"][index])]
        return os.path.join(root, self.paths[index].replace("/", os.sep))

    def image(self, index: int) -> DatasetImage:
        """One image, with defaults filled in."""
        n = self.numbers
        path = self.path(index)
        batch = int(n["batch"][index])
        shuffle = int(n["shuffle_tags"][index])
        keep = int(n["keep_tags"][index])
        return DatasetImage(
            path=path,
            width=int(n["width"][index]),
            height=int(n["height"][index]),
            caption=self.caption(index),
            multiply=float(n["multiply"][index]),
            cond_dropout=_or_default(n["cond_dropout"][index], self.defaults.cond_dropout),
            flip_p=_or_default(n["flip_p"][index], self.defaults.flip_p),
            shuffle_tags=self.defaults.shuffle_tags if shuffle == UNSET else bool(shuffle),
            keep_tags=self.defaults.keep_tags if keep == UNSET else keep,
            batch_id=None if batch == UNSET else self.batch_names[batch],
            loss_scale=_or_default(n["loss_scale"][index], 1.0),
            rating=_or_default(n["rating"][index], 1.0),
            mask_path=self._mask_path(index, path),
        )

    def caption(self, index: int) -> Caption:
        """The caption of one image."""
        kind = int(self.numbers["caption_kind"][index])
        limit = int(self.numbers["max_caption_length"][index])
        max_length = None if limit == UNSET else limit
        if kind == FROM_FILE_NAME:
            return replace(caption_from_file_name(self.paths[index]), max_length=max_length)
        text = self.captions[index]
        if kind == FROM_JSON:
            return decode_caption(text, max_length)
        if kind == FROM_LINES:
            return parse_caption_lines(text, max_length)
        return parse_caption(text, max_length)

    def _mask_path(self, index: int, path: str) -> str | None:
        if self.defaults.loss_mask == "file" and self.numbers["mask"][index]:
            own = os.path.splitext(path)[0] + MASK_SUFFIX
            return self._spelled_mask(path, own) if self.numbers["mask"][index] == 2 else own
        if self.defaults.loss_mask == "alpha" and self.numbers["alpha"][index]:
            return path
        return None

    def _spelled_mask(self, path: str, own: str) -> str:
        """A mask whose name is the image's but for case, Unicode form, or the image's own ending."""
        folder, name = os.path.split(path)
        if folder not in self._mask_names:
            self._mask_names[folder] = _masks_of_folder(folder)
        found = self._mask_names[folder].get(name)
        return own if found is None else os.path.join(folder, found)

    @cached_property
    def _mask_names(self) -> dict[str, dict[str, str]]:
        """Masks by folder and image, filled as they are asked for."""
        return {}

    def key(self, index: int) -> str:
        """Address of an image's random draws: its path relative to its root.

        Equal on every machine that has the same folder, and untouched by other images coming or going. With several
        roots the root's folder name is in front; where two roots share their name too, the later one's number.
        """
        path = printable(unicodedata.normalize("NFC", self.paths[index]))
        return self._root_prefixes[int(self.numbers["root"][index])] + path

    @cached_property
    def _root_prefixes(self) -> tuple[str, ...]:
        if len(self.roots) == 1:
            return ("",)
        names = [printable(os.path.basename(root.rstrip("/\\"))) for root in self.roots]
        return tuple(
            f"{name}/" if names.index(name) == number else f"{name}#{number}/" for number, name in enumerate(names)
        )

    @cached_property
    def key_hashes(self) -> np.ndarray:
        """(n,) uint64 hash of each key: vectorized draws start from it. Equal on every platform."""
        digests = bytearray()
        roots = self.numbers["root"].tolist() if len(self.roots) > 1 else None
        for index, path in enumerate(self.paths):
            text = path if path.isascii() else unicodedata.normalize("NFC", path)
            prefix = "" if roots is None else self._root_prefixes[roots[index]]
            digests += hashlib.blake2b((prefix + printable(text)).encode(), digest_size=8).digest()
        return np.frombuffer(digests, "<u8").astype(np.uint64)

    def subset(self, indices: Sequence[int] | np.ndarray) -> Dataset:
        """The images at `indices`, in that order, for instance one side of a validation split.

        Keys, and so all random draws, stay what they are.
        """
        chosen = np.asarray(indices, np.int64)
        return replace(
            self,
            paths=self.paths.take(chosen),
            captions=self.captions.take(chosen),
            numbers={name: column[chosen] for name, column in self.numbers.items()},
        )


def _or_default(value: np.float32, default: float) -> float:
    # float32 holds 0.3 as 0.300000012; the shortest decimal that means the same float32 is what the person wrote
    return default if math.isnan(value) else float(str(value))


class DatasetBuilder:
    """Grows a `Dataset` row by row, in flat arrays from the start."""

    def __init__(self, roots: Sequence[str]) -> None:
        self.problems: list[Problem] = []
        self._roots = tuple(roots)
        self._paths = StringColumnBuilder()
        self._captions = StringColumnBuilder()
        self._numbers: dict[str, array[Any]] = {name: array(code) for name, code in NUMBERS.items()}
        self._batch_names: dict[str, int] = {}

    def add(
        self,
        path: str,
        *,
        width: int,
        height: int,
        caption: str = "",
        caption_kind: int = FROM_FILE_NAME,
        batch_id: str | None = None,
        **numbers: float | None,
    ) -> None:
        """Append an image.

        Args:
            path: relative to its root, with `/`.
            width, height: pixels, after EXIF rotation.
            caption, caption_kind: as the columns have them.
            batch_id: by name.
            **numbers: any other column of `NUMBERS`; None and what is skipped are unset.
        """
        batch = UNSET if batch_id is None else self._batch_names.setdefault(batch_id, len(self._batch_names))
        values = {
            **numbers,
            "width": width,
            "height": height,
            "caption_kind": caption_kind,
            "batch": batch,
        }
        self._paths.append(path)
        self._captions.append(caption)
        for name, column in self._numbers.items():
            value = values.get(name)
            column.append(_UNSET_VALUES[name] if value is None else value)

    def extend(self, other: Dataset, root: int) -> None:
        """Append all images of another dataset, as images of root number `root`."""
        self._paths.extend(other.paths)
        self._captions.extend(other.captions)
        ids = [self._batch_names.setdefault(name, len(self._batch_names)) for name in other.batch_names]
        renumber = np.array([*ids, UNSET], np.int32)  # index -1 (unset) finds the last
        for name, column in self._numbers.items():
            values = other.numbers[name]
            if name == "batch":
                values = renumber[values]
            elif name == "root":
                values = np.full_like(values, root)
            column.frombytes(np.ascontiguousarray(values).tobytes())
        self.problems += other.problems

    def build(self, defaults: Defaults) -> Dataset:
        """The dataset. The builder must not be used afterwards."""
        return Dataset(
            roots=self._roots,
            paths=self._paths.build(),
            captions=self._captions.build(),
            numbers={name: np.frombuffer(c, np.dtype(c.typecode)) for name, c in self._numbers.items()},
            batch_names=tuple(self._batch_names),
            problems=self.problems,
            defaults=defaults,
        )


_NAN = float("nan")
_UNSET_VALUES: dict[str, float] = {
    **dict.fromkeys(NUMBERS, 0),
    **dict.fromkeys(("max_caption_length", "shuffle_tags", "keep_tags", "batch"), UNSET),
    **dict.fromkeys(("cond_dropout", "flip_p", "loss_scale", "rating"), _NAN),
    "multiply": 1.0,
}


def _masks_of_folder(folder: str) -> dict[str, str]:
    """Masks of a folder by the names of their images."""
    from everydream_kit.data.folders import FolderFiles
    from everydream_kit.data.image_files import EXTENSIONS

    files = FolderFiles()
    images = [name for name in os.listdir(folder) if os.path.splitext(name)[1].lower() in EXTENSIONS]
    masks = {name: files.mask_of(Path(folder, name)) for name in images}
    return {name: mask.name for name, mask in masks.items() if mask is not None}
