"""A resume under changed settings or images: refused, or continued with the difference in words."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from stop_after import StopAfter

from everydream_kit.config import TrainConfig
from everydream_kit.errors import CheckpointError, ConfigError
from everydream_kit.foreign import Origin, write_origin
from everydream_kit.runs import RunFolder
from everydream_kit.sessions import resume, train


def settings(folder: Path, model: Path, images: Path) -> dict[str, Any]:
    return {
        "resume_ckpt": str(model),
        "data_root": str(images),
        "resolution": 64,
        "batch_size": 2,
        "max_epochs": 2,
        "lr": 1e-4,
        "logdir": str(folder / "logs"),
        "no_save_ckpt": True,
        "sample_steps": None,
        "log_step": 1,
        "seed": 7,
        "num_workers": 0,
        "cache_latents": "off",
        "disable_textenc_training": True,
    }


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, image_folder: Path) -> RunFolder:
    """Three steps of the seven that the first epoch has."""
    folder = tmp_path_factory.mktemp("stopped")
    run = train(TrainConfig(**settings(folder, tiny_model_folder, image_folder)), listeners=[StopAfter(2)])
    assert (run.status()["state"], run.status()["step"]) == ("stopped", 3)
    return run


@pytest.fixture
def run(stopped: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy, for one test."""
    return RunFolder(shutil.copytree(stopped.folder, tmp_path / stopped.name))


@pytest.fixture
def images(image_folder: Path, tmp_path: Path) -> Path:
    """The same images in another place."""
    return shutil.copytree(image_folder, tmp_path / "images")


def warnings_of(run: RunFolder) -> str:
    return "\n".join(event["message"] for event in run.events("warning"))


def uses_in_first_epoch(run: RunFolder) -> dict[str, int]:
    table = json.loads((run.folder / "losses" / "ep0.json").read_text("utf-8"))
    return {Path(row["path"]).name: row["count"] for row in table["images"]}


def names_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".txt")


def test_a_change_that_the_model_refuses_is_not_remembered(run: RunFolder) -> None:
    before = run.config_path.read_text("utf-8")
    with pytest.raises(ConfigError, match=r"timestep_shift: .*Leave it out"):
        resume(run.folder, changes={"timestep_shift": 3.0, "max_epochs": 1})
    with pytest.raises(CheckpointError, match="family: cannot change on resume"):
        resume(run.folder, changes={"family": "sd2"})
    assert run.config_path.read_text("utf-8") == before
    assert not run.changed_config_path(3).exists()
    resume(run.folder, changes={"max_steps": 4})
    assert (run.status()["state"], run.status()["step"], run.settings()["max_steps"]) == ("finished", 4, 4)
    assert run.changed_config_path(3).read_text("utf-8") == before
    assert "changed from step 3 on: {'max_steps': 4}" in run.log_path.read_text("utf-8")


def test_a_base_that_a_fetched_run_was_given_wrongly_can_be_given_again(
    run: RunFolder, tiny_model_folder: Path
) -> None:
    write_origin(run.folder, Origin("hf://me/jets", "0" * 40, "jets", given=["resume_ckpt"]))
    again = str(tiny_model_folder / ".." / tiny_model_folder.name)
    resume(run.folder, changes={"resume_ckpt": again, "max_steps": 4})
    assert (run.status()["step"], run.settings()["resume_ckpt"]) == (4, again)


def test_the_same_images_in_another_place_continue_without_a_warning(run: RunFolder, images: Path) -> None:
    resume(run.folder, changes={"data_root": str(images), "max_epochs": 1})
    assert "anew" not in warnings_of(run)
    assert "images are gone" not in warnings_of(run)
    assert uses_in_first_epoch(run) == dict.fromkeys(names_of(images), 1)
    assert (run.status()["state"], run.status()["step"]) == ("finished", 7)


def test_images_that_are_gone_are_said_and_the_epoch_begins_anew(run: RunFolder, images: Path) -> None:
    (images / "11.png").unlink()
    (images / "10.jpg").unlink()
    resume(run.folder, changes={"data_root": str(images), "max_epochs": 1})
    assert "2 images are gone and 0 are new" in warnings_of(run)
    assert "Epoch 1 starts over: the images, their sizes or their multipliers changed" in warnings_of(run)
    assert uses_in_first_epoch(run) == dict.fromkeys(names_of(images), 1)


def test_images_that_were_exchanged_in_equal_number_are_said(run: RunFolder, images: Path) -> None:
    (images / "04.jpg").rename(images / "99.jpg")
    resume(run.folder, changes={"data_root": str(images), "max_epochs": 1})
    assert "1 images are gone and 1 are new" in warnings_of(run)
    assert uses_in_first_epoch(run) == dict.fromkeys(names_of(images), 1)


