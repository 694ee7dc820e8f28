"""The launch cost of this machine's host: measured in a process of its own, kept, and only for the GPU that is here."""

from __future__ import annotations

import json

import pytest

from everydream_kit.preflight import host_speed
from everydream_kit.preflight.gpus import find_gpu


@pytest.fixture
def h100_here(monkeypatch):
    """A machine with that GPU, whose measuring runs on the CPU: what it cannot have here is the CUDA device."""
    monkeypatch.setattr("everydream_kit.preflight.gpus.this_gpu", lambda device=0: find_gpu("H100"))
    measured = []

    def ask(device_type):
        measured.append(device_type)
        return 3.1e-5

    monkeypatch.setattr(host_speed, "_ask_process", ask)
    return measured


def test_a_step_of_a_tiny_unet_is_timed_in_a_process_of_its_own():
    seconds = host_speed._ask_process("cpu")
    assert host_speed.FASTEST < seconds < host_speed.SLOWEST


def test_without_that_gpu_nothing_is_measured(tmp_path):
    assert host_speed.launch_seconds_here(find_gpu("H100"), tmp_path / "kept") is None
    assert not (tmp_path / "kept").exists()


def test_another_gpu_than_this_machines_is_not_measured_here(tmp_path, h100_here):
    assert host_speed.launch_seconds_here(find_gpu("T4"), tmp_path) is None
    assert h100_here == []


def test_the_figure_is_kept(tmp_path, h100_here):
    assert host_speed.launch_seconds_here(find_gpu("H100"), tmp_path) == 3.1e-5
    assert host_speed.launch_seconds_here(find_gpu("H100"), tmp_path) == 3.1e-5
    assert h100_here == ["cuda"]


@pytest.mark.parametrize("kept", ["{", "[]", json.dumps({"H100": "fast"}), ""])
def test_a_damaged_figure_is_measured_again(tmp_path, h100_here, kept):
    (tmp_path / "host_speed.json").write_text(kept, "utf-8")
    assert host_speed.launch_seconds_here(find_gpu("H100"), tmp_path) == 3.1e-5
    assert h100_here == ["cuda"]


def test_a_machine_that_cannot_measure_warns_and_plans_with_the_usual_cost(tmp_path, caplog):
    assert host_speed._ask_process("no such device") is None
    assert "launch cost" in caplog.text
