"""Models of their true size: `pytest -m full_size`. Minutes, up to 20 GB of disk and 14 GB of memory for SDXL.

The independent reader is stable-diffusion.cpp, in the PyPI wheel `cyllama` 0.2.18; it refuses files with wrong names.
"""

import importlib.util
import subprocess
import sys

import pytest
import torch

from everydream_kit.export.single_file import export_checkpoint
from everydream_kit.models.loading import open_model
from everydream_kit.models.saving import save_model, write_folder
from everydream_kit.models.scratch import build_model

pytestmark = [pytest.mark.full_size, pytest.mark.timeout(1800)]

DRAW = """
import sys
from cyllama.sd import text_to_image
settings = {"width": 256, "height": 256, "seed": 1, "sample_steps": 1, "cfg_scale": 1.0, "n_threads": 2}
picture = text_to_image(model_path=sys.argv[1], prompt="a cat", **settings)
picture.save(sys.argv[2])
"""


@pytest.fixture(autouse=True)
def _only_when_asked_for(request):
    if "full_size" not in request.config.getoption("markexpr"):
        pytest.skip("builds models of their true size; run with -m full_size")


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def full_size(request, tmp_path):
    """A full-size model with random half-precision weights, as a diffusers folder."""
    model = build_model(request.param)
    save_model(model, tmp_path / "model", dtype=torch.float16)
    return tmp_path / "model"


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
    with Image.open(out) as picture:
        assert picture.size == (256, 256)
