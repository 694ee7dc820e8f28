"""A run of few weights (LoRA, new words), pushed while training, continues elsewhere; nothing of it decides there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hub_runs import TOKEN
from hub_stand_in import HubStandIn

import everydream_kit as edk
from everydream_kit.errors import ConfigError
from everydream_kit.foreign import read_origin
from tests.support.rehearsals import square_images
from tests.support.tiny_models import tiny_folder

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"training_kind": "lora", "lora_rank": 4, "lora_text_encoder": True},
    "textual_inversion": {"training_kind": "textual_inversion", "new_tokens": {"<red>": "red"}},
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    from huggingface_hub import constants

    with HubStandIn(tmp_path / "hub") as server:
        server.add_user(TOKEN, "me")
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def make_workspace(folder: Path) -> dict[str, Any]:
    """A base model and images of its own, as settings."""
    folder.mkdir()
    shutil.copytree(tiny_folder("sd1"), folder / "base")
    return {"resume_ckpt": str(folder / "base"), "data_root": str(square_images(folder / "images", 4))}


def learned(checkpoint: Path) -> dict[str, torch.Tensor]:
    (file,) = checkpoint.glob("*.safetensors")
    return safetensors.torch.load_file(file)


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_run_continues_in_another_workspace_as_if_it_had_never_stopped(
    kind: str, hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = make_workspace(tmp_path / "here"), make_workspace(tmp_path / "there")
    settings = {"project_name": "jets", "resolution": 64, "batch_size": 2, "max_steps": 4, "max_epochs": 4, "lr": 1e-3}
    settings |= {"sample_steps": None, "num_workers": 0, "seed": 3, "save_every_n_steps": 2, "no_save_ckpt": True}
    pushing = {"push_to": "me/jets", "push_every": 1, "logdir": str(tmp_path / "here" / "logs")}
    first = edk.train(edk.TrainConfig(**settings, **KINDS[kind], **pushing, **here))
    titles = hub.titles("me/jets")
    assert [title.split(" (")[0] for title in titles] == ["initial commit", "Step 2", "Step 4"]
    half_way = hub.repos["me/jets"].refs["main"][1].oid
    before = learned(first.last_checkpoint)
    shutil.rmtree(tmp_path / "here")  # another machine has none of its paths
    source = f"hf://me/jets@{half_way}"
    monkeypatch.chdir(tmp_path / "there")

    with pytest.raises(ConfigError) as caught:
        edk.resume(source, logdir="logs")
    asked = [line.split()[0] for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert asked == ["data_root", "resume_ckpt", "push_to"]
    assert not list(Path("logs").glob("jets-*"))

    second = edk.resume(source, logdir="logs", changes={**there, "push_to": None})
    assert second.status()["state"] == "finished"
    assert [event["step"] for event in second.events() if event["kind"] == "loss"] == [1, 2, 3, 4]
    assert read_origin(second.folder).given == ["data_root", "push_to", "resume_ckpt"]
    after = learned(second.last_checkpoint)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert hub.titles("me/jets") == titles
