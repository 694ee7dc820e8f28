"""How long a step takes: measured here before published before computed, and each says which it is."""

import json
from dataclasses import replace

import pytest
from memory_stand_in import LinearMemory

from everydream_kit.config import TrainConfig
from everydream_kit.preflight.gpus import GpuSpec, find_gpu, known_gpus
from everydream_kit.preflight.memory_records import MemoryEstimate, Phase
from everydream_kit.preflight.step_time import compute, estimate_step, measured_here, published, published_speeds

SD15 = 1_066_000_000


def config(**settings):
    return TrainConfig(**{"resume_ckpt": "base", "disable_textenc_training": True, "batch_size": 1, **settings})


def work(teraflops, trained=860_000_000, launches=0, update_launches=0):
    phases = (Phase("training step", 1, {}),)
    return MemoryEstimate(phases, 0, int(teraflops * 1e12), trained, SD15, 0, 0, 0, launches, update_launches)


@pytest.mark.parametrize(
    "entry",
    published_speeds(),
    ids=lambda e: f"{e['card']} {e['model']} {e['precision']} batch {e['batch_size']} {e['seconds']}",
)
def test_the_formula_meets_every_figure_to_within_a_fifth(entry):
    """The bound that the docs give. A host's launch cost is one number for all of its figures."""
    settings = config(
        disable_amp=entry["precision"] == "fp32",
        amp_dtype="auto" if entry["precision"] == "fp32" else entry["precision"],
        grad_accum=entry["grad_accum"],
    )
    counted = work(entry["teraflops"], entry["trained_parameters"], entry["pass_launches"], entry["update_launches"])
    found = compute(settings, find_gpu(entry["card"]), counted, entry["launch_us"] * 1e-6)
    assert found.basis == "computed"
    assert found.seconds == pytest.approx(entry["seconds"], rel=0.2)


def test_figures_of_one_host_share_its_launch_cost():
    costs = {}
    for entry in published_speeds():
        costs.setdefault((entry["card"], entry["by"]), set()).add(entry["launch_us"])
    assert costs and all(len(found) == 1 for found in costs.values())


def test_a_small_batch_waits_for_the_host_and_a_large_one_for_the_gpu():
    gpu_spec = find_gpu("H100")
    seconds = [compute(config(), gpu_spec, work(2.5 * n, launches=4500), 40e-6).seconds for n in (1, 4, 64, 128)]
    assert seconds[0] == seconds[1] == pytest.approx(4500 * 40e-6 + 860e6 * 50 / 3350e9)
    assert seconds[3] - seconds[2] == pytest.approx(64 * 2.5e12 * (1 / (989e12 * 0.31) + 1 / 190 / 3350e9))


def test_copies_of_waiting_blocks_count_where_they_take_longest():
    gpu_spec = find_gpu("RTX 4090")
    moving = replace(work(2.5, trained=0), copied_bytes=int(24e9))
    found = compute(config(), gpu_spec, moving, 40e-6)
    assert found.seconds == pytest.approx(24e9 / (32e9 * 0.75))  # PCIe 4.0
    assert "the link 1 s for 22.4 GiB of swapped blocks" in found.source
    assert compute(config(), gpu_spec, replace(work(2500), copied_bytes=1), 40e-6) != found
    assert published(config(training_kind="lora", blocks_to_swap=3), gpu_spec, SD15) is None


def test_the_update_follows_the_passes():
    """bitsandbytes waits for the GPU after each tensor."""
    gpu_spec = find_gpu("H100")
    with_update = compute(config(), gpu_spec, work(2.5, launches=4500, update_launches=2600), 40e-6)
    without = compute(config(), gpu_spec, work(2.5, launches=4500), 40e-6)
    assert with_update.seconds - without.seconds == pytest.approx(2600 * 40e-6)


def test_the_source_says_whether_the_launch_cost_was_measured():
    gpu_spec = find_gpu("A40")
    assert "50 \u00b5s (assumed)" in compute(config(), gpu_spec, work(2.5, launches=4500)).source
    assert "31 \u00b5s (measured)" in compute(config(), gpu_spec, work(2.5, launches=4500), 31e-6).source


