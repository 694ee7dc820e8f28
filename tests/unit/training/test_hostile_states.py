"""Resume states that make no sense: each is one CheckpointError in words, upon which the checkpoint before is taken."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_hostile import tree_of

from everydream_kit.errors import CheckpointError
from everydream_kit.runs import RunFolder
from everydream_kit.runs.layout import RESUME_MANIFEST
from everydream_kit.runs.resume_state import RESTORE_ERRORS
from everydream_kit.training.checkpoints import choose_checkpoint, write_checkpoint
from everydream_kit.training.reports import Averages, LossLog
from everydream_kit.training.validation import LossCurve

GOOD = {
    "position": {"step": 20, "epoch": 1, "step_in_epoch": 5, "images": 80},
    "seed": 555,
    "num_pictures": 12,
    "versions": {"torch": "2.9"},
    "listeners": {"loss_log": {}},
}
NO_POSITION = {key: value for key, value in GOOD.items() if key != "position"}
DEEP = "[" * 100_000


def write(folder: Path, **state: Any) -> Path:
    def write_model(partial: Path, open_file: Any) -> None:
        (partial / "model_index.json").write_text("{}")

    tensors = {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-6}]}}
    return write_checkpoint(folder, write_model, tensors=tensors, state={**GOOD, **state})


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = tmp_path / "logs" / "jets-20261128-120000"
    (folder / "ckpts").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for step in (10, 20):
        write(folder / "ckpts" / f"jets-ep01-gs{step:05}")
    return RunFolder(folder)


def replace(run: RunFolder, name: str, content: bytes) -> None:
    """Put a file into the latest checkpoint, as its author would: the manifest lists it too."""
    folder = run.last_checkpoint
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / RESUME_MANIFEST).read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / RESUME_MANIFEST).write_text(json.dumps(manifest))


def assert_the_one_before_is_taken(run: RunFolder) -> None:
    before, warnings = tree_of(run.folder.parent), list[str]()
    checkpoint, state = choose_checkpoint(run, warnings.append)
    assert checkpoint.name == "jets-ep01-gs00010"
    assert state["position"]["step"] == 20
    assert len(warnings) == 1
    assert "jets-ep01-gs00020" in warnings[0]
    assert tree_of(run.folder.parent) == before


def test_a_good_state_is_taken(run: RunFolder) -> None:
    assert choose_checkpoint(run, pytest.fail)[0].folder == run.last_checkpoint


@pytest.mark.parametrize(
    "state",
    [
        {},
        NO_POSITION,
        {**GOOD, "position": None},
        {**GOOD, "position": []},
        {**GOOD, "position": {**GOOD["position"], "evil": 1}},  # type: ignore[dict-item]
        {**GOOD, "position": {**GOOD["position"], "step": -1}},  # type: ignore[dict-item]
        {**GOOD, "position": {**GOOD["position"], "step": 1.5}},  # type: ignore[dict-item]
        {**GOOD, "position": {**GOOD["position"], "step": "20"}},  # type: ignore[dict-item]
        {**GOOD, "position": {**GOOD["position"], "epoch": True}},  # type: ignore[dict-item]
        {**GOOD, "position": {**GOOD["position"], "images": 10**19}},  # type: ignore[dict-item]
        {**GOOD, "position": {**GOOD["position"], "step_in_epoch": 10**9}},  # type: ignore[dict-item]
        {**GOOD, "seed": "evil"},
        {**GOOD, "seed": -1},
        {**GOOD, "seed": 10**19},
        {**GOOD, "num_pictures": None},
        {**GOOD, "num_pictures": -3},
        {**GOOD, "versions": []},
        {**GOOD, "versions": {"torch": 3}},
        {**GOOD, "listeners": []},
        {**GOOD, "listeners": {"loss_log": 3}},
    ],
    ids=lambda state: str({key: value for key, value in state.items() if GOOD[key] != value})[:60],
)
def test_a_state_that_makes_no_sense_falls_back(run: RunFolder, state: dict[str, Any]) -> None:
    replace(run, "resume/state.json", json.dumps(state).encode())
    assert_the_one_before_is_taken(run)


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"null", b"\xff\xfe", DEEP.encode(), b'{"seed": ' + b"9" * 6000 + b"}", b'{"position"'],
    ids=len,
)
def test_a_state_that_is_no_json_falls_back(run: RunFolder, text: bytes) -> None:
    replace(run, "resume/state.json", text)
    assert_the_one_before_is_taken(run)


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"[]",
        b"{}",
        b'{"files": 3}',
        b'{"files": ["resume/state.json"]}',
        b'{"files": {"resume/state.json": 3}}',
        b'{"files": {"resume/state.json": {"bytes": "3", "sha256": 3}}}',
        b'{"files": {"../../../config.json": {"bytes": 2, "sha256": "x"}}}',
        b'{"files": {"/etc/passwd": {"bytes": 2, "sha256": "x"}}}',
        b'{"files": {"a\\u0000b": {"bytes": 2, "sha256": "x"}}}',
        b'{"files": {"": {"bytes": 2, "sha256": "x"}}}',
        b'{"files": {"resume": {"bytes": 4096, "sha256": "x"}}}',
        DEEP.encode(),
    ],
    ids=lambda text: text[:40].decode(),
)
def test_a_manifest_that_makes_no_sense_falls_back(run: RunFolder, manifest: bytes) -> None:
    (run.last_checkpoint / RESUME_MANIFEST).write_bytes(manifest)
    assert_the_one_before_is_taken(run)


def tensor_file(structure: Any, header: dict[str, Any] | None = None, data: bytes = b"\0" * 12) -> bytes:
    """A safetensors file with one tensor and this structure."""
    text = structure if isinstance(structure, str) else json.dumps(structure)
    entries = {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}} if header is None else header
    head = json.dumps({"__metadata__": {"structure": text}, **entries}).encode()
    return struct.pack("<Q", len(head)) + head + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"evil",
        struct.pack("<Q", 2**60),
        tensor_file("["),
        tensor_file(DEEP),
        tensor_file({"tensor": "b"}),
        tensor_file({"tensor": []}),
        tensor_file({"evil": 1, "tensor": "a"}),
        tensor_file({"slice": ["a", 0]}),
        tensor_file({"slice": ["a", 0, [10**6, 10**6]]}),
        tensor_file({"slice": ["a", "0", [3]]}),
        tensor_file({"slice": ["a", 2, [3]]}),
        tensor_file({"dict": [[{"list": []}, 1]]}),
        tensor_file({"dict": [1, 2]}),
        tensor_file({"dict": 3}),
        tensor_file({"list": 3}),
        tensor_file({"tensor": "a"}, {"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 12]}}),
    ],
    ids=lambda content: repr(content[-110:-12])[:70],
)
def test_tensors_that_make_no_sense_fall_back(run: RunFolder, content: bytes) -> None:
    replace(run, "resume/optimizer.safetensors", content)
    assert_the_one_before_is_taken(run)


def test_where_none_is_left_the_reasons_are_listed(run: RunFolder) -> None:
    for checkpoint in run.checkpoints():
        (checkpoint.folder / "resume" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"(?s)no resumable checkpoint.*gs00020.*gs00010"):
        choose_checkpoint(run, lambda _: None)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"since_log": 3, "epoch": 3},
        {"since_log": {"loss_sum": "evil"}, "epoch": {}},
        {"since_log": {**vars(Averages()), "steps": None}, "epoch": vars(Averages())},
        {"since_log": {**vars(Averages()), "loss_sum": float("nan")}, "epoch": vars(Averages())},
    ],
    ids=str,
)
def test_sums_that_are_none_are_refused(state: Any) -> None:
    with pytest.raises(RESTORE_ERRORS):
        LossLog(1).restore(state)


def test_a_state_replaces_no_method() -> None:
    log, sums = LossLog(1), {**vars(Averages()), "add": "evil", "__class__": "evil"}
    log.restore({"since_log": sums, "epoch": sums, "__dict__": {"log_step": 0}})
    assert callable(log.since_log.add)
    assert log.log_step == 1


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"values": 3, "best_loss": None, "best_step": None, "num_since_best": 0},
        {"values": [[1]], "best_loss": None, "best_step": None, "num_since_best": 0},
        {"values": [], "best_loss": "evil", "best_step": None, "num_since_best": 0},
        {"values": [], "best_loss": None, "best_step": None, "num_since_best": "x"},
        {"values": [], "best_loss": None, "best_step": None, "num_since_best": 0, "evil": 1},
    ],
    ids=str,
)
def test_curves_that_are_none_are_refused(state: Any) -> None:
    with pytest.raises(RESTORE_ERRORS):
        LossCurve.restore(state)
