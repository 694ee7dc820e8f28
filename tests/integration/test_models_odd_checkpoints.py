"""Checkpoints of other tools: what is read comes back bit for bit, what is not is named."""

import pytest
import torch
from odd_checkpoints import CLOSE, LAYOUTS, SAME, write_checkpoint
from tiny_models import tiny_folder

from everydream_kit.errors import ModelError
from everydream_kit.models.components import build_text_encoder, build_unet, build_vae, fill
from everydream_kit.models.loading import open_model

READ = [name for name, (_, outcome) in LAYOUTS.items() if outcome in (SAME, CLOSE)]
REFUSED = [name for name in LAYOUTS if name not in READ]


def modules_of(source):
    """A model's modules without its tokenizers, which take most of the time of loading."""
    files = open_model(source)
    modules = {"unet": build_unet(files.configs["unet"]), "vae": build_vae(files.configs["vae"])}
    for slot in files.family.text_encoders:
        modules[slot.folder] = build_text_encoder(files.configs[slot.folder], slot.class_name)
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
