"""Parts that are not trained are held in half precision, and nothing that is learned or saved is any the worse for
it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rehearsals import plain_settings, prepared, rehearse, square_images
from tiny_models import tiny_folder

from everydream_kit.config import TrainConfig
from everydream_kit.config.precision_settings import PrecisionGroup
from everydream_kit.models.loading import load_model
from everydream_kit.models.model_saving import save_model
from everydream_kit.preflight.skeleton import build_skeleton, read_architecture
from everydream_kit.training.base_model import choose_formats
from everydream_kit.training.precision import choose_precision

MATRICES = (torch.nn.Linear, torch.nn.Conv2d)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return square_images(tmp_path_factory.mktemp("frozen") / "pictures", 2)


def settings_of(folder: Path, images: Path, family: str, **changes: Any) -> dict[str, Any]:
    plain = plain_settings(folder, tiny_folder(family), images)
    return {**plain, "batch_size": 2, "max_steps": 3, "max_epochs": 3, "lr": 1e-3, **changes}


def dtypes_of(module: torch.nn.Module) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in module.named_parameters()}


@pytest.mark.parametrize(
    ("family", "frozen", "amp", "changes"),
    [
        ("sd1", "bfloat16", "bf16", {"lora_text_encoder": True}),
        ("sdxl", "bfloat16", "bf16", {}),
        ("sd1", "float16", "fp16", {"gradient_checkpointing": True}),
    ],
)
def test_a_base_in_half_precision_gives_the_same_losses_as_in_float32(
    family: str, frozen: str, amp: str, changes: dict[str, Any], tmp_path: Path, images: Path
) -> None:
    lora = settings_of(tmp_path, images, family, training_kind="lora", lora_rank=4, amp_dtype=amp, **changes)
    whole = rehearse(**lora, frozen_dtype="float32")
    half = rehearse(**{**lora, "amp_dtype": "auto"}, frozen_dtype=frozen)
    assert half.losses == whole.losses
    assert len(set(half.losses)) == 3
    for trained, other in zip(half.run.learner.parameters(), whole.run.learner.parameters(), strict=True):
        assert trained.dtype == torch.float32
        assert torch.equal(trained, other)
    module = half.run.learner.model.unet
    held = {type(part): p.dtype for part in module.modules() for p in part.parameters(recurse=False)}
    assert held[torch.nn.Conv2d] == getattr(torch, frozen)
    assert held[torch.nn.GroupNorm] == held[torch.nn.LayerNorm] == torch.float32
    assert {p.dtype for p in half.run.learner.model.vae.parameters()} == {torch.float32}


def test_new_words_and_a_trained_text_encoder_learn_over_a_base_in_half_precision(tmp_path: Path, images: Path) -> None:
    common = settings_of(tmp_path, images, "sd1", amp_dtype="bf16")
    for changes in (
        {"training_kind": "textual_inversion", "new_tokens": {"<red>": "red"}},
        {"disable_unet_training": True},
    ):
        whole, half = (rehearse(**common, **changes, frozen_dtype=dtype) for dtype in ("float32", "bfloat16"))
        assert half.losses == whole.losses
        assert half.run.learner.model.unet.conv_in.weight.dtype == torch.bfloat16
        assert {p.dtype for p in half.run.learner.parameters()} == {torch.float32}


def test_doras_magnitudes_are_measured_in_float32(tmp_path: Path, images: Path) -> None:
    dora = settings_of(tmp_path, images, "sd1", training_kind="lora", lora_dora=True, amp_dtype="bf16", max_steps=1)
    whole, half = (rehearse(**dora, frozen_dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert half.losses == pytest.approx(whole.losses, rel=1e-2)
    assert {p.dtype for p in half.run.learner.parameters()} == {torch.float32}


def test_an_adapter_goes_on_over_a_base_in_half_precision(tmp_path: Path, images: Path) -> None:
    lora = settings_of(tmp_path, images, "sd1", training_kind="lora", lora_rank=4, frozen_dtype="bfloat16")
    first = rehearse(**lora)
    save_model(first.run.learner.model, tmp_path / "adapter")
    with prepared(**{**lora, "resume_ckpt": str(tmp_path / "adapter")}) as resumed:
        assert resumed.run.learner.model.unet.conv_in.weight.dtype == torch.bfloat16
        for loaded, trained in zip(resumed.run.learner.parameters(), first.run.learner.parameters(), strict=True):
            assert loaded.dtype == torch.float32
            assert torch.equal(loaded, trained)


@pytest.mark.parametrize(("stored", "held"), [(torch.float32, torch.float32), (torch.float16, torch.float16)])
def test_a_full_runs_checkpoint_holds_frozen_parts_as_precisely_as_the_base(
    stored: torch.dtype, held: torch.dtype, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    save_model(load_model(tiny_folder("sd1")), base, dtype=stored)
    config = TrainConfig(resume_ckpt=str(base), data_root=str(tmp_path), disable_textenc_training=True)
    formats = choose_formats(config, choose_precision("cuda", PrecisionGroup(amp_dtype="bf16")))
    model = load_model(base, dtype=formats)
    save_model(model, tmp_path / "saved")
    assert model.unet.conv_in.weight.dtype == torch.float32
    assert dict(model.text_encoders[0].named_parameters())["final_layer_norm.weight"].dtype == torch.float32
    assert {p.dtype for m in model.text_encoders[0].modules() if isinstance(m, MATRICES) for p in m.parameters()} == {
        held
    }
    before, after = (load_model(folder).text_encoders[0].state_dict() for folder in (base, tmp_path / "saved"))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", ["z_image", "flux1"])
def test_a_language_model_is_frozen_in_a_full_run_and_stays_in_its_files_format(family: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_model(load_model(tiny_folder(family)), base, dtype=torch.bfloat16)
    config = TrainConfig(resume_ckpt=str(base), data_root=str(tmp_path))
    formats = choose_formats(config, choose_precision("cuda", PrecisionGroup(amp_dtype="bf16")))
    model = load_model(base, dtype=formats)
    assert {p.dtype for p in model.denoiser.parameters()} == {torch.float32}
    for text_encoder in model.text_encoders:
        matrices = [module for module in text_encoder.modules() if isinstance(module, MATRICES)]
        assert {p.dtype for module in matrices for p in module.parameters()} == {torch.bfloat16}


@pytest.fixture(scope="module")
def half_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that is stored in float16."""
    folder = tmp_path_factory.mktemp("half") / "base"
    save_model(load_model(tiny_folder("sdxl")), folder, dtype=torch.float16)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"training_kind": "lora"},
        {"training_kind": "lora", "frozen_dtype": "float16", "weight_dtype": "bfloat16"},
        {"disable_textenc_training": True},
        {"disable_unet_training": True, "frozen_dtype": "float32"},
        {"weight_dtype": "bfloat16"},
    ],
)
def test_the_plan_counts_each_weight_in_the_format_that_it_is_loaded_in(
    changes: dict[str, Any], half_base: Path, tmp_path: Path
) -> None:
    config = TrainConfig(resume_ckpt=str(half_base), data_root=str(tmp_path), **changes)
    precision = choose_precision(
        "cuda", PrecisionGroup(amp_dtype="bf16", weight_dtype=config.weight_dtype, frozen_dtype=config.frozen_dtype)
    )
    formats = choose_formats(config, precision)
    skeleton = build_skeleton(read_architecture(half_base), formats)
    loaded = load_model(half_base, dtype=formats)
    for name, module in skeleton.modules().items():
        assert dtypes_of(module) == dtypes_of(loaded.modules()[name])


