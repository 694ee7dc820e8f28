"""Single files and LoRA files of flow transformers: bit for bit there and back, and as diffusers reads and converts them."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
from flow_cases import CASES, FLOW, copy_of_base, ours, pipeline_of, theirs
from safetensors.torch import load_file, save_file
from tiny_models import tiny_folder

from everydream_kit.errors import ModelError
from everydream_kit.export.lora_files import LoraLayout, export_lora
from everydream_kit.export.single_file_export import export_checkpoint
from everydream_kit.models.families import FAMILIES
from everydream_kit.models.families.flux2_klein import NINE
from everydream_kit.models.loading import assemble, load_model, open_model
from everydream_kit.models.lora.files import apply_lora, read_lora_file
from everydream_kit.models.lora.injection import add_lora, lora_parameters
from everydream_kit.models.model_saving import live_tensors, save_model
from everydream_kit.models.random_models import build_model
from everydream_kit.runs.layout import CHECKPOINT_FILE


@pytest.fixture(params=FLOW)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def with_lora(family: str, folder: Path, *, dora: bool = False) -> Any:
    model = load_model(tiny_folder(family))
    add_lora(model, 4, alpha=8.0, dora=dora)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            changed = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(changed if parameter.dim() == 2 else parameter + changed)  # DoRA's lengths are vectors
    save_model(model, folder)
    return model


def test_a_lora_applied_merged_and_loaded_by_diffusers_gives_one_image(family: str, tmp_path: Path) -> None:
    image = ours(with_lora(family, tmp_path / "lora"))
    assert np.abs(image - ours(load_model(tiny_folder(family)))).max() > 5
    merged = export_checkpoint(
        tmp_path / "lora", copy_of_base(family, tmp_path) / "merged.safetensors", precision="fp32"
    )
    assert np.abs(image - ours(load_model(merged))).max() <= 1
    base = open_model(tiny_folder(family))
    layouts = ("kohya", *CASES[family].loras)
    for layout in dict.fromkeys(layouts):
        file = export_lora(tmp_path / "lora", tmp_path / f"{layout}.safetensors", layout=layout, precision="fp32")
        if layout in CASES[family].loras:
            pipeline = pipeline_of(tiny_folder(family))
            pipeline.load_lora_weights(file)
            assert np.abs(image - theirs(family, pipeline)).max() <= 1
        assert np.abs(image - ours(assemble(apply_lora(base, read_lora_file(file, base))))).max() <= 1
        assert not any("refiner" in name for name in load_file(file))
    for_apps = load_file(tmp_path / "kohya.safetensors")
    assert CASES[family].app_layer in for_apps
    if CASES[family].fused:
        assert for_apps[f"diffusion_model.{CASES[family].fused}.lora_A.weight"].shape[0] == 3 * 4  # three of rank 4


def test_a_dora_applied_merged_and_loaded_by_diffusers_gives_one_image(family: str, tmp_path: Path) -> None:
    image = ours(with_lora(family, tmp_path / "dora", dora=True))
    assert np.abs(image - ours(with_lora(family, tmp_path / "lora"))).max() > 5
    merged = export_checkpoint(
        tmp_path / "dora", copy_of_base(family, tmp_path) / "merged.safetensors", precision="fp32"
    )
    assert np.abs(image - ours(load_model(merged))).max() <= 1
    base = open_model(tiny_folder(family))
    layouts: tuple[LoraLayout, ...] = ("kohya", "diffusers")
    for layout in layouts:
        file = export_lora(tmp_path / "dora", tmp_path / f"{layout}.safetensors", layout=layout, precision="fp32")
        assert np.abs(image - ours(assemble(apply_lora(base, read_lora_file(file, base))))).max() <= 1
    pipeline = pipeline_of(tiny_folder(family))
    pipeline.load_lora_weights(file)
    assert np.abs(image - theirs(family, pipeline)).max() <= 1


def test_a_single_file_comes_back_bit_for_bit_and_only_next_to_its_model(family: str, tmp_path: Path) -> None:
    base = copy_of_base(family, tmp_path)
    file = export_checkpoint(base, base / "out.safetensors", precision="fp32")
    first, again = open_model(tiny_folder(family)), open_model(file)
    assert again.family is first.family
    folder = first.family.denoiser.folder
    assert first.tensors[folder].keys() == again.tensors[folder].keys()
    assert all(
        torch.equal(first.tensors[folder][k].read(), again.tensors[folder][k].read()) for k in first.tensors[folder]
    )
    alone = shutil.copy(file, tmp_path / "alone.safetensors")
    with pytest.raises(ModelError, match=r"alone\.safetensors: holds the transformer .* put the file there"):
        open_model(alone)


def converted(model: Any, checkpoint: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What diffusers' own reader of single files makes of one; and its script for Anima of the conditioner in it."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    prefix = CASES[model.family.name].conditioner or "no name"
    conditioner = {name: checkpoint.pop(name) for name in list(checkpoint) if name.startswith(prefix)}
    convert = SINGLE_FILE_LOADABLE_CLASSES[type(model.denoiser).__name__]["checkpoint_mapping_fn"]
    if "guidance_embeds" in model.denoiser.config and "inner_dim" in convert.__code__.co_varnames:  # FLUX.1's width
        width = model.denoiser.inner_dim  # is written in the function
        consts = tuple(width if value == 3072 else value for value in convert.__code__.co_consts)
        convert = FunctionType(convert.__code__.replace(co_consts=consts), convert.__globals__)
    found: dict[str, torch.Tensor] = convert(checkpoint=checkpoint, config=model.denoiser.config)
    return found | {f"text_conditioner.{name.removeprefix(prefix)}": value for name, value in conditioner.items()}


def in_the_file(model: Any) -> dict[str, torch.Tensor]:
    """The weights that are in a family's single file, by diffusers' names."""
    own = dict(model.denoiser.state_dict())
    if CASES[model.family.name].conditioner:
        states = model.modules()["text_conditioner"].state_dict()
        own |= {f"text_conditioner.{name}": value for name, value in states.items()}
    return own


def test_diffusers_reads_the_weights_from_a_single_file_bit_for_bit(family: str, tmp_path: Path) -> None:
    model = load_model(tiny_folder(family))
    file = export_checkpoint(tiny_folder(family), tmp_path / "out.safetensors", precision="fp32")
    theirs, own = converted(model, load_file(file)), in_the_file(model)
    assert theirs.keys() == own.keys()
    assert all(torch.equal(theirs[name], own[name]) for name in own)


SIZES = [(name, {}, CASES[name].published) for name in FLOW]
SIZES.append(("flux2_klein", NINE, (201, 9_078_581_248)))


@pytest.mark.parametrize(("family", "changes", "published"), SIZES, ids=[*FLOW, "flux2_klein 9B"])
def test_the_single_file_of_the_true_size_is_what_diffusers_converts(
    family: str, changes: dict[str, Any], published: tuple[int, int]
) -> None:
    model = build_model(family, device="meta", **changes)
    files = open_model(tiny_folder(family))
    for name in files.tensors:
        files.tensors[name] = live_tensors(name, model.modules()[name].state_dict())
    written = model.family.layout.to_single_file(files)
    meta = {name: torch.empty(value.shape, device="meta") for name, value in written.items()}
    back = {name: tuple(value.shape) for name, value in converted(model, meta).items()}
    assert back == {name: tuple(value.shape) for name, value in in_the_file(model).items()}
    assert (len(written), sum(math.prod(value.shape) for value in written.values())) == published


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_a_single_file_is_read_whatever_stands_before_its_names(family: str, prefix: str) -> None:
    files = open_model(tiny_folder(family))
    written = files.family.layout.to_single_file(files)
    cut_out = {prefix + name.removeprefix("net."): value for name, value in written.items()}
    found = files.family.layout.from_single_file(cut_out, files.family, files.configs)
    assert all(part.keys() == files.tensors[name].keys() for name, part in found.items())


def test_every_file_of_a_checkpoint_is_one_that_a_fetched_checkpoint_may_hold(family: str) -> None:
    files = [path for path in tiny_folder(family).rglob("*") if path.is_file()]
    assert not [str(path) for path in files if not is_known(path.relative_to(tiny_folder(family)))]


def is_known(path: Path) -> bool:
    return CHECKPOINT_FILE.fullmatch(path.as_posix()) is not None


FUSED = [name for name in FLOW if "img_in" in FAMILIES[name].layout.app_layers(["x_embedder"])]
"""Families that have Black Forest Labs' names of layers, several in one."""


