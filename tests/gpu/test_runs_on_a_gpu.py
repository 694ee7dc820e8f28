"""Whole runs on a GPU: every kind of training, number formats, optimizers, places of memory; exact resume; out of memory."""

from __future__ import annotations

import logging
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stop_after import StopAfter
from tiny_models import tiny_folder

from everydream_kit.config import TrainConfig
from everydream_kit.errors import MemoryLimitError
from everydream_kit.models.model_saving import save_model
from everydream_kit.models.random_models import build_tiny_model
from everydream_kit.runs import RunFolder, list_runs
from everydream_kit.sessions import resume, train

needs_cuda = pytest.mark.needs_cuda

KINDS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "float16": {"amp_dtype": "fp16"},
    "float32": {"disable_amp": True},
    "fused AdamW": {"optimizer": "adamw"},
    "8-bit AdamW": {"optimizer": "adamw8bit"},
    "paged 8-bit AdamW": {"optimizer": "pagedadamw8bit"},
    "8-bit Lion": {"optimizer": "lion8bit", "lr": 1e-5},
    "fused backward": {"fused_backward": True, "amp_dtype": "bf16", "optimizer": "adamw"},
    "bfloat16 weights": {"weight_dtype": "bfloat16"},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "channels last": {"channels_last": True},
    "accumulated and clipped": {"grad_accum": 2, "clip_grad_norm": 0.5},
    "idle models in host memory": {"offload_idle_models": True},
    "LoRA": {"training_kind": "lora", "lora_rank": 4, "lr": 1e-3},
    "LoRA, blocks in host memory": {"training_kind": "lora", "lora_rank": 4, "lr": 1e-3, "blocks_to_swap": 5},
    "LoRA on int8, blocks in host memory": {
        **{"training_kind": "lora", "lora_rank": 4, "lr": 1e-3, "blocks_to_swap": 5, "quantization": "int8"}
    },
    "textual inversion": {"training_kind": "textual_inversion", "lr": 1e-3, "new_tokens": {"<square>": "square"}},
    "EMA on the GPU": {"ema_decay_rate": 0.9, "ema_update_interval": 1, "ema_device": "cuda"},
    "EMA on the host": {"ema_decay_rate": 0.9, "ema_update_interval": 1, "ema_device": "cpu"},
    "no latent cache": {"cache_latents": "off"},
}
LOW_PRECISION = 0.05
"""Losses of bfloat16 and float16 arithmetic differ from float32's by less than this share."""


@pytest.fixture
def settings(tmp_path: Path, tiny_model_folder: Path, image_folder: Path) -> dict[str, Any]:
    return {
        "resume_ckpt": str(tiny_model_folder),
        "data_root": str(image_folder),
        "resolution": 64,
        "batch_size": 4,
        "max_epochs": 3,
        "max_steps": 6,
        "lr": 1e-4,
        "logdir": str(tmp_path / "logs"),
        "no_save_ckpt": True,
        "sample_steps": None,
        "log_step": 1,
        "seed": 7,
        "num_workers": 0,
        "cache_variants": 1,
    }


def losses_of(run: RunFolder) -> list[float]:
    return list({event["step"]: event["loss"] for event in run.events("loss")}.values())