@pytest.mark.parametrize(
    ("change", "words", "num_left"),
    [
        ({"batch_size": 4}, "batch_size was 2 and is 4", 4),
        ({"grad_accum": 2}, "grad_accum was 1 and is 2", 4),
        ({"resolution": 96}, "resolution was", None),
    ],
    ids=str,
)
def test_other_batches_in_the_middle_of_an_epoch_begin_it_anew_and_skip_nothing(
    run: RunFolder, image_folder: Path, change: dict[str, Any], words: str, num_left: int | None
) -> None:
    resume(run.folder, changes={**change, "max_epochs": 1})
    assert "Epoch 1 starts over" in warnings_of(run)
    assert words in warnings_of(run)
    assert uses_in_first_epoch(run) == dict.fromkeys(names_of(image_folder), 1)
    status = run.status()
    assert (status["state"], status["step"]) == ("finished", status["num_steps"])
    if num_left is not None:
        assert status["step"] == 3 + num_left
    assert run.checkpoints()[-1].folder.name.startswith("last-")


def test_a_second_resume_continues_what_the_first_had_changed(run: RunFolder, tmp_path: Path) -> None:
    changes = {"batch_size": 4, "lr_scheduler": "cosine", "lr_warmup_steps": 0}
    once = RunFolder(shutil.copytree(run.folder, tmp_path / "once" / run.name))
    resume(once.folder, changes=changes)
    resume(run.folder, changes=changes, listeners=[StopAfter(9)])
    assert (run.status()["state"], run.status()["step"]) == ("stopped", 10)
    assert [checkpoint.name.startswith("last-") for checkpoint in run.checkpoints()] == [False, False]
    resume(run.folder)
    assert (run.status()["step"], run.status()["num_steps"]) == (11, 11)
    rates = [[event["lr"]["unet"] for event in one.events("loss")] for one in (once, run)]
    assert rates[0] == rates[1]
    unets = [one.last_checkpoint / "unet" / "diffusion_pytorch_model.safetensors" for one in (once, run)]
    assert unets[0].read_bytes() == unets[1].read_bytes()
    resume(run.folder, changes={"max_epochs": 3, "save_every_n_steps": 1})
    assert (run.status()["step"], run.status()["num_steps"]) == (15, 15)
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [3, 10, 11, 12, 13, 14, 15]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optimizer_config": {"base": {"optimizer": "lion"}}}, "optimizer: cannot change"),
        ({"optimizer_config": {"unet_freezing": {"train": ["attn2"]}}}, "unet_train_layers: cannot change"),
        ({"disable_textenc_training": False}, "disable_textenc_training: cannot change"),
        ({"lora_rank": 8}, "lora_rank: cannot change"),
    ],
)
def test_another_training_is_refused_before_it_begins(run: RunFolder, change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        resume(run.folder, changes=change)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"optimizer": "lion"}, "the unet's optimizer was AdamW and is Lion"),
        ({"unet_train_layers": ["attn2"]}, "other parameters of the unet were trained"),
        ({"disable_textenc_training": False}, "the text encoder was not trained"),
    ],
)
def test_a_run_whose_settings_file_was_edited_is_checked_against_its_checkpoint(
    run: RunFolder, edit: dict[str, Any], words: str
) -> None:
    values = {**json.loads(run.config_path.read_text("utf-8")), **edit}
    values["given"] = sorted({*values["given"], *edit})
    run.config_path.write_text(json.dumps(values), "utf-8")
    with pytest.raises(CheckpointError, match=words):
        resume(run.folder)


def test_a_learning_rate_that_jumps_is_said_beforehand(
    tmp_path: Path, tiny_model_folder: Path, image_folder: Path
) -> None:
    plain = {**settings(tmp_path, tiny_model_folder, image_folder), "batch_size": 4, "lr_scheduler": "cosine"}
    run = train(TrainConfig(**{**plain, "max_epochs": 1, "lr_warmup_steps": 0}))
    assert run.status()["state"] == "finished"
    last = [event["lr"]["unet"] for event in run.events("loss")][-1]
    resume(run.folder, changes={"max_epochs": 2})
    following = next(event["lr"]["unet"] for event in run.events("loss") if event["step"] == 5)
    assert following > 1.3 * last
    said = f"The learning rate of the unet goes from {last:.3g} at step 4 to {following:.3g} at step 5"
    assert Counter(said in event["message"] for event in run.events("warning"))[True] == 1
