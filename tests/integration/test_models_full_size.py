"""Models of their true size: `pytest -m full_size`. Minutes, and up to 21 GB of disk for SDXL: run it with
`-o tmp_path_retention_policy=none`. The weights are drawn tensor by tensor, so that only the independent reader takes memory.

The independent reader is stable-diffusion.cpp, in the PyPI wheel `cyllama` 0.2.18; it refuses files with wrong names.
"""

import dataclasses
import importlib.util
import math
import subprocess
import sys
import zlib

import pytest
import torch

from everydream_kit.export.single_file_export import export_checkpoint
from everydream_kit.models.loading import open_model
from everydream_kit.models.model_saving import files_of, write_folder
from everydream_kit.models.random_models import build_model
from everydream_kit.models.tensors import LazyTensor

pytestmark = [pytest.mark.full_size, pytest.mark.timeout(1800)]

DRAW = """
import sys
from cyllama.sd import text_to_image
settings = {"width": 256, "height": 256, "seed": 1, "sample_steps": 1, "cfg_scale": 1.0, "n_threads": 2}
image = text_to_image(model_path=sys.argv[1], prompt="a cat", **settings)
image.save(sys.argv[2])
"""


@pytest.fixture(autouse=True)
def _only_when_asked_for(request):
    if "full_size" not in request.config.getoption("markexpr"):
        pytest.skip("builds models of their true size; run with -m full_size")


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def full_size(request, tmp_path):
    """A full-size model with random half-precision weights, as a diffusers folder."""
    files = files_of(build_model(request.param, device="meta"))
    drawn = dataclasses.replace(
        files,
        tensors={
            component: {name: drawn_when_read(f"{component}.{name}", tensor) for name, tensor in tensors.items()}
            for component, tensors in files.tensors.items()
        },
        tokenizers={slot.tokenizer_folder: None for slot in files.family.text_encoders},
    )
    write_folder(drawn, tmp_path / "model")
    return tmp_path / "model"


def drawn_when_read(name, tensor):
    """Random weights of a layer's usual size, other ones for each name; at most a million draws, repeated."""

    def read():
        if len(tensor.shape) < 2:
            return torch.full(tensor.shape, 1.0 if "norm" in name and name.endswith("weight") else 0.0).half()
        num_values = math.prod(tensor.shape)
        seeded = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = torch.randn(min(num_values, 2**20), generator=seeded) * (tensor.shape[0] / num_values) ** 0.5
        return values.half().repeat(-(-num_values // len(values)))[:num_values].reshape(tensor.shape)

    return LazyTensor(tensor.shape, torch.float16, read)


def test_full_size_there_and_back_is_bit_equal(full_size, tmp_path):
    single = export_checkpoint(full_size, tmp_path / "model.safetensors")
    write_folder(open_model(single), tmp_path / "back")
    one, other = open_model(full_size), open_model(tmp_path / "back")
    for component, weights in one.tensors.items():
        assert weights.keys() == other.tensors[component].keys()
        for name, lazy in weights.items():
            assert torch.equal(lazy.read(), other.tensors[component][name].read()), name


def test_stable_diffusion_cpp_loads_a_full_size_file_and_draws(full_size, tmp_path):
    if importlib.util.find_spec("cyllama") is None:
        pytest.skip("cyllama 0.2.18 (stable-diffusion.cpp) is not installed; pip install cyllama==0.2.18")
    from PIL import Image

    single = export_checkpoint(full_size, tmp_path / "model.safetensors")
    out = tmp_path / "drawn.png"
    done = subprocess.run(
        [sys.executable, "-c", DRAW, str(single), str(out)], capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with Image.open(out) as image:
        assert image.size == (256, 256)
