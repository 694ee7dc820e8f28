"""Opening weight files of either kind: `.safetensors`, and the older pickles (`.ckpt`, `.bin`, `.pt`).

What a file is follows from its first bytes, since people rename files; its name decides where they do not say it.

A pickle is a small program, so it is read by torch's weights-only unpickler, which knows tensors and plain values and
refuses everything else. Checkpoints of PyTorch Lightning, as the first Stable Diffusion models were published, hold a few
more names: their trainer's callbacks and settings. Those names are given to the unpickler as `Inert`, a class that does
nothing whatever it is called with. Nothing is imported or looked up by name, so that what a file *says* it holds never
runs; a file with any other name in it is refused as a whole.
"""

from __future__ import annotations

import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from everydream_kit.errors import ModelError
from everydream_kit.models.spans import CAN_READ_AT, OpenedFile, Span, read_whole
from everydream_kit.models.tensors import MAX_HEADER_BYTES, LazyTensor, Tensors, open_safetensors
from everydream_kit.plain_text import printable

TRAINER_PACKAGES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.")
PLAIN_NAMES = frozenset(
    {
        *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "object", "str", "tuple")),
        *("argparse.Namespace", "typing.Any", "numpy.dtype"),
        *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
    }
)
"""What trainers' settings and scores consist of."""
TABLE_NAMES = frozenset({"collections.defaultdict", "pytorch_lightning.utilities.parsing.AttributeDict"})
"""Pickled as a call and then filled: an empty table stands for them."""


DAMAGED = (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError)
"""What the unpickler raises on bytes that are not a full program, as found by changing bytes at random."""


class Inert:
    """Stands for any object of a trainer. Takes everything and does nothing."""

    def __new__(cls, *_: object, **__: object) -> Inert:
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        """Nothing is kept."""

    def __setstate__(self, state: object) -> None:
        """Nothing is kept."""


class EmptyTable:
    """Stands for a table of a trainer; the unpickler fills no other kind than torch's own."""

    def __new__(cls, *_: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
_ZIP = b"PK\x03\x04"
_PICKLES = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))
"""How the file of `torch.save` begins, now and before torch 1.6."""
WEIGHT_SUFFIXES = (*SAFETENSORS_SUFFIXES, ".ckpt", ".pt", ".pth", ".bin")


def open_weights(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Open a weight file of either kind, whatever it is named.

    Raises:
        ModelError: it holds no weights, anything but weights, or is damaged.
    """
    try:
        with path.open("rb") as file:
            start = file.read(256)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}).") from error
    _refuse_text(path, start)
    return open_safetensors(path) if _is_safetensors(path, start) else open_pickle(path)


def _is_safetensors(path: Path, start: bytes) -> bool:
    """Whether a file is opened as safetensors: eight bytes with the header's length, then the header, a JSON object."""
    if start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] <= MAX_HEADER_BYTES:
        return True
    return path.suffix.lower() in SAFETENSORS_SUFFIXES and not start.startswith((_ZIP, *_PICKLES))