def test_a_published_figure_is_taken_where_every_point_matches():
    found = published(config(gradient_checkpointing=True, amp_dtype="fp16"), find_gpu("T4"), SD15)
    assert (found.seconds, found.basis) == (1.075, "published")
    assert found.source.startswith("ShivamShrirao/diffusers (https://github.com/")


@pytest.mark.parametrize(
    "other",
    [
        {"batch_size": 3},
        {"resolution": 768},
        {"resolution": [512, 768]},
        {"optimizer": "adamw"},
        {"disable_textenc_training": False},
        {"cache_latents": "off"},
        {"training_kind": "lora"},
        {"grad_accum": 2},
    ],
)
def test_and_not_where_one_does_not(other):
    assert published(config(gradient_checkpointing=True, amp_dtype="fp16", **other), find_gpu("T4"), SD15) is None


def test_a_small_model_of_the_family_is_another_model():
    same = config(gradient_checkpointing=True, amp_dtype="fp16")
    assert published(same, find_gpu("T4"), 8_000_000) is None
    assert published(same, find_gpu("L4"), SD15) is None


def test_faster_cards_are_estimated_faster():
    seconds = {c.name: compute(config(batch_size=8), c, work(20.0)).seconds for c in known_gpus()}
    assert seconds["T4"] > seconds["RTX 3090"] > seconds["RTX 4090"] > seconds["A100 80GB"] > seconds["H100"]


def test_a_card_without_speeds_has_no_time():
    assert compute(config(), GpuSpec("RTX 2080 Ti", 11 * 2**30), work(2.4)) is None


def test_on_a_cpu_the_speed_of_a_matrix_product_is_taken():
    found = estimate_step(config(), None, work(0.035), cpu_flops=1e11)
    assert (found.seconds, found.basis) == (pytest.approx(1.0), "computed")
    assert estimate_step(config(), None, None) is None


def write_run(logdir, name, settings, device, speeds, **status):
    folder = logdir / f"jets-{name}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config(logdir=str(logdir), **settings).to_json(), "utf-8")
    (folder / "environment.json").write_text(json.dumps({"device": device}), "utf-8")
    events = [{"kind": "loss", "images_per_second": speed} for speed in speeds]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), "utf-8")
    (folder / "status.json").write_text(json.dumps(status), "utf-8")


def test_a_run_on_the_same_card_wins_and_its_warming_up_does_not_count(tmp_path):
    settings = {"gradient_checkpointing": True, "amp_dtype": "fp16"}
    write_run(tmp_path, "20260101-000000", settings, "Tesla T4", [0.1, 2.0])
    here = config(logdir=str(tmp_path), **settings)
    found = estimate_step(here, find_gpu("T4"), LinearMemory()(here))
    assert (found.seconds, found.basis, found.source) == (0.5, "measured here", "run jets-20260101-000000")
    twice = here.replace(batch_size=2, grad_accum=3)
    assert measured_here(twice, find_gpu("T4")).seconds == pytest.approx(3.0)
    assert measured_here(here, find_gpu("A40")) is None
    assert measured_here(here, None) is None


def test_a_run_with_other_settings_does_not_count(tmp_path):
    write_run(tmp_path, "20260101-000000", {"resolution": 768}, "Tesla T4", [1.0, 1.0])
    assert measured_here(config(logdir=str(tmp_path)), find_gpu("T4")) is None


def test_a_run_on_this_cpu_counts_for_this_cpu_and_a_damaged_one_for_nothing(tmp_path):
    write_run(tmp_path, "20260101-000000", {}, "cpu, 2 threads", [], images_per_second=4.0)
    write_run(tmp_path, "20260102-000000", {}, "cpu, 2 threads", [])
    (tmp_path / "jets-20260102-000000" / "environment.json").write_text("{", "utf-8")
    assert measured_here(config(logdir=str(tmp_path)), None).seconds == 0.25