WIDE = {"block_out_channels": [128, 256, 512], "layers_per_block": 1, "norm_num_groups": 8}
HOST = """
import json, os, re, sys
from pathlib import Path
import torch
from everydream_kit.export.single_file_export import export_checkpoint
from everydream_kit.models.number_formats import Formats
from everydream_kit.models.loading import load_model
from everydream_kit.models.lora.injection import add_lora
from everydream_kit.models.model_saving import save_model

def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

def go_through(source, folder):
    model = load_model(source, dtype=Formats(torch.float32, torch.float16))
    if folder is None:
        return model
    add_lora(model, 4)
    save_model(model, folder / "adapter")
    export_checkpoint(folder / "adapter", folder / "merged.safetensors", "fp16")
    return model

def measure(small, large, folder):
    go_through(small, folder and folder / "small")  # a fork sees pages of libraries when it touches them
    before = kilobytes("VmRSS")
    model = go_through(large, folder and folder / "large")
    final = sum(p.nbytes for module in model.modules().values() for p in module.parameters())
    return {"final": final, "growth": (kilobytes("VmHWM") - before) * 1024}

small, saves, *cases = sys.argv[1:]
go_through(small, Path(saves) / "first")
for number, large in enumerate((*cases, cases[0])):
    folder = Path(saves) / "saved" if number == len(cases) else None
    sys.stdout.flush()
    child = os.fork()  # its highest resident memory begins anew
    if child == 0:
        print(json.dumps(measure(small, large, folder)), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{large} failed")
"""


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from everydream_kit.models import random_models

    tiny = {key: value for key, value in random_models._TINY["sdxl"].items() if key != "denoiser"}
    wide = {**random_models._TINY_SDXL_UNET, **WIDE}
    folder = tmp_path_factory.mktemp("wide") / "base"
    save_model(random_models.build_model("sdxl", vae=random_models._TINY_VAE, denoiser=wide, **tiny), folder)
    return folder


@pytest.fixture(scope="module")
def host_memory(wide_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Growth of the highest resident memory, in units of the model in its final format: one process starts, and forks."""
    from everydream_kit.export.single_file_export import export_checkpoint

    folder = tmp_path_factory.mktemp("large")
    layouts = {"folder": wide_folder}
    for layout in ("safetensors", "ckpt"):
        layouts[layout] = export_checkpoint(wide_folder, folder / f"large.{layout}", precision="fp32")
    words = [sys.executable, "-c", HOST, str(tiny_folder("sdxl")), str(folder), *map(str, layouts.values())]
    # A forked child has none of its parent's threads, and would wait for them.
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    lines = subprocess.run(words, env=alone, capture_output=True, text=True, check=True).stdout.splitlines()
    found = [json.loads(line) for line in lines]
    assert min(one["final"] for one in found) > 100e6
    return dict(zip((*layouts, "saving"), (one["growth"] / one["final"] for one in found), strict=True))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the highest resident memory is read from /proc")
@pytest.mark.parametrize("layout", ["folder", "safetensors", "ckpt"])
def test_loading_takes_little_more_host_memory_than_the_model_in_its_final_format(
    layout: str, host_memory: dict[str, float]
) -> None:
    assert host_memory[layout] < 1.2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the highest resident memory is read from /proc")
def test_saving_a_lora_alone_and_merged_holds_no_copy_of_its_base(host_memory: dict[str, float]) -> None:
    """Neither in the process's own memory nor as pages of a mapped file, which count as well."""
    assert host_memory["saving"] < 1.2