def _refuse_text(path: Path, start: bytes) -> None:
    """Name what downloads leave in place of weights.

    Raises:
        ModelError: a pointer of Git LFS, a web page, or a message of a server.
    """
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        raise ModelError(
            f"{path}: this is a pointer of Git LFS, not the weights. Fetch them with `git lfs pull`, or download the file "
            "itself."
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ModelError(
            f"{path}: this is a web page, not weights. Download the file itself with the site's download link; many models "
            "need a login or an accepted license first."
        )
    if text.startswith((b'{"', b"{'", b"{\n", b"{ ")):
        raise ModelError(
            f"{path}: this is text, not weights: {printable(start.decode('utf-8', 'replace')[:120])!r}. A server's message, "
            "as a rule: download the file again, logged in if the site requires it."
        )


def open_pickle(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Open a `.ckpt`, `.bin` or `.pt` file by weights-only unpickling: tensors and plain values, and nothing that runs.

    Returns:
        The tensors under `state_dict`, or of the file itself, and text values stored under `metadata`.

    Raises:
        ModelError: the file holds anything but weights, or is damaged.
    """
    try:
        content = _load_weights_only(path)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path}: refused. It holds Python objects next to weights, and reading those can run code that somebody "
            f"put there; nothing in it was run ({_first_line(error)}). Get the model as .safetensors."
        ) from error
    except DAMAGED as error:
        raise ModelError(f"{path}: cannot be read as a checkpoint ({_first_line(error)}). Fetch it again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: holds a {type(content).__name__}, not a table of weights.")
    state = content.get("state_dict", content)
    metadata = content.get("metadata", {}) if state is not content else {}
    if not isinstance(state, dict) or not isinstance(metadata, dict):
        raise ModelError(f"{path}: its state_dict is not a table of weights.")
    values = {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    file = OpenedFile(path) if any(_offset(value) is not None for value in values.values()) else None
    tensors = {name: LazyTensor.of(value) if file is None else _in_file(value, file) for name, value in values.items()}
    return tensors, {str(key): value for key, value in metadata.items() if isinstance(value, str)}


def _load_weights_only(path: Path) -> Any:
    with path.open("rb") as file:
        is_zip = file.read(4) == _ZIP
        file.seek(0)
        # Memory mapping, and the list of names, work for the zip form only; the older form is read whole and strictly.
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
        stand_ins: list[Any] = [
            (EmptyTable if name in TABLE_NAMES else Inert, name) for name in names if _is_trainers(name)
        ]
        # torch opens a path of this suffix as safetensors, and maps no file that is open already
        is_mapped = is_zip and path.suffix != ".safetensors"
        source = path if is_mapped else file
        with torch.serialization.safe_globals(stand_ins):
            if is_zip and CAN_READ_AT:
                with FakeTensorMode():  # torch says where in the file each tensor lies, and reads none
                    content = torch.load(source, map_location="cpu", weights_only=True)
                if all(_offset(leaf) is not None for leaf in tree_leaves(content) if isinstance(leaf, torch.Tensor)):
                    return content
                file.seek(0)
            return torch.load(source, map_location="cpu", weights_only=True, mmap=is_mapped)


def _offset(tensor: torch.Tensor) -> int | None:
    """Where in its file the storage of a tensor without values begins; None where torch (before 2.7) does not say it."""
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    return None if offset is None else int(offset)


def _in_file(tensor: torch.Tensor, file: OpenedFile) -> LazyTensor:
    """A tensor without values as one that is read from its place in the file.

    Raises:
        ModelError: the file ends before.
    """
    shape, stride, start = tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
    offset, num_stored = _offset(tensor) or 0, tensor.untyped_storage().nbytes() // tensor.dtype.itemsize
    if offset + num_stored * tensor.dtype.itemsize > os.fstat(file.descriptor).st_size:
        raise ModelError(f"{file.path}: ends in the middle of a tensor. Its download was cut short; fetch it again.")
    stored = (Span(file, offset, num_stored, tensor.dtype),)
    if tensor.is_contiguous():
        spans = (stored[0].part(start, start + int(tensor.numel())),)
        return LazyTensor(
            shape, tensor.dtype, lambda: read_whole(spans, tensor.dtype, tensor.dtype).reshape(shape), spans
        )
    return LazyTensor(
        shape,
        tensor.dtype,
        lambda: read_whole(stored, tensor.dtype, tensor.dtype).as_strided(shape, stride, start).contiguous(),
    )


def _is_trainers(name: str) -> bool:
    return name.startswith(TRAINER_PACKAGES) or name in PLAIN_NAMES or name in TABLE_NAMES


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    for line in text.splitlines():
        if "GLOBAL" in line or "Unsupported" in line:
            return printable(line.strip()[:200])
    return printable((text.splitlines() or [type(error).__name__])[0][:200])
