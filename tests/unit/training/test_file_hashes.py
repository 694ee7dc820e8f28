"""Files that are hashed while they are written: the hash is that of what lies on the disk, and the disk has confirmed it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from everydream_kit.errors import DiskSpaceError
from everydream_kit.training.checkpoints import write_checkpoint
from everydream_kit.training.file_hashes import PIECE_BYTES, Receipts


@pytest.mark.parametrize("sizes", [[], [5], [5, PIECE_BYTES, 7], [PIECE_BYTES // 2] * 5, [3 * PIECE_BYTES, 1]])
def test_pieces_of_any_size_arrive_in_order_and_the_hash_is_the_files_own(tmp_path: Path, sizes: list[int]) -> None:
    pieces = [bytes([number + 1]) * size for number, size in enumerate(sizes)]
    with Receipts(tmp_path) as receipts:
        with receipts.open(tmp_path / "weights") as file:
            for piece in pieces:
                file.write(memoryview(piece))
        facts = receipts.facts()
    content = (tmp_path / "weights").read_bytes()
    assert content == b"".join(pieces)
    assert facts == {"weights": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}


def test_files_written_in_other_ways_are_in_the_receipts_too(tmp_path: Path) -> None:
    with Receipts(tmp_path) as receipts:
        (tmp_path / "unet").mkdir()
        (tmp_path / "unet" / "config.json").write_text("{}")
        facts = receipts.facts()
    assert facts == {"unet/config.json": {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}}


def test_every_file_and_folder_is_on_the_disk_before_the_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        done.append(f"rename {Path(source).name} to {Path(target).name}")
        replace(source, target)

    def write_model(folder: Path, open_file) -> None:
        (folder / "unet").mkdir()
        (folder / "model_index.json").write_text("{}")
        with open_file(folder / "unet" / "weights") as file:
            file.write(b"123")

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_checkpoint(tmp_path / "a-ep01-gs00001", write_model, tensors={"optimizer": {}}, state={})
    partial = tmp_path / ".partial-a-ep01-gs00001"
    before = done[: done.index(f"rename {partial.name} to a-ep01-gs00001")]
    names = [
        "",
        "unet",
        "unet/weights",
        "model_index.json",
        "resume",
        "resume/optimizer.safetensors",
        "resume/state.json",
    ]
    assert {str(partial / name) for name in names} <= set(before)
    manifest = next(number for number, name in enumerate(before) if "manifest" in name)
    assert max(before.index(str(partial / name)) for name in names) < manifest  # the manifest is the last file
    assert done[-1] == str(tmp_path)


def test_a_disk_that_cannot_confirm_a_file_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    def write_model(folder: Path, open_file) -> None:
        with open_file(folder / "weights") as file:
            file.write(b"123")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskSpaceError, match="No space left"):
        write_checkpoint(tmp_path / "a-ep01-gs00001", write_model)
    assert list(tmp_path.iterdir()) == []
