"""Checkpoints of other tools: what is read comes back bit for bit, what is not is named."""

import shutil

import pytest
import torch
from odd_checkpoints import CLOSE, LAYOUTS, SAME, exported, write_checkpoint
from safetensors.torch import load_file, save_file
from tiny_models import tiny_folder

from everydream_kit.errors import ModelError
from everydream_kit.export.single_file_export import export_checkpoint
from everydream_kit.models.components import build_component, fill
from everydream_kit.models.loading import open_model

READ = [name for name, (_, outcome) in LAYOUTS.items() if outcome in (SAME, CLOSE)]
REFUSED = [name for name in LAYOUTS if name not in READ]


def modules_of(source):
    """A model's modules without its tokenizers, which take most of the time of loading."""
    files = open_model(source)
    modules = {one.folder: build_component(one, files.configs[one.folder]) for one in files.family.components}
    filled = {
        name: fill(module, files.tensors[name], lambda _: torch.float32, name) for name, module in modules.items()
    }
    return files.family.name, filled


@pytest.fixture(scope="module")
def originals():
    return dict(modules_of(tiny_folder(family)) for family in ("sd1", "sd2", "sdxl"))


def test_the_corpus_is_as_large_as_promised():
    assert len(LAYOUTS) >= 25


@pytest.mark.parametrize("name", READ)
def test_a_checkpoint_of_another_tool_is_read(name, tmp_path, originals):
    family, modules = modules_of(write_checkpoint(name, tmp_path))
    tolerance = {SAME: 0.0, CLOSE: 0.04}[LAYOUTS[name][1]]
    for part, module in originals[family].items():
        state = modules[part].state_dict()
        assert state.keys() == module.state_dict().keys()
        for key, value in module.state_dict().items():
            assert torch.allclose(state[key], value, rtol=tolerance, atol=tolerance * value.abs().max().item()), key


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_whole_checkpoint_is_named(name, tmp_path):
    with pytest.raises(ModelError, match=LAYOUTS[name][1]):
        modules_of(write_checkpoint(name, tmp_path))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_text_encoder_with_fewer_blocks_is_used_as_deep_as_it_is(family, tmp_path, caplog):
    odd = exported(family)
    slots = open_model(tiny_folder(family)).family.text_encoders
    depths = {slot.folder: open_model(tiny_folder(family)).configs[slot.folder]["num_hidden_layers"] for slot in slots}
    cut = [
        f"{slot.single_file_prefix}{names}.{number}."
        for slot in slots
        for names in ("text_model.encoder.layers", "transformer.resblocks")
        for number in range(depths[slot.folder] - 1, depths[slot.folder] + 1)
    ]
    path = tmp_path / "shallow.safetensors"
    save_file({n: v for n, v in odd.tensors.items() if not n.startswith(tuple(cut))}, path, odd.metadata)
    _, modules = modules_of(path)
    for slot in slots:
        assert modules[slot.folder].config.num_hidden_layers == depths[slot.folder] - 1
        assert f"its {slot.folder} has {depths[slot.folder] - 1} blocks where" in caplog.text


def test_a_hole_among_the_blocks_is_still_damage(tmp_path):
    odd = exported("sd1")
    hole = "cond_stage_model.transformer.text_model.encoder.layers.0."
    path = tmp_path / "hole.safetensors"
    save_file({n: v for n, v in odd.tensors.items() if not n.startswith(hole)}, path, odd.metadata)
    with pytest.raises(ModelError, match="missing"):
        modules_of(path)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_what_a_clip_model_holds_besides_is_passed_over_in_a_folder(family, tmp_path, originals):
    """diffusers folders by other tools hold the projection, or the whole CLIP model, next to the text encoder."""
    folder = shutil.copytree(tiny_folder(family), tmp_path / "model")
    weights = folder / "text_encoder" / "model.safetensors"
    stray = {name: torch.randn(4, 4) for name in ("text_projection.weight", "visual_projection.weight")}
    stray |= {"logit_scale": torch.tensor(4.6), "vision_model.post_layernorm.weight": torch.ones(4)}
    save_file({**load_file(weights), **stray}, weights)
    _, modules = modules_of(folder)
    for part, module in originals[family].items():
        assert all(torch.equal(modules[part].state_dict()[key], value) for key, value in module.state_dict().items())
    single = export_checkpoint(folder, tmp_path / "single.safetensors", "fp32")
    assert load_file(single).keys() == exported(family).tensors.keys()