@pytest.mark.parametrize("family", FUSED)
def test_a_lora_of_the_single_files_layers_changes_those(family: str, tmp_path: Path) -> None:
    """Layers in one, of unequal shares too, and those whose halves stand the other way round."""
    base = open_model(tiny_folder(family))
    before = base.family.layout.to_single_file(base)
    layers = [name for name, value in before.items() if len(value.shape) == 2]
    generator = torch.Generator().manual_seed(0)
    down = {name: torch.randn(2, before[name].shape[1], generator=generator) for name in layers}
    up = {name: torch.randn(before[name].shape[0], 2, generator=generator) for name in layers}
    for prefix, separator in (("diffusion_model.", "."), ("lora_unet_", "_")):
        stems = {name: prefix + name.removesuffix(".weight").replace(".", separator) for name in layers}
        parts = {f"{stems[name]}.lora_down.weight": down[name] for name in layers}
        save_file(parts | {f"{stems[name]}.lora_up.weight": up[name] for name in layers}, tmp_path / "lora.safetensors")
        changed = apply_lora(base, read_lora_file(tmp_path / "lora.safetensors", base))
        after = base.family.layout.to_single_file(changed)
        for name in layers:
            assert torch.allclose(after[name].read(), before[name].read() + up[name] @ down[name], atol=1e-5), name


