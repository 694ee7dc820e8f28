"""Two processes: half the batch each, the same sums, whether each has the whole model or a slice of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_folder

from everydream_kit.config import TrainConfig
from everydream_kit.config.precision_settings import PrecisionGroup
from everydream_kit.errors import ConfigError
from everydream_kit.runs import RunFolder
from everydream_kit.sessions import resume, train
from everydream_kit.training.checkpoints import verify_checkpoint
from everydream_kit.training.precision import choose_precision
from everydream_kit.training.sharding import refuse_unshardable

pytestmark = pytest.mark.timeout(600)  # two processes that wait for each other crawl where others use the cores, too
SCRIPT = Path(__file__).parents[1] / "support" / "two_ranks.py"
WEIGHTS = ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")


def settings(folder: Path, model: Path, images: Path) -> dict[str, Any]:
    return {
        "resume_ckpt": str(model),
        "data_root": str(images),
        "project_name": "ranks",
        "logdir": str(folder / "logs"),
        "resolution": 64,
        "batch_size": 4,
        "max_epochs": 1,
        # a large eps: Adam would divide by rounding errors where a gradient is almost zero
        "optimizer_config": {"base": {"optimizer": "adamw", "epsilon": 1e-2}},
        "lr": 1e-3,
        "clip_grad_norm": 0.5,
        "no_save_ckpt": True,
        "sample_steps": None,
        "log_step": 1,
        "num_workers": 0,
        "cache_variants": 1,
        "timestep_sampling": "stratified",
        "cond_dropout": 0.2,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, image_folder: Path) -> Path:
    """Where two processes have trained: `ddp` with half the batch each, `fsdp2` with slices of the model as well."""
    folder = tmp_path_factory.mktemp("ranks")
    config = json.dumps(settings(folder, tiny_model_folder, image_folder))
    (folder / "config.json").write_text(config, "utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(SCRIPT), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, image_folder: Path) -> RunFolder:
    """The run of one process with the whole batch."""
    return train(settings(tmp_path_factory.mktemp("alone"), tiny_model_folder, image_folder))


def losses_of(run: RunFolder) -> list[float]:
    return [event["loss"] for event in run.events("loss")]


def assert_same_run(one: RunFolder, two: RunFolder) -> None:
    assert len(losses_of(one)) == 4
    assert losses_of(two) == pytest.approx(losses_of(one), abs=1e-5)
    for part in WEIGHTS:
        first, second = load_file(one.last_checkpoint / part), load_file(two.last_checkpoint / part)
        assert first.keys() == second.keys()
        assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-5


def test_two_processes_with_half_the_batch_equal_one(folder: Path, alone: RunFolder) -> None:
    assert_same_run(alone, RunFolder(folder / "ddp"))


def test_gradients_sent_in_pieces_are_the_plain_sums_bit_for_bit(folder: Path) -> None:
    assert json.loads((folder / "sums.json").read_text("utf-8")) == [True, True, True]


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("clip_skip", range(5))
def test_slices_of_the_text_encoders_have_the_gradients_of_whole_ones(
    folder: Path, family: str, clip_skip: int
) -> None:
    far, largest = json.loads((folder / "text_encoders.json").read_text("utf-8"))[f"{family} {clip_skip}"]
    assert largest > 1e-6
    assert far < 1e-5 * largest


def test_sdxl_trains_in_slices_with_its_text_encoders(folder: Path, tmp_path: Path) -> None:
    run = RunFolder(folder / "sdxl")
    assert (run.status()["state"], run.status()["step"]) == ("finished", 1)
    before = load_file(tiny_folder("sdxl") / "text_encoder_2" / "model.safetensors")
    after = load_file(run.last_checkpoint / "text_encoder_2" / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_slices_of_the_model_are_trained_saved_and_resumed_by_two_processes_and_by_one(
    folder: Path, alone: RunFolder
) -> None:
    two = RunFolder(folder / "fsdp2")
    assert [event["step"] for event in two.events("resumed")] == [2]
    assert two.checkpoints()[-1].step == 3
    assert [event["step"] for event in two.events("sample")] == [2, 3]
    assert [event["step"] for event in two.events("validation")] == [0]
    verify_checkpoint(two.last_checkpoint)
    resume(two.folder, changes={"batch_size": 4, "max_steps": None, "sample_steps": None})
    assert any("has no effect on one process" in event["message"] for event in two.events("warning"))
    assert_same_run(alone, two)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"training_kind": "lora"}, "training_kind lora"),
        ({"weight_dtype": "bfloat16"}, "weight_dtype bfloat16"),
        ({"amp_dtype": "fp16"}, "amp_dtype fp16"),
        ({"ema_decay_rate": 0.99}, "ema_decay_rate 0.99"),
        ({"ema_strength_target": 0.1}, "ema_strength_target 0.1"),
        ({"fused_backward": True}, "fused_backward True"),
        ({"channels_last": True}, "channels_last True"),
        ({"torch_compile": True}, "torch_compile True"),
    ],
)
def test_what_does_not_work_on_slices_is_refused_with_the_cure(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"fsdp2 does not work with {words}; set it to .* or parallel to ddp"):
        TrainConfig(resume_ckpt="embedded", parallel="fsdp2", **change)


def test_an_optimizer_or_a_format_that_does_not_work_on_slices_is_refused_by_name() -> None:
    plain = choose_precision("cpu", PrecisionGroup())
    refuse_unshardable(plain, ["AdamW"])
    with pytest.raises(ConfigError, match="adamw8bit does not work on the slices of fsdp2; use adamw"):
        refuse_unshardable(plain, ["adamw", "adamw8bit"])
    with pytest.raises(ConfigError, match="fsdp2 works in bfloat16 or float32"):
        refuse_unshardable(choose_precision("cpu", PrecisionGroup(amp_dtype="fp16")), ["adamw"])
