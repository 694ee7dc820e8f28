"""What watches a run changes nothing of it, and a resume is exact: bfloat16 autocast, the text cache, every kind of training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stop_after import StopAfter

from everydream_kit.config import TrainConfig
from everydream_kit.runs import RunFolder
from everydream_kit.sessions import resume, train
from everydream_kit.training.reports import Listener, StepReport
from everydream_kit.training.run import Run

EMA = {"ema_decay_rate": 0.9, "ema_update_interval": 1}
MIXED = {"amp_dtype": "bf16", "disable_textenc_training": True}
"""What a GPU does by default where the text encoder is frozen: its captions are remembered."""


@pytest.fixture
def settings(tmp_path: Path, family_folder: Path, image_folder: Path) -> dict[str, Any]:
    return {
        "resume_ckpt": str(family_folder),
        "data_root": str(image_folder),
        "resolution": 64,
        "batch_size": 4,
        "max_epochs": 2,
        "max_steps": 4,
        "lr": 1e-3,
        "logdir": str(tmp_path / "logs"),
        "no_save_ckpt": True,
        "sample_steps": None,
        "log_step": 1,
        "seed": 7,
        "num_workers": 0,
        "cache_latents": "off",
        "cond_dropout": 0.2,
    }


def state_of(run: RunFolder) -> dict[str, torch.Tensor]:
    """Every tensor that the last checkpoint holds: weights, optimizer's state, averages."""
    files = sorted(run.last_checkpoint.rglob("*.safetensors"))
    assert files
    return {
        f"{file.relative_to(run.last_checkpoint)}/{name}": tensor
        for file in files
        for name, tensor in load_file(file).items()
    }


def assert_same_state(first: RunFolder, second: RunFolder) -> None:
    one, other = state_of(first), state_of(second)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


class BusyHands(Listener):
    """A person who edits the prompts after the first step and presses "sample now"."""

    def __init__(self, prompts: Path) -> None:
        self.prompts = prompts
        self._write("a red square, plain, flat, number 0")

    def __call__(self, run: Run, report: StepReport) -> None:
        if report.step == 1:
            self._write("a green square, plain, flat, number 1")
            run.folder.request("sample")

    def _write(self, prompt: str) -> None:
        entry = {"cfgs": [3], "num_inference_steps": 1, "resolution": 64, "samples": [{"prompt": prompt}]}
        self.prompts.write_text(json.dumps(entry), "utf-8")


def watched(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Settings with everything that looks at the run while it trains."""
    return {
        **settings,
        "sample_steps": 2,
        "sample_before_training": True,
        "sample_prompts": str(folder / "prompts.json"),
        "save_every_n_steps": 3,
        "write_schedule": True,
        "load_settings_every_epoch": True,
        "validation_config": {
            "val_split_mode": "manual",
            "manual_data_root": settings["data_root"],
            "stabilize_training_loss": True,
            "every_n_epochs": 0.5,
        },
    }


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("sd1", {**MIXED, **EMA}),
        ("sd1", {**MIXED, "disable_textenc_training": False}),
        ("z_image", {"amp_dtype": "bf16", **EMA}),
    ],
    ids=["captions remembered, EMA", "captions encoded again", "Z-Image, EMA"],
    indirect=["family"],
)
def test_validation_samples_requests_and_a_resume_change_no_weight(
    settings: dict[str, Any], tmp_path: Path, kind: dict[str, Any]
) -> None:
    bare = train(TrainConfig(**{**settings, **kind}))
    config = TrainConfig(**{**watched(settings, tmp_path), **kind, "logdir": str(tmp_path / "watched")})
    run = train(config, listeners=[BusyHands(tmp_path / "prompts.json"), StopAfter(2)])
    assert run.status()["state"] == "stopped"
    resume(run.folder)
    assert sum(1 for _ in run.events("validation")) >= 3
    assert len({event["prompt"] for event in run.events("sample")}) == 2
    assert_same_state(bare, run)


def with_dropout(model: Path, copy: Path, attention_dropout: float) -> Path:
    """A copy of a model whose text encoder drops attention out by itself."""
    shutil.copytree(model, copy)
    config = json.loads((copy / "text_encoder" / "config.json").read_text("utf-8"))
    config["attention_dropout"] = attention_dropout
    (copy / "text_encoder" / "config.json").write_text(json.dumps(config), "utf-8")
    return copy


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("sd1", {"optimizer": "prodigy", "lr": 1.0, "ema_decay_rate": 0.9, "ema_update_interval": 1}),
        ("sd1", {"training_kind": "lora", "lora_rank": 2, "lora_dropout": 0.3}),
        ("sd1", {"training_kind": "textual_inversion", "new_tokens": {"<zkx>": "red"}}),
        ("sd1", {"weight_dtype": "bfloat16"}),
        ("sd1", {"optimizer": "dowg", "lr": 1.0}),
        ("sd1", {**MIXED, "validation_config": {"val_split_mode": "manual", "every_n_epochs": 0.5}}),
        ("sd1", {"disable_textenc_training": True}),
        ("sd1", {"attention_dropout": 0.5}),
        ("z_image", {"training_kind": "lora", "lora_rank": 2, "lora_dropout": 0.3}),
    ],
    ids=[
        "Prodigy and EMA",
        "LoRA and dropout",
        "new tokens",
        "bfloat16",
        "DoWG",
        "validation, bf16",
        "text cache",
        "dropout",
        "Z-Image, LoRA and dropout",
    ],
    indirect=["family"],
)
def test_a_resume_with_other_loader_processes_is_exact(
    settings: dict[str, Any], tmp_path: Path, kind: dict[str, Any]
) -> None:
    if "attention_dropout" in kind:
        settings["resume_ckpt"] = str(with_dropout(Path(settings["resume_ckpt"]), tmp_path / "model", **kind))
        kind = {}
    if "validation_config" in kind:
        kind = {**kind, "validation_config": {**kind["validation_config"], "manual_data_root": settings["data_root"]}}
    config = TrainConfig(**{**settings, **kind})
    whole = train(config)
    parted = train(config.replace(logdir=str(tmp_path / "parted")), listeners=[StopAfter(2)])
    assert parted.status()["state"] == "stopped"
    resume(parted.folder, changes={"num_workers": 2})
    assert_same_state(whole, parted)
