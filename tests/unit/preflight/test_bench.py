"""`everydream bench` measures this machine, keeps the figures for plans, and prints a line to send in."""

import json

import pytest
import torch
from memory_stand_in import LinearMemory

from everydream_kit.cli import main
from everydream_kit.config import TrainConfig
from everydream_kit.preflight import bench as module
from everydream_kit.preflight.bench import CPU_CASES, GPU_CASES, BenchCase, BenchResult, bench, measure
from everydream_kit.preflight.gpus import find_gpu
from everydream_kit.preflight.step_time import BENCH_FILE, estimate_step, read_bench


@pytest.fixture
def on_h100(monkeypatch):
    """A machine with an H100 whose cases take 0.1, 0.2, 0.3 and 0.4 s."""
    seconds = {case.name: 0.1 * number for number, case in enumerate(GPU_CASES, 1)}
    monkeypatch.setattr("everydream_kit.preflight.gpus.this_gpu", lambda index=0: find_gpu("H100"))
    monkeypatch.setattr(module, "measure", lambda case: BenchResult(case.name, seconds[case.name], 12 * 1024**3))
    return seconds


def planned(tmp_path, **settings):
    config = TrainConfig(resume_ckpt="base", logdir=str(tmp_path), **settings)
    return estimate_step(config, find_gpu("H100"), LinearMemory()(config), launch_seconds=40e-6)


def test_the_command_times_real_steps_and_prints_one_line(tmp_path, capsys):
    main(["bench", "--logdir", str(tmp_path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [one["case"] for one in found["results"]] == [case.name for case in CPU_CASES]
    assert all(one["seconds"] > 0 and not one["reason"] for one in found["results"])
    assert f"torch {torch.__version__}" in found["line"] and "\n" not in found["line"]
    assert not (tmp_path / BENCH_FILE).exists()  # a tiny model's time says nothing about a plan's


def test_a_plan_takes_what_was_measured_for_the_same_configuration(on_h100, tmp_path):
    assert planned(tmp_path, batch_size=4).basis == "computed"
    found = bench(tmp_path)
    assert "SD 1.5, full, 512 px, batch 4: 0.100 s a step, 12.0 GiB" in found.line
    step = planned(tmp_path, batch_size=4)
    assert (step.seconds, step.basis) == (0.1, "measured here")
    assert step.source.startswith("everydream bench (this machine, ")
    assert planned(tmp_path, batch_size=4, cuda_graphs="on").seconds == 0.2
    assert planned(tmp_path, batch_size=4, training_kind="lora").seconds == pytest.approx(0.3)
    for other in ({"batch_size": 5}, {"batch_size": 4, "optimizer": "lion"}, {"batch_size": 4, "resolution": 576}):
        assert planned(tmp_path, **other).basis == "computed"


def test_a_second_measurement_replaces_the_first(on_h100, tmp_path):
    bench(tmp_path)
    on_h100[GPU_CASES[0].name] = 0.05
    bench(tmp_path, cases=GPU_CASES[:1])
    assert sorted(one["seconds"] for one in read_bench(tmp_path)) == pytest.approx([0.05, 0.2, 0.3, 0.4])


def test_a_damaged_file_is_as_good_as_none(on_h100, tmp_path):
    path = tmp_path / BENCH_FILE
    path.parent.mkdir(parents=True)
    for text in ("{", "[]", '{"measurements": 1}', '{"measurements": ["x", {"card": "H100"}]}'):
        path.write_text(text)
        assert planned(tmp_path, batch_size=4).basis == "computed"
    bench(tmp_path)
    assert planned(tmp_path, batch_size=4).seconds == 0.1


def test_a_case_that_does_not_fit_is_named_and_the_others_are_measured(monkeypatch, tmp_path):
    large = BenchCase("large", "sd1", disk_bytes=1 << 60, is_tiny=True)
    assert measure(large).reason == f"passed over: {2 << 30} GiB of disk are needed"

    def run_out(case, folder):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(module, "_measure", run_out)
    assert measure(CPU_CASES[0]) == BenchResult(CPU_CASES[0].name, reason="passed over: out of memory")
    monkeypatch.setattr(module, "_measure", lambda case, folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure(CPU_CASES[0])
