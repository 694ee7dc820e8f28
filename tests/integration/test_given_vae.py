"""`vae`: a VAE of any layout in place of a model's own, in training, sampling, export and estimates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from odd_checkpoints import exported
from safetensors.torch import load_file, save_file
from stop_after import StopAfter
from tiny_models import tiny_folder

from everydream_kit.cli import main
from everydream_kit.config import TrainConfig
from everydream_kit.errors import ModelError
from everydream_kit.export.single_file_export import export_checkpoint
from everydream_kit.models.loading import load_model, open_model
from everydream_kit.models.lora.injection import add_lora
from everydream_kit.models.model_saving import save_model
from everydream_kit.models.random_models import build_tiny_model, write_model
from everydream_kit.preflight.memory_estimate import architecture_of
from everydream_kit.sessions import resume, train

VAE = "first_stage_model."
KEY = "decoder.conv_in.weight"


def vae_of(source: Path) -> torch.Tensor:
    return open_model(source).tensors["vae"][KEY].read()


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose VAE is another one."""
    return write_model(build_tiny_model("sd1", seed=1), tmp_path_factory.mktemp("other") / "other")


@pytest.fixture(scope="module")
def without_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    odd = exported("sd1")
    kept = {name: value for name, value in odd.tensors.items() if not name.startswith(VAE)}
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    save_file(kept, path, odd.metadata)
    return path


def ldm_names(other: Path, folder: Path, prefix: str) -> Path:
    whole = load_file(export_checkpoint(other, folder / "whole.safetensors", "fp32"))
    own = {prefix + name.removeprefix(VAE): value for name, value in whole.items() if name.startswith(VAE)}
    save_file(own, folder / "vae.safetensors")
    return folder / "vae.safetensors"


FORMS = {
    "a file of LDM": lambda other, folder: ldm_names(other, folder, ""),
    "a file of LDM with its prefix": lambda other, folder: ldm_names(other, folder, VAE),
    "a file of diffusers": lambda other, folder: other / "vae" / "diffusion_pytorch_model.safetensors",
    "a folder of diffusers": lambda other, folder: shutil.copytree(other / "vae", folder / "sd-vae"),
    "a model's folder": lambda other, folder: other,
    "a full checkpoint": lambda other, folder: export_checkpoint(other, folder / "whole.ckpt", "fp32"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", ["a file without one", "a file", "a folder"])
def test_a_given_vae_is_used_whatever_its_form(
    form: str, base: str, other: Path, without_vae: Path, tmp_path: Path
) -> None:
    source = {"a file without one": without_vae, "a folder": tiny_folder("sd1")}.get(base) or export_checkpoint(
        tiny_folder("sd1"), tmp_path / "base.safetensors", "fp32"
    )
    files = open_model(source, vae=FORMS[form](other, tmp_path))
    assert torch.equal(files.tensors["vae"][KEY].read(), vae_of(other))
    assert files.tensors["vae"].keys() == open_model(other).tensors["vae"].keys()
    own = open_model(tiny_folder("sd1")).tensors["unet"]["conv_in.weight"].read()
    assert torch.equal(files.tensors["unet"]["conv_in.weight"].read(), own)


def test_a_file_without_a_vae_says_how_to_give_one(without_vae: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no VAE\. Give its VAE.*--vae PATH.*model\.vae\.safetensors"):
        open_model(without_vae)
    with pytest.raises(ModelError, match=r"vae: .*absent.* is not a file or folder here"):
        open_model(without_vae, vae=tmp_path / "absent")
    save_file({"encoder.banana": torch.zeros(1)}, tmp_path / "banana.safetensors")
    with pytest.raises(ModelError, match=r"vae: .*banana\.safetensors holds no VAE"):
        open_model(without_vae, vae=tmp_path / "banana.safetensors")


@pytest.mark.parametrize("form", ["vae", "vae/diffusion_pytorch_model.safetensors"])
def test_a_vae_with_other_latents_is_refused(form: str) -> None:
    with pytest.raises(ModelError, match=r"vae: .*z_image.* has 16 latent channels, Stable Diffusion 1\.x needs 4\."):
        open_model(tiny_folder("sd1"), vae=tiny_folder("z_image") / form)


def test_a_vae_of_another_class_is_refused() -> None:
    with pytest.raises(ModelError, match=r"is an AutoencoderKLFlux2, Stable Diffusion 1\.x needs an AutoencoderKL"):
        open_model(tiny_folder("sd1"), vae=tiny_folder("flux2_klein"))


def test_a_vae_that_scales_latents_otherwise_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_model(tiny_folder("sd1"), vae=tiny_folder("sdxl"))
    assert "scales latents by 0.13025, and" in caplog.text
    caplog.clear()
    old = shutil.copytree(tiny_folder("sd2") / "vae", tmp_path / "vae")
    config = json.loads((old / "config.json").read_text())
    del config["scaling_factor"]  # as in configs before diffusers 0.8
    (old / "config.json").write_text(json.dumps(config))
    for vae in (tiny_folder("sd2"), old):
        open_model(tiny_folder("sd1"), vae=vae)
    assert not caplog.text


def test_export_and_sample_take_it(
    without_vae: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(without_vae), str(tmp_path / "whole.safetensors"), "--precision", "fp32"]) == 1
    assert "--vae PATH" in capsys.readouterr().err
    given = ["--vae", str(other / "vae")]
    out = tmp_path / "whole.safetensors"
    assert main(["export", str(without_vae), str(out), "--precision", "fp32", *given]) == 0
    assert torch.equal(vae_of(out), vae_of(other))
    assert main(["export", str(without_vae), str(tmp_path / "folder"), "--format", "diffusers", *given]) == 0
    assert torch.equal(vae_of(tmp_path / "folder"), vae_of(other).half())
    few = ["--num_inference_steps", "1", "--width", "64", "--height", "64", "--out", str(tmp_path / "samples")]
    assert main(["sample", str(without_vae), "--prompt", "a square", *few, *given]) == 0


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_trains_with_it_and_resumes_without_being_reported(
    kind: str, without_vae: Path, other: Path, image_folder: Path, tmp_path: Path
) -> None:
    vae = shutil.copytree(other / "vae", tmp_path / "sd-vae")
    config = TrainConfig(
        resume_ckpt=str(without_vae),
        vae=str(vae),
        data_root=str(image_folder),
        training_kind=kind,
        resolution=64,
        max_steps=2,
        lr=1e-4,
        logdir=str(tmp_path / "logs"),
        sample_steps=None,
        no_save_ckpt=True,
        num_workers=0,
    )
    assert torch.equal(architecture_of(config).files.tensors["vae"][KEY].read(), vae_of(other))
    run = train(config, listeners=[StopAfter(0)])
    if kind == "full":
        shutil.rmtree(vae)  # the checkpoint has it
    assert resume(run.folder).status()["state"] == "finished"
    assert torch.equal(vae_of(run.last_checkpoint), vae_of(other))


def test_a_lora_on_a_model_with_a_given_vae_finds_both_again(
    without_vae: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(other.parent)
    model = load_model(without_vae, vae=f"{other.name}/vae")
    add_lora(model, 2)
    save_model(model, tmp_path / "lora")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(vae_of(tmp_path / "lora"), vae_of(other))


def test_a_file_takes_the_models_scale_and_says_so(
    without_vae: Path, other: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "everydream_kit")
    open_model(without_vae, vae=other / "vae" / "diffusion_pytorch_model.safetensors")
    assert "does not say its scale" in caplog.text and "scaling_factor 0.18215." in caplog.text
