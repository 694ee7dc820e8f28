"""LoHa and LoKr next to LoRA: training, every way out and back in, and the names that apps read."""

import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import draw, tiny_folder

from everydream_kit.config import TrainConfig
from everydream_kit.errors import ConfigError, ExportError
from everydream_kit.export.lora_files import export_lora
from everydream_kit.export.single_file_export import export_checkpoint
from everydream_kit.models.loading import assemble, load_model, open_model
from everydream_kit.models.lora.files import apply_lora, read_lora, read_lora_file
from everydream_kit.models.lora.injection import add_lora, lora_of
from everydream_kit.models.lora.weight_changes import change_of
from everydream_kit.models.model_saving import save_model
from everydream_kit.models.sampling import SamplePrompt, sample_images
from everydream_kit.preflight.memory_estimate import estimate_memory

CASES = [
    ("sd1", "loha"),
    ("sd1", "lokr"),
    ("sdxl", "lokr"),
    ("z_image", "lokr"),
    ("flux2_klein", "loha"),
    ("flux1", "loha"),
    ("anima", "lokr"),
    ("krea2", "loha"),
    ("qwen_image", "lokr"),
]
STEMS = {
    "sd1": "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "sdxl": "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q",
    "z_image": "lycoris_layers_0_attention_to_q",
    "flux2_klein": "lycoris_transformer_blocks_0_attn_to_q",
    "flux1": "lycoris_transformer_blocks_0_attn_to_q",
    "anima": "lora_unet_blocks_0_self_attn_q_proj",
    "krea2": "lycoris_transformer_blocks_0_attn_to_q",
    "qwen_image": "lycoris_transformer_blocks_0_attn_to_q",
}
"""The names that ComfyUI's key maps and kohya have of one layer."""
PARTS = {
    "loha": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"},
    "lokr": {"lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"},
}


@pytest.fixture(params=CASES, ids=" ".join)
def case(request):
    return request.param


def image_of(model):
    if model.family.objective != "flow":
        return draw(model)
    prompt = SamplePrompt("a cat", seed=4, width=64, height=64, cfgs=(1.0,))
    return np.asarray(sample_images(model, [prompt], num_inference_steps=3)[0]).astype(int)


@cache
def learned(family, form):
    """A model with an adapter that changes its images. Do not change it: tests share it."""
    model = load_model(tiny_folder(family))
    fresh = image_of(model)
    parameters = add_lora(model, 2, alpha=6, form=form, text_encoder=family == "sdxl")
    assert np.abs(image_of(model) - fresh).max() <= 1, "a fresh adapter changes nothing"
    for index, parameter in enumerate(parameters):
        with torch.no_grad():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    image = image_of(model)
    assert np.abs(image - fresh).max() > 5
    return model, image


def tensors_of(lora):
    return {
        (component, name, part): tensor.read()
        for component, layers in lora.items()
        for name, layer in layers.items()
        for part, tensor in layer.parts.items()
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_adapter_survives_its_checkpoint_export_and_merging(case, tmp_path):
    model, image = learned(*case)
    family, form = case
    save_model(model, tmp_path / "checkpoint")
    again = load_model(tmp_path / "checkpoint")
    expected = tensors_of(lora_of(model))
    assert same(tensors_of(lora_of(again)), expected)
    assert np.abs(image_of(again) - image).max() <= 1

    file = export_lora(tmp_path / "checkpoint", tmp_path / "for_apps.safetensors", precision="fp32")
    base = open_model(tiny_folder(family))
    assert same(tensors_of(read_lora(file, base)), expected)
    assert np.abs(image_of(assemble(apply_lora(base, read_lora_file(file, base)))) - image).max() <= 1
    names = load_file(file)
    own = {name.rpartition(".")[2] for name in names if name.startswith(f"{STEMS[family]}.")}
    assert own in (PARTS[form], {"lokr_w1", "lokr_w2", "alpha"})  # a factor may be whole in so small a layer
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert json.loads(metadata["ss_network_args"]) == {"algo": form}

    folder = Path(shutil.copytree(tiny_folder(family), tmp_path / "base"))
    merged = export_checkpoint(tmp_path / "checkpoint", folder / "merged.safetensors", precision="fp32")
    assert np.abs(image_of(load_model(merged)) - image).max() <= 1
    with pytest.raises(ExportError, match=r"diffusers reads no Lo.*--format lora"):
        export_lora(tmp_path / "checkpoint", tmp_path / "no.safetensors", layout="diffusers")


@pytest.mark.parametrize("form", ["loha", "lokr"])
def test_a_resumed_run_of_another_form_equals_one_that_never_stopped(form, tmp_path):
    from flow_cases import settings_for, weights_of
    from stop_after import StopAfter

    from everydream_kit.sessions import resume, train

    settings = {**settings_for("z_image", tmp_path), "training_kind": "lora", "lora_rank": 2, "lora_form": form}
    config = TrainConfig(**{**settings, "gradient_checkpointing": True})
    whole = train(config)
    losses = [event["loss"] for event in whole.events("loss")]
    parted = train(config.replace(logdir=str(tmp_path / "parted")), listeners=[StopAfter(2)])
    resume(parted.folder)
    assert same(weights_of(whole), weights_of(parted))
    assert losses == [event["loss"] for event in parted.events("loss")]
    plain = train(config.replace(lora_form="lora", project_name="plain"))
    assert [event["loss"] for event in plain.events("loss")] != losses
    found = estimate_memory(config, cache_folder=tmp_path / "kept")
    assert found.num_trained_parameters == sum(value.numel() for value in weights_of(whole).values() if value.dim())


@pytest.mark.parametrize(("form", "rank", "whole"), [("loha", 2, False), ("lokr", 2, False), ("lokr", 16, True)])
def test_a_layer_does_in_files_what_it_does_in_training(form, rank, whole):
    """A LoKr of two whole factors is not scaled: LyCORIS and apps do not, and peft would."""
    model = load_model(tiny_folder("sd1"))
    for index, parameter in enumerate(add_lora(model, rank, alpha=6, form=form)):
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    layers = lora_of(model)["unet"]
    assert layers
    assert all((layer.rank is None) == whole for layer in layers.values())
    for name, layer in layers.items():
        live = model.unet.get_submodule(name).get_delta_weight("default")
        assert torch.allclose(change_of(layer).delta().reshape(live.shape), live, atol=1e-4), name


def test_settings_of_lora_alone_are_refused_with_another_form():
    lora = {"resume_ckpt": "x", "training_kind": "lora"}
    with pytest.raises(ConfigError, match="lora_form, lora_dora: lora_dora is for the form lora only"):
        TrainConfig(**{**lora, "lora_form": "lokr", "lora_dora": True})
    with pytest.raises(
        ConfigError, match=r"lora_form: must be lora, loha or lokr \(got 'dora'\); for DoRA set lora_dora"
    ):
        TrainConfig(**{**lora, "lora_form": "dora"})
    with pytest.raises(ConfigError, match="lora_form, lora_dropout"):
        TrainConfig(**{**lora, "lora_form": "loha", "lora_dropout": 0.1})
