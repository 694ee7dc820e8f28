"""`everydream train` with the flags of the main job: what each word says is seen in what the run left behind."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from everydream_kit.cli import main
from everydream_kit.runs import RunFolder, list_runs

BATCH, ACCUM, EPOCHS, LR = 4, 2, 3, 1e-4
FLAGS = [
    "--resolution",
    "128",
    "--batch_size",
    "4",
    "--max_epochs",
    "3",
    "--lr",
    "1e-4",
    "--lr_scheduler",
    "cosine",
    "--grad_accum",
    "2",
    "--cond_dropout",
    "0.1",
    "--clip_skip",
    "2",
    "--flip_p",
    "0.5",
    "--shuffle_tags",
    "--scale_lr",
    "--write_schedule",
    "--clip_grad_norm",
    "1.0",
    "--log_step",
    "1",
    "--seed",
    "7",
    "--project_name",
    "t",
    "--sample_steps",
    "3",
]


def everydream(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "everydream_kit", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, image_folder: Path) -> Path:
    """A working folder in which the command ran; its logs are in L and its single files in S."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "sample_prompts.txt").write_text("a red square\n\na blue square\n", "utf-8")
    done = everydream(
        "train", *FLAGS, "--logdir", "L", "--save_ckpt_dir", "S", "--resume_ckpt", tiny_model_folder,
        "--data_root", image_folder, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "finished: L/t-" in done.stdout
    return folder


@pytest.fixture(scope="module")
def run(trained: Path) -> RunFolder:
    return list_runs(trained / "L", "t")[-1]


@pytest.fixture(scope="module")
def losses(run: RunFolder) -> list[dict]:
    return list(run.events("loss"))


def test_the_logged_rate_follows_the_cosine_with_warm_up_and_scaling(run: RunFolder, losses: list[dict]) -> None:
    num_steps = len(losses)
    peak = LR * (BATCH * ACCUM) ** 0.55
    decay_steps = int(num_steps * 1.5)
    expected = [
        peak * 0.5 * (1 + math.cos(math.pi * step / decay_steps)) for step in range(num_steps)
    ]  # 2 % is not a step
    assert [entry["lr"]["unet"] for entry in losses] == pytest.approx(expected)
    assert [entry["lr"]["text encoder"] for entry in losses] == pytest.approx(expected)


def test_the_schedule_names_the_images_that_were_trained(run: RunFolder, image_folder: Path) -> None:
    for epoch in range(EPOCHS):
        lines = (run.folder / f"ep{epoch}_batch_schedule.txt").read_text("utf-8").splitlines()
        planned = sorted(Path(line.split("path:")[1]).name for line in lines)
        assert planned == sorted(path.name for path in image_folder.iterdir() if path.suffix != ".txt")
        table = json.loads((run.folder / "losses" / f"ep{epoch}.json").read_text("utf-8"))
        assert sorted(Path(row["path"]).name for row in table["images"]) == planned
        for line in lines:
            width, height = json.loads(line.split("wh:")[1].split("]")[0] + "]")
            assert width * height <= 128 * 128


def test_the_gradient_norm_is_logged_before_it_is_clipped(losses: list[dict]) -> None:
    assert all(entry["gradient_norm"] > 0 for entry in losses)
    assert max(entry["gradient_norm"] for entry in losses) > 1.0  # clipped to it, and the log says what it was


def test_the_run_folder_holds_what_others_rely_on(run: RunFolder) -> None:
    names = {path.name for path in run.folder.iterdir()}
    assert {"config.json", "environment.json", "train.log", "events.jsonl", "status.json", "samples", "ckpts"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    config = json.loads(run.config_path.read_text("utf-8"))
    assert (config["lr"], config["clip_skip"], config["flip_p"], config["shuffle_tags"]) == (LR, 2, 0.5, True)
    assert run.status()["state"] == "finished"


def test_samples_are_drawn_every_so_many_steps_and_at_the_end(run: RunFolder, losses: list[dict]) -> None:
    steps = {int(path.name[2:7]) for path in run.samples()}
    assert {3, 6, len(losses)} <= steps
    first = [path for path in run.samples() if path.name.startswith("gs00003")]
    assert [path.stem for path in first] == ["gs00003-000-a red square", "gs00003-001-a blue square"]  # no blank prompt
    assert "seed: 7" in first[0].with_suffix(".txt").read_text("utf-8")


def test_tensorboard_has_the_scalars_that_people_know(run: RunFolder, losses: list[dict]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run.folder))
    board.Reload()
    wanted = {
        "loss/log_step",
        "loss/epoch",
        "hyperparameter/lr unet",
        "hyperparameter/lr text encoder",
        "performance/images per second",
        "performance/minutes per epoch",
        "performance/vram",
    }
    assert wanted <= set(board.Tags()["scalars"])
    assert [point.value for point in board.Scalars("loss/log_step")] == pytest.approx(
        [entry["loss"] for entry in losses]
    )
    assert any("a red square" in tag for tag in board.Tags()["images"])


def test_the_last_checkpoint_and_the_single_file_hold_trained_weights(
    trained: Path, run: RunFolder, tiny_model_folder: Path
) -> None:
    from safetensors.torch import load_file

    assert run.last_checkpoint.name == f"last-t-ep03-gs{run.status()['step']:05}"
    before = load_file(tiny_model_folder / "text_encoder" / "model.safetensors")
    after = load_file(run.last_checkpoint / "text_encoder" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(name.startswith("text_model.") for name in after)
    assert any(not torch.equal(before[name], after[name]) for name in after)
    single = load_file(trained / "S" / f"{run.last_checkpoint.name}.safetensors")
    assert {tensor.dtype for tensor in single.values() if tensor.is_floating_point()} == {torch.float16}
    vae = load_file(run.last_checkpoint / "vae" / "diffusion_pytorch_model.safetensors")
    vae_before = load_file(tiny_model_folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(vae[name], vae_before[name]) for name in vae)


def test_the_run_s_own_config_starts_the_same_run_again(trained: Path, run: RunFolder, losses: list[dict]) -> None:
    done = everydream("train", "--config", run.config_path, "--logdir", "L2", "--no_save_ckpt", cwd=trained)
    assert done.returncode == 0, done.stderr
    again = list_runs(trained / "L2", "t")[-1]
    assert [entry["loss"] for entry in again.events("loss")] == [entry["loss"] for entry in losses]


def test_clip_skip_two_gives_the_penultimate_layer_with_the_final_norm(tiny_model_folder: Path) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    from everydream_kit.models.encoding import encode_captions
    from everydream_kit.models.family import text_tower
    from everydream_kit.models.loading import load_model

    model = load_model(tiny_model_folder)
    tokenizer = CLIPTokenizer.from_pretrained(tiny_model_folder / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(tiny_model_folder / "text_encoder", dtype=torch.float32)
    ids = tokenizer(["a red square"], padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = text_encoder(ids, output_hidden_states=True).hidden_states
        expected = text_tower(text_encoder).final_layer_norm(hidden[-2])
        returned = encode_captions(model, ["a red square"], 2).encoder_hidden_states
        last = encode_captions(model, ["a red square"], 0).encoder_hidden_states
    torch.testing.assert_close(returned, expected)
    assert not torch.allclose(returned, last)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--optimizer nosuch", "optimizer: unknown name 'nosuch'"),
        ("--push_to bad/na/me", "bad/na/me: not a repository's name"),
        ("--push_to me/jets", "No Hugging Face token was found"),
        ("--sample_prompts nope.txt", "sample_prompts: nope.txt is not there"),
        ("--lora_form loha", "lora_form, training_kind: loha is a form of training_kind lora, and full was asked for"),
    ],
)
def test_what_needs_no_model_is_checked_before_there_is_a_run(
    words: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert main(["train", "--resume_ckpt", "absent.safetensors", "--data_root", "absent", *words.split()]) == 1
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()
