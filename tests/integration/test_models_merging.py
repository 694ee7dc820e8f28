"""Mixing checkpoints, merging and extracting LoRAs."""

import numpy as np
import pytest
import torch
from tiny_models import draw, tiny_folder

from everydream_kit.errors import ExportError
from everydream_kit.export.lora_files import export_lora, extract_lora, low_rank
from everydream_kit.export.merge import merge_checkpoints, merge_lora
from everydream_kit.models.loading import load_model, open_model
from everydream_kit.models.lora.files import delta, read_lora
from everydream_kit.models.lora.injection import add_lora, lora_of
from everydream_kit.models.model_saving import save_model
from everydream_kit.models.random_models import build_tiny_model, write_model
from everydream_kit.models.tensors import open_safetensors


def lora_checkpoint(family, folder):
    model = load_model(tiny_folder(family))
    for index, parameter in enumerate(add_lora(model, 4, text_encoder=True)):
        with torch.no_grad():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    save_model(model, folder)
    return draw(model)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_lora_goes_out_as_a_file_and_merges_back_to_its_image(family, tmp_path):
    image = lora_checkpoint(family, tmp_path / "checkpoint")
    lora = export_lora(tmp_path / "checkpoint", tmp_path / "lora.safetensors")
    for out in ("merged.safetensors", "merged"):
        merged = merge_lora(tiny_folder(family), lora, tmp_path / out, precision="fp32")
        assert np.abs(draw(load_model(merged)) - image).max() <= 1
    half = merge_lora(tiny_folder(family), lora, tmp_path / "none.safetensors", strength=0.0, precision="fp32")
    assert np.array_equal(draw(load_model(half)), draw(load_model(tiny_folder(family))))


def test_a_mix_is_the_weighted_mean(tmp_path):
    other = write_model(build_tiny_model("sd1", seed=1), tmp_path / "other")
    mixed = open_model(
        merge_checkpoints(tiny_folder("sd1"), other, tmp_path / "mix.safetensors", weight=0.25, precision="fp32")
    )
    name = "conv_in.weight"
    parts = [open_model(folder).tensors["unet"][name].read() for folder in (tiny_folder("sd1"), other)]
    assert torch.allclose(mixed.tensors["unet"][name].read(), 0.75 * parts[0] + 0.25 * parts[1])
    with pytest.raises(ExportError, match="cannot be mixed"):
        merge_checkpoints(tiny_folder("sd1"), tiny_folder("sdxl"), tmp_path / "no.safetensors")


def test_an_extracted_lora_restores_what_a_lora_of_its_rank_had_changed(tmp_path):
    image = lora_checkpoint("sd1", tmp_path / "checkpoint")
    tuned = merge_lora(
        tiny_folder("sd1"),
        tmp_path / "checkpoint" / "pytorch_lora_weights.safetensors",
        tmp_path / "tuned",
        precision="fp32",
    )
    lora = extract_lora(tuned, tiny_folder("sd1"), tmp_path / "extracted.safetensors", rank=4)
    again = merge_lora(tiny_folder("sd1"), lora, tmp_path / "again", precision="fp32")
    assert np.abs(draw(load_model(again)) - image).max() <= 2
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha" in open_safetensors(lora)[0]
    with pytest.raises(ExportError, match="nothing to extract"):
        extract_lora(tiny_folder("sd1"), tiny_folder("sd1"), tmp_path / "none.safetensors")


def test_layers_of_different_ranks_keep_their_strength_in_both_layouts(tmp_path):
    base, other = tiny_folder("sd1"), write_model(build_tiny_model("sd1", seed=1), tmp_path / "other")
    kohya, diffusers = (
        read_lora(
            extract_lora(other, base, tmp_path / f"{layout}.safetensors", rank=48, layout=layout, precision="fp32"),
            open_model(base),
        )
        for layout in ("kohya", "diffusers")
    )
    assert len({layer.rank for layer in diffusers["unet"].values()}) > 1
    for component, layers in kohya.items():
        assert layers.keys() == diffusers[component].keys()
        for name, layer in layers.items():
            assert torch.equal(delta(layer), delta(diffusers[component][name])), name


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 3)])
def test_a_low_rank_layer_is_the_nearest_of_its_rank(shape):
    change = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(change.flatten(1))
    for rank in (2, 5):
        missed = (change.flatten(1) - delta(low_rank(change, rank))).norm()
        assert torch.isclose(missed, values[rank:].norm(), atol=1e-4)


def test_a_lora_for_diffusers_needs_no_alpha(tmp_path):
    """diffusers before 0.34 does not read the header, and takes the rank for alpha."""
    model = load_model(tiny_folder("sd1"))
    for parameter in add_lora(model, 4, alpha=1.0):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    save_model(model, tmp_path / "checkpoint")
    out = export_lora(tmp_path / "checkpoint", tmp_path / "a.safetensors", layout="diffusers", precision="fp32")
    tensors, _ = open_safetensors(out)
    for name, layer in lora_of(model)["unet"].items():
        up, down = (tensors[f"unet.{name}.lora_{part}.weight"].read() for part in "BA")
        assert torch.allclose(up @ down, delta(layer))


def test_a_full_checkpoint_is_no_lora(tmp_path):
    with pytest.raises(ExportError, match="not a LoRA checkpoint"):
        export_lora(tiny_folder("sd1"), tmp_path / "a.safetensors")
