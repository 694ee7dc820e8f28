"""Parts of different models in one folder, or given together: named before a weight is read, in plans as in training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_folder

from everydream_kit.actions.converting import merge
from everydream_kit.demo import base_model_path
from everydream_kit.errors import ModelError
from everydream_kit.models.loading import load_model, open_model
from everydream_kit.models.lora.files import read_lora_file
from everydream_kit.models.lora.injection import add_lora
from everydream_kit.models.model_saving import save_model
from everydream_kit.preflight.skeleton import build_skeleton, read_architecture
from everydream_kit.training.caching import build_text_cache


def plan(folder: Path, **given: Any) -> None:
    build_skeleton(read_architecture(folder, **given), torch.float32)


WAYS = pytest.mark.parametrize("use", [load_model, plan], ids=["load", "plan"])
MIXES = {
    "a larger tokenizer": ("z_image", "tokenizer", "sd1", "tokenizer has 49,408 tokens, and text_encoder knows 261"),
    "a smaller tokenizer": (
        "sd1",
        "tokenizer",
        "embedded",
        "tokenizer has 3,715 tokens, and text_encoder knows 49,408",
    ),
    "another language model": (
        *("z_image", "text_encoder", "qwen_image"),
        "text_encoder/config.json: names the class 'Qwen2_5_VLModel', and this family's text_encoder is Qwen3Model",
    ),
    "a language model for CLIP": (
        *("sd1", "text_encoder", "z_image"),
        "text_encoder/config.json: names the class 'Qwen3Model', and this family's text_encoder is CLIPTextModel",
    ),
    "a schedule of diffusion": (
        *("z_image", "scheduler", "sd1"),
        "names the class 'PNDMScheduler', and Z-Image learns flow matching",
    ),
    "a schedule of flow matching": (
        *("sd1", "scheduler", "z_image"),
        "names the class 'FlowMatchEulerDiscreteScheduler', and Stable Diffusion 1.x learns diffusion",
    ),
}


@WAYS
def test_a_part_that_is_missing_is_named(use: Callable[..., Any], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder("anima"), tmp_path / "base")
    shutil.rmtree(folder / "text_conditioner")
    with pytest.raises(ModelError, match=r"text_conditioner/config\.json is missing, and Anima needs it"):
        use(folder)


@WAYS
@pytest.mark.parametrize("mix", MIXES)
def test_a_part_of_another_family_is_named(mix: str, use: Callable[..., Any], tmp_path: Path) -> None:
    family, part, other, words = MIXES[mix]
    folder = Path(shutil.copytree(tiny_folder(family), tmp_path / "mixed"))
    shutil.rmtree(folder / part)
    shutil.copytree((base_model_path() if other == "embedded" else tiny_folder(other)) / part, folder / part)
    with pytest.raises(ModelError) as refused:
        use(folder)
    assert words in str(refused.value)
    assert str(refused.value).startswith(str(folder))


@WAYS
def test_a_family_or_vae_that_is_given_wrongly_is_to_be_left_out(use: Callable[..., Any]) -> None:
    folder = tiny_folder("anima")
    with pytest.raises(ModelError, match=r"anima: family: this is Anima, and no Z-Image\. Leave family out"):
        use(folder, family="z_image")
    with pytest.raises(ModelError, match=r"vae: it is used with its own VAE \(Anima\)\. Leave it out"):
        use(folder, vae=folder)


@pytest.mark.parametrize(("family", "title"), [("anima", "Anima"), ("sd1", r"Stable Diffusion 1\.x")])
def test_a_file_of_another_family_than_the_named_is_named(family: str, title: str, tmp_path: Path) -> None:
    names = ["layers.0.adaLN_modulation.0.weight", "x_pad_token"]
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "z.safetensors")
    with pytest.raises(ModelError, match=f"family: this is Z-Image, and no {title}"):
        open_model(tmp_path / "z.safetensors", family=family)


def test_a_lora_of_another_family_is_named_as_that(tmp_path: Path) -> None:
    klein = load_model(tiny_folder("flux2_klein"))
    add_lora(klein, 2)
    save_model(klein, tmp_path / "lora")
    with pytest.raises(ModelError, match=r"made for another model family: its header says flux-2-klein"):
        read_lora_file(tmp_path / "lora", open_model(tiny_folder("flux1")))
    with pytest.raises(ModelError, match=r"it is Stable Diffusion 1\.x, and the LoRA was trained on FLUX\.2-klein"):
        load_model(tmp_path / "lora", adapter_base=tiny_folder("sd1"))


def test_a_lora_that_is_not_there_is_not_taken_for_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone\.safetensors: there is no such file"):
        merge(tiny_folder("sd1"), tmp_path / "gone.safetensors", tmp_path / "out.safetensors", strength=0.5)


def test_kept_captions_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder("z_image"), tmp_path / "other"))
    file = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    words = content["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(content), encoding="utf-8")
    model, knows = load_model(tiny_folder("z_image")), []
    for one in (model, model, load_model(folder)):
        cache = build_text_cache(one, 0, trains_text=False, folder=tmp_path / "texts")
        assert cache is not None
        knows.append(cache.knows(["a red square"]))
        cache.encode(["a red square"])
    assert knows == [False, True, False]