@pytest.mark.parametrize("family", FUSED)
def test_the_last_modulation_in_a_lora_for_apps_is_the_single_files(family: str, tmp_path: Path) -> None:
    model = load_model(tiny_folder(family))
    add_lora(model, 2, targets=["norm_out.linear"])
    for parameter in lora_parameters(model):
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    save_model(model, tmp_path / "lora")
    base = open_model(tiny_folder(family))
    file = export_lora(tmp_path / "lora", tmp_path / "out.safetensors", layout="kohya", precision="fp32")
    own = apply_lora(base, read_lora_file(tmp_path / "lora", base)).tensors["transformer"]["norm_out.linear.weight"]
    again = apply_lora(base, read_lora_file(file, base)).tensors["transformer"]["norm_out.linear.weight"]
    assert torch.allclose(own.read(), again.read(), atol=1e-6)
    written = load_file(file)
    stem = "diffusion_model.final_layer.adaLN_modulation.1"
    if f"{stem}.lora_B.weight" in written:  # else diffusers' names, as diffusers has them
        change = written[f"{stem}.lora_B.weight"] @ written[f"{stem}.lora_A.weight"]
        ours = own.read() - base.tensors["transformer"]["norm_out.linear.weight"].read()
        assert torch.allclose(change, ours.roll(len(ours) // 2, 0), atol=1e-5)


def test_models_for_editing_are_refused_by_name(tmp_path: Path) -> None:
    """Their transformers have the same class; what they need besides the caption is an image."""
    folder = copy_of_base("qwen_image", tmp_path)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("QwenImagePipeline", "QwenImageEditPipeline"), encoding="utf-8")
    with pytest.raises(ModelError, match=r"editing images \(QwenImageEditPipeline\)"):
        open_model(folder)
