"""Older libraries read what we write: transformers 4 and a diffusers of its time load our folders and give our numbers.

transformers 5 writes text encoders under other names, which transformers 4 passes over, training noise without more than
a warning; and diffusers 0.34 to 0.36 want all of peft's settings in a LoRA's header. So this runs the old libraries
themselves. They are installed into a folder that is put before the environment's own packages: torch and everything else
are shared, and it takes seconds. `EDK_OLD_LIBRARIES=FOLDER` uses one that already exists (made by the same pip line).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import old_reader
import pytest
import torch
from installing import install
from tiny_models import tiny_folder

from everydream_kit.export.lora_files import export_lora
from everydream_kit.models.family import Model
from everydream_kit.models.loading import load_model
from everydream_kit.models.lora.injection import add_lora
from everydream_kit.models.model_saving import save_model

pytestmark = pytest.mark.old_libraries

OLD = ("transformers==4.54.1", "diffusers==0.35.2", "huggingface_hub==0.36.0", "tokenizers==0.21.4")


@pytest.fixture(scope="module")
def old_libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("EDK_OLD_LIBRARIES")
    folder = Path(given) if given else tmp_path_factory.mktemp("old") / "site"
    if not (folder / "transformers").is_dir():
        problem = install(OLD, ["--target", folder], "--no-deps")
        if problem:
            pytest.fail(
                f"The old libraries could not be installed: {problem.strip().splitlines()[-1:]}. Reach a package index, name "
                "a folder that has them in EDK_OLD_LIBRARIES, or leave these tests out: -m 'not old_libraries'"
            )
    return folder


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA checkpoint, whose alpha is its rank, and an exported file of one whose alpha is not."""
    root = tmp_path_factory.mktemp("loras")
    for name, alpha in (("checkpoint", 4.0), ("scaled", 1.0)):
        model = load_model(tiny_folder("sd1"))
        for index, parameter in enumerate(add_lora(model, 4, alpha=alpha, text_encoder=True)):
            with torch.no_grad():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
        save_model(model, root / name)
    exported = export_lora(root / "scaled", root / "exported.safetensors", layout="diffusers", precision="fp32")
    return {"checkpoint": root / "checkpoint", "scaled": root / "scaled", "exported": exported}


@pytest.fixture(scope="module")
def theirs(
    old_libraries: Path, loras: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, torch.Tensor]]:
    """What the old libraries make of each model, by one process."""
    out = tmp_path_factory.mktemp("read") / "outputs.pt"
    jobs = [f"{family}={tiny_folder(family)}" for family in ("sd1", "sd2", "sdxl")]
    jobs += [f"{name}={tiny_folder('sd1')},{loras[name]}" for name in ("checkpoint", "exported")]
    environ = {**os.environ, "PYTHONPATH": str(old_libraries)}
    words = [sys.executable, old_reader.__file__, str(out), *jobs]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = torch.load(out)
    assert found["transformers"].startswith("4.")
    assert found["diffusers"] == "0.35.2" or "EDK_OLD_LIBRARIES" in os.environ
    return dict(found["outputs"])


def ours(model: Model) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return old_reader.give(model.unet, model.text_encoders, model.tokenizers, model.vae)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.startswith("ids"):
            assert torch.equal(found[name], value), name
        else:
            scale = value.abs().max().item()
            assert (found[name] - value).abs().max().item() <= 1e-5 * scale, name


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_folder_of_ours_gives_the_same_numbers(family: str, theirs: dict[str, dict[str, torch.Tensor]]) -> None:
    assert_same(theirs[family], ours(load_model(tiny_folder(family))))


def test_a_lora_checkpoint_loads_over_its_base(
    theirs: dict[str, dict[str, torch.Tensor]], loras: dict[str, Path]
) -> None:
    assert_same(theirs["checkpoint"], ours(load_model(loras["checkpoint"])))
    assert not torch.allclose(theirs["checkpoint"]["unet"], theirs["sd1"]["unet"], atol=0.01)


def test_an_exported_lora_keeps_its_strength(
    theirs: dict[str, dict[str, torch.Tensor]], loras: dict[str, Path]
) -> None:
    assert_same(theirs["exported"], ours(load_model(loras["scaled"])))
