"""A LoRA's checkpoint finds its base from any folder, says whose base is missing, and warns of a wrong one."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from stop_after import StopAfter
from tiny_models import tiny_folder

from everydream_kit.cli import main
from everydream_kit.config import TrainConfig
from everydream_kit.errors import ConfigError, ModelError
from everydream_kit.export.single_file_export import export_checkpoint
from everydream_kit.models.fingerprints import weights_fingerprint
from everydream_kit.models.loading import load_model, open_model
from everydream_kit.models.random_models import build_tiny_model, write_model
from everydream_kit.runs import RunFolder, list_runs
from everydream_kit.sessions import resume, train

NAME = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"


def the_run(project: Path) -> RunFolder:
    return list_runs(project / "logs")[0]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """A folder with a base, images and a stopped LoRA run, all of them named by relative paths."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(tiny_folder("sd1"), folder / "base")
    shutil.copytree(image_folder, folder / "images")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = TrainConfig(
            resume_ckpt="base",
            data_root="images",
            resolution=64,
            training_kind="lora",
            lora_rank=2,
            max_epochs=1,
            max_steps=3,
            lr=1e-3,
            sample_steps=None,
            no_save_ckpt=True,
            num_workers=0,
        )
        assert train(config, listeners=[StopAfter(1)]).status()["state"] == "stopped"
    return folder


@pytest.fixture
def checkpoint(project: Path, tmp_path: Path) -> Path:
    """A copy of the run's checkpoint; the base is where it was."""
    return shutil.copytree(the_run(project).last_checkpoint, tmp_path / "jets")


@pytest.fixture
def moved(project: Path, tmp_path: Path) -> Iterator[Path]:
    """The base, which is somewhere else now."""
    yield (project / "base").rename(tmp_path / "moved")
    (tmp_path / "moved").rename(project / "base")


@pytest.fixture
def another_base(tmp_path: Path) -> Path:
    return write_model(build_tiny_model("sd1", seed=1), tmp_path / "another")


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    try:
        status = main([str(word) for word in words])
    except SystemExit as ended:
        status = int(ended.code or 0)
    shown = capsys.readouterr()
    return status, shown.err + shown.out


