"""Nested tensors in one file: what goes in comes out, and nothing else can."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from everydream_kit.errors import CheckpointError
from everydream_kit.training.tensor_files import read_nested, write_nested


def test_containers_types_and_bits_come_back(tmp_path: Path) -> None:
    shared = torch.arange(4)
    value = {
        "state": {0: {"step": torch.tensor(3.0), "table": shared}, 1: {"table": shared}},
        "betas": (0.9, 0.999),
        "names": ["a", None, True, 7, 1e-300, float("inf")],
        "half": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
    }
    write_nested(tmp_path / "x.safetensors", value)
    again = read_nested(tmp_path / "x.safetensors")
    assert again["betas"] == value["betas"]
    assert again["names"] == value["names"]
    assert again["state"].keys() == {0, 1}
    assert torch.equal(again["state"][1]["table"], shared)
    assert again["half"].dtype == torch.bfloat16
    assert again["half"].view(torch.int16).tolist() == value["half"].view(torch.int16).tolist()


def test_an_object_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Path"):
        write_nested(tmp_path / "x.safetensors", {"a": tmp_path})


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_nested(path, {"a": torch.zeros(3)})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"x\.safetensors: damaged"):
        read_nested(path)
