"""How long a step takes: measured here before published before computed, and each says which it is."""

import json

import pytest
from memory_stand_in import LinearMemory

from everydream_kit.config import TrainConfig
from everydream_kit.preflight.gpus import GpuSpec, find_gpu, known_gpus
from everydream_kit.preflight.memory_estimate import MemoryEstimate, Phase
from everydream_kit.preflight.step_time import compute, estimate_step, measured_here, published, published_speeds

SD15 = 1_066_000_000


def config(**settings):
    return TrainConfig(**{"resume_ckpt": "base", "disable_textenc_training": True, "batch_size": 1, **settings})


def work(teraflops, trained=860_000_000):
    return MemoryEstimate((Phase("training step", 1, {}),), 0, int(teraflops * 1e12), trained, SD15, 0, 0)


@pytest.mark.parametrize(
    "entry", published_speeds(), ids=lambda e: f"{e['card']} {e['model']} {e['precision']} {e['seconds']}"
)
def test_the_formula_meets_every_published_figure_to_within_a_tenth(entry):
    """The bound that the docs give for the figures it was fitted to."""
    settings = config(
        disable_amp=entry["precision"] == "fp32",
        amp_dtype="auto" if entry["precision"] == "fp32" else entry["precision"],
        grad_accum=entry["grad_accum"],
    )
    found = compute(settings, find_gpu(entry["card"]), work(entry["teraflops"], entry["trained_parameters"]))
    assert found.basis == "computed"
    assert found.seconds == pytest.approx(entry["seconds"], rel=0.1)


def test_the_formula_meets_a_figure_that_it_was_not_fitted_to():
    """SDXL LoRA of rank 32 at 1024 px, batch 1, on an RTX 3090 Ti: 1.12 s (kohya-ss/sd-scripts, issue 827)."""
    gpu_spec = GpuSpec("RTX 3090 Ti", 24 * 2**30, 40, 80, 80, 1008e9)
    found = compute(config(amp_dtype="bf16"), gpu_spec, work(12.0, 90_000_000))
    assert found.seconds == pytest.approx(1.12, rel=0.12)


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