def test_export_sample_and_resume_work_from_another_folder(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(shutil.copytree(the_run(project).folder, tmp_path / "logs" / "run-20260101-000000"))
    monkeypatch.chdir(tmp_path)
    status, text = said(capsys, "export", run.folder, "lora.safetensors", "--format", "lora")
    assert status == 0, text
    assert said(capsys, "export", run.folder, "merged.safetensors")[0] == 0
    few = ("--num_inference_steps", 1, "--width", 64, "--height", 64)
    assert said(capsys, "sample", run.folder, "--prompt", "a square", *few)[0] == 0
    assert resume(run.folder).status()["state"] == "finished"
    warnings = " ".join(event["message"] for event in run.events("warning"))
    assert f"data_root: not in {tmp_path}, so {project / 'images'} is used" in warnings
    note = json.loads((run.last_checkpoint / "adapter.json").read_text("utf-8"))
    assert note["base"]["source"] == str(project / "base")


COMMANDS = {
    "export": ("export", "{lora}", "{out}.safetensors"),
    "export of the LoRA": ("export", "{lora}", "{out}.safetensors", "--format", "lora"),
    "export of a folder": ("export", "{lora}", "{out}", "--format", "diffusers"),
    "sample": ("sample", "{lora}", "--prompt", "x", "--num_inference_steps", "1", "--width", "64", "--height", "64"),
    "merge as the first": ("merge", "{lora}", "{base}", "{out}.safetensors"),
    "extract": ("extract", "{lora}", "{base}", "{out}.safetensors"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_base_that_is_gone_is_named_as_this_loras_and_another_can_be_given(
    name: str,
    checkpoint: Path,
    project: Path,
    moved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word.format(lora=checkpoint, base=moved, out=tmp_path / "out") for word in COMMANDS[name]]
    status, text = said(capsys, *words)
    assert status == 1
    assert f"{checkpoint}: the base model of this LoRA, {project / 'base'}, cannot be used: " in text
    assert "name it with --base" in text
    status, text = said(capsys, *words, "--base", moved)
    assert status == 0, text
    assert "are not those of the base" not in text


def test_a_resume_takes_another_place_of_the_base_and_remembers_it(
    project: Path, moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(shutil.copytree(the_run(project).folder, tmp_path / "run"))
    monkeypatch.chdir(project)
    status, text = said(capsys, "resume", run.folder)
    assert (status, f"the base model of this LoRA, {project / 'base'}" in text) == (1, True), text
    status, text = said(capsys, "resume", run.folder, "--base", moved)
    assert status == 0, text
    assert json.loads((run.last_checkpoint / "adapter.json").read_text("utf-8"))["base"]["source"] == str(moved)


def test_a_base_of_other_weights_is_warned_of(
    checkpoint: Path, another_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        export_checkpoint(checkpoint, tmp_path / "x.safetensors", adapter_base=another_base)
    assert f"the weights of {another_base} are not those of the base that this LoRA was trained on" in caplog.text


def test_apps_are_shown_the_name_of_a_lora_checkpoint(project: Path) -> None:
    checkpoint = the_run(project).last_checkpoint
    with safe_open(checkpoint / "pytorch_lora_weights.safetensors", "pt") as file:
        header = file.metadata()
    assert (header["modelspec.title"], header["ss_output_name"]) == (checkpoint.name, checkpoint.name)


def test_a_whole_model_needs_no_base(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = said(capsys, "export", project / "base", tmp_path / "x.safetensors", "--base", project / "base")
    assert (status, "not a LoRA checkpoint, so no base is needed" in text) == (1, True)
    with pytest.raises(ModelError, match="no base is needed"):
        load_model(project / "base", adapter_base=project / "base")


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_fingerprint_is_of_the_weights_and_not_of_the_file(family: str, tmp_path: Path) -> None:
    base = weights_fingerprint(open_model(tiny_folder(family)))
    for precision in ("fp32", "fp16"):
        for suffix in (".safetensors", ".ckpt"):
            file = export_checkpoint(tiny_folder(family), tmp_path / f"{precision}{suffix}", precision)
            assert weights_fingerprint(open_model(file)) == base
    assert weights_fingerprint(open_model(write_model(build_tiny_model(family, seed=1), tmp_path / "other"))) != base


def test_a_change_of_one_layer_changes_the_fingerprint(tmp_path: Path) -> None:
    files = open_model(tiny_folder("sd1"))
    before = weights_fingerprint(files)
    weights = files.tensors["unet"][NAME].read().clone()
    weights[0, 0] += 0.01
    files.tensors["unet"][NAME] = type(files.tensors["unet"][NAME]).of(weights)
    assert weights_fingerprint(files) != before


def test_a_base_that_is_named_keeps_what_the_training_took_it_for(checkpoint: Path, project: Path) -> None:
    note = json.loads((checkpoint / "adapter.json").read_text("utf-8"))
    note["base"] |= {"prediction_type": "v_prediction", "subfolder": "nowhere"}
    (checkpoint / "adapter.json").write_text(json.dumps(note), "utf-8")
    assert load_model(checkpoint, adapter_base=project / "base").prediction_type == "v_prediction"
    assert torch.equal(
        open_model(checkpoint, adapter_base=project / "base").tensors["vae"]["decoder.conv_in.weight"].read(),
        load_file(project / "base" / "vae" / "diffusion_pytorch_model.safetensors")["decoder.conv_in.weight"],
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"training_kind": "full"},
            "training_kind full: .*jets is a LoRA.*Continue it with training_kind lora, or merge",
        ),
        ({"lora_rank": 4}, "lora_rank: the LoRA .*jets was made with 2, and 4 was asked for. Leave it out"),
        ({"lora_targets": ["to_q"]}, "lora_targets: the LoRA .* was made with None, and .*to_q"),
    ],
)
def test_a_run_that_starts_from_a_lora_does_not_train_what_its_checkpoints_could_not_hold(
    checkpoint: Path, project: Path, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        train(from_checkpoint(checkpoint, project, tmp_path, **changes))


def test_a_run_that_starts_from_a_lora_continues_it(checkpoint: Path, project: Path, tmp_path: Path) -> None:
    run = train(from_checkpoint(checkpoint, project, tmp_path, lora_rank=2))
    before, after = (
        load_file(folder / "pytorch_lora_weights.safetensors") for folder in (checkpoint, run.last_checkpoint)
    )
    assert {name: rows.shape for name, rows in before.items()} == {name: rows.shape for name, rows in after.items()}
    assert any(not torch.equal(before[name], after[name]) for name in before)


def from_checkpoint(checkpoint: Path, project: Path, tmp_path: Path, **changes: object) -> dict[str, object]:
    return {
        "resume_ckpt": str(checkpoint),
        "data_root": str(project / "images"),
        "logdir": str(tmp_path / "logs"),
        "resolution": 64,
        "training_kind": "lora",
        "max_steps": 1,
        "lr": 1e-3,
        "sample_steps": None,
        "no_save_ckpt": True,
        "num_workers": 0,
        **changes,
    }


def test_a_run_that_starts_from_a_learned_word_learns_the_words_that_are_new(project: Path, tmp_path: Path) -> None:
    words = from_checkpoint(project / "base", project, tmp_path, training_kind="textual_inversion")
    first = train({**words, "new_tokens": {"<cat>": "cat"}})
    second = train({**words, "resume_ckpt": str(first.last_checkpoint), "new_tokens": {"<dog>": "dog"}})
    note = json.loads((second.last_checkpoint / "adapter.json").read_text("utf-8"))
    assert sorted(note["new_tokens"]) == ["<cat>", "<dog>"]
    with pytest.raises(ConfigError, match="is a learned word, whose checkpoints hold nothing else"):
        train({**words, "resume_ckpt": str(first.last_checkpoint), "training_kind": "full"})