def unet_of(run: RunFolder) -> dict[str, torch.Tensor]:
    assert run.last_checkpoint is not None
    return load_file(run.last_checkpoint / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_trains_and_its_losses_are_those_of_float32(settings: dict[str, Any], kind: str) -> None:
    run = train(TrainConfig(**{**settings, **KINDS[kind]}))
    assert run.status()["state"] == "finished"
    found = losses_of(run)
    assert len(found) == 6 and all(map(math.isfinite, found))
    plain = {**settings, **KINDS[kind], "disable_amp": True, "logdir": settings["logdir"] + "-float32"}
    for setting in ("amp_dtype", "weight_dtype", "fused_backward"):
        plain.pop(setting, None)
    assert found[0] == pytest.approx(losses_of(train(TrainConfig(**{**plain, "max_steps": 1})))[0], rel=LOW_PRECISION)


@pytest.mark.parametrize("kind", ["defaults", "float16", "8-bit AdamW", "LoRA", "EMA on the host", "bfloat16 weights"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    settings: dict[str, Any], tmp_path: Path, deterministic: None, kind: str
) -> None:
    config = TrainConfig(**{**settings, **KINDS[kind]})
    complete = train(config)
    parted = train(config.replace(logdir=str(tmp_path / "parted")), listeners=[StopAfter(3)])
    assert parted.status()["state"] == "stopped"
    resume(parted.folder)
    assert losses_of(parted) == losses_of(complete)


KILLED = """
import os, signal, sys, torch
from everydream_kit.sessions import train
from everydream_kit.training.reports import Listener

class Kill(Listener):
    def __call__(self, run, report):
        if report.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

torch.use_deterministic_algorithms(True)
train(sys.argv[1], listeners=[Kill()])
"""


def test_a_killed_run_resumes_to_the_same_bytes(settings: dict[str, Any], tmp_path: Path, deterministic: None) -> None:
    config = TrainConfig(**{**settings, "save_every_n_steps": 2})
    complete = train(config)
    written = tmp_path / "killed.json"
    written.write_text(config.replace(logdir=str(tmp_path / "killed")).to_json(), encoding="utf-8")
    done = subprocess.run([sys.executable, "-P", "-c", KILLED, str(written)], check=False, timeout=280)
    assert done.returncode == -signal.SIGKILL
    (killed,) = list_runs(tmp_path / "killed")
    resume(killed.folder)
    assert losses_of(killed) == losses_of(complete)
    found, expected = unet_of(killed), unet_of(complete)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_flat_weights_train_as_separate_ones(settings: dict[str, Any], tmp_path: Path, deterministic: None) -> None:
    config = TrainConfig(**{**settings, "optimizer": "adamw8bit", "max_epochs": 8, "max_steps": 20})
    flat = train(config.replace(flat_weights="on"))
    separate = train(config.replace(flat_weights="off", logdir=str(tmp_path / "separate")))
    assert losses_of(flat) == pytest.approx(losses_of(separate), rel=1e-6)


@needs_cuda
@pytest.mark.parametrize("kind", ["defaults", "float16", "8-bit AdamW", "LoRA", "checkpointing", "accumulated"])
def test_replayed_passes_train_as_eager_ones(
    settings: dict[str, Any], tmp_path: Path, deterministic: None, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """What decides over `cuda_graphs`: twenty steps, samples and a save between them."""
    caplog.set_level(logging.INFO)
    more = {"checkpointing": {"gradient_checkpointing": True}, "accumulated": {"grad_accum": 2}}
    changed = {**KINDS.get(kind, {}), **more.get(kind, {}), "max_epochs": 40, "max_steps": 20, "sample_steps": 10}
    config = TrainConfig(**{**settings, **changed})
    eager = train(config)
    replayed = train(config.replace(cuda_graphs="on", logdir=str(tmp_path / "replayed")))
    assert "CUDA graph 1: a pass of" in caplog.text
    assert losses_of(replayed) == pytest.approx(losses_of(eager), rel=1e-6)


@needs_cuda
def test_a_run_with_graphs_resumes_without_them(settings: dict[str, Any], tmp_path: Path, deterministic: None) -> None:
    config = TrainConfig(**{**settings, "max_epochs": 40, "max_steps": 12})
    complete = train(config)
    graphs = config.replace(cuda_graphs="on", logdir=str(tmp_path / "parted"))
    parted = train(graphs, listeners=[StopAfter(7)])
    resume(parted.folder, changes={"cuda_graphs": "off"})
    assert losses_of(parted) == pytest.approx(losses_of(complete), rel=1e-6)


@pytest.mark.parametrize("is_recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", ["sd1", "z_image"])
def test_blocks_in_host_memory_change_no_number(
    settings: dict[str, Any], tmp_path: Path, deterministic: None, family: str, is_recomputed: bool
) -> None:
    """The copies on their own stream come in time, and nothing is overwritten while in use."""
    changed = {"training_kind": "lora", "lr": 1e-3, "gradient_checkpointing": is_recomputed, "sample_steps": 3}
    config = TrainConfig(**{**settings, **changed, "resume_ckpt": str(tiny_folder(family)), "max_steps": 6})
    plain = train(config)
    swapped = train(config.replace(blocks_to_swap=4, logdir=str(tmp_path / "swapped")))
    assert losses_of(swapped) == losses_of(plain)


def test_sdxl_trains_a_lora_and_samples_meanwhile(settings: dict[str, Any], tmp_path: Path) -> None:
    save_model(build_tiny_model("sdxl", seed=0), tmp_path / "sdxl")
    changed = {"resume_ckpt": str(tmp_path / "sdxl"), "training_kind": "lora", "lora_rank": 4, "sample_steps": 3}
    run = train(TrainConfig(**{**settings, **changed}))
    assert run.status()["state"] == "finished"
    assert list(run.folder.rglob("*.jpg")) or list(run.folder.rglob("*.png"))


@needs_cuda
def test_the_largest_batch_is_found(settings: dict[str, Any]) -> None:
    run = train(TrainConfig(**{**settings, "batch_size": "auto", "max_steps": 2}))
    assert run.status()["state"] == "finished"


@needs_cuda
def test_out_of_memory_is_answered_with_what_helps(settings: dict[str, Any]) -> None:
    torch.cuda.set_per_process_memory_fraction(0.002)
    try:
        with pytest.raises(MemoryLimitError, match="gradient_checkpointing"):
            train(TrainConfig(**{**settings, "batch_size": 64, "resolution": 512, "cache_latents": "off"}))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


@needs_cuda
@pytest.mark.full_size
@pytest.mark.parametrize("kind", ["8-bit AdamW", "fused AdamW", "gradient checkpointing"])
def test_a_plan_meets_the_measured_peak(settings: dict[str, Any], tmp_path: Path, kind: str) -> None:
    """SD 1.5 at its true size with random weights, 512 px, batch 4."""
    from everydream_kit.preflight.memory_estimate import estimate_memory
    from everydream_kit.preflight.skeleton import build_skeleton, shipped_architecture

    model = build_skeleton(shipped_architecture("sd1"), torch.float32)
    for module in model.modules().values():
        module.to_empty(device="cpu")
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    save_model(model, tmp_path / "sd15")
    changed = {"resume_ckpt": str(tmp_path / "sd15"), "resolution": 512, "max_steps": 3}
    config = TrainConfig(**{**settings, **KINDS[kind], **changed})
    torch.cuda.reset_peak_memory_stats()
    train(config)
    estimate = estimate_memory(config)
    assert torch.cuda.max_memory_allocated() == pytest.approx(estimate.worst.peak_bytes, rel=0.05)


def test_the_demo_learns_its_style(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "everydream_kit", "demo"],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
