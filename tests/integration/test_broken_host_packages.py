"""A host's optional packages, each broken as on some image: training, LoRA and the panels' checks work all the same."""

import os
import subprocess
import sys

import pytest
from broken_packages import BROKEN, write_broken_packages


def python(*words, packages, cwd):
    environment = {**os.environ, "PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    return write_broken_packages(tmp_path_factory.mktemp("broken"), list(BROKEN))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_needs_none_of_them(kind, broken, tmp_path, tiny_model_folder, image_folder):
    flags = {"resume_ckpt": tiny_model_folder, "data_root": image_folder, "training_kind": kind, "max_steps": 1}
    flags |= {"resolution": 64, "batch_size": 1, "max_epochs": 1, "save_ckpt_dir": tmp_path}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    ran = python("-m", "everydream_kit", "train", *words, packages=broken, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "finished:" in ran.stdout
    assert "kernels" not in ran.stderr  # bitsandbytes' line about it is nobody's concern here


IN_A_KERNEL = """
import sys
from everydream_kit.models.loading import load_model
from everydream_kit.models.lora import add_lora
model = load_model(sys.argv[1])
print(len(add_lora(model, 2)), sorted(name for name in ("tensorflow", "jax") if sys.modules.get(name, 0) is None))
"""


def test_in_a_kernel_broken_packages_are_named_and_the_others_stay(broken, tmp_path, tiny_model_folder):
    ran = python("-c", IN_A_KERNEL, tiny_model_folder, packages=broken, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-2000:]
    parameters, hidden = ran.stdout.split(maxsplit=1)
    assert int(parameters) > 0
    assert hidden.strip() == "[]"
    assert "torchvision is installed but cannot be imported (RuntimeError: operator torchvision::nms" in ran.stderr


def test_doctor_says_what_is_lost_without_bitsandbytes(broken, tmp_path):
    ran = python("-m", "everydream_kit", "doctor", packages=broken, cwd=tmp_path)
    assert "CUDA Setup failed" in ran.stdout
    assert "8-bit optimizers are missing" in ran.stdout
