"""A host's optional packages, each broken as on some image: training, LoRA and the panels' checks work all the same."""

import json
import os
import re
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


COMMANDS = """
import json, sys
from everydream_kit.cli import main
from everydream_kit.optional_packages import hide_unused
hide_unused()
for words in json.loads(sys.argv[1]):
    print("==", words[0], main(words), flush=True)
"""


@pytest.fixture(scope="module")
def runs(broken, tmp_path_factory, tiny_model_folder, image_folder):
    """Training, full and LoRA, as `everydream` runs it, in one process that imports the host's packages once."""
    folder = tmp_path_factory.mktemp("runs")
    flags = {"resume_ckpt": tiny_model_folder, "data_root": image_folder, "max_steps": 1}
    flags |= {
        "resolution": 64,
        "batch_size": 1,
        "max_epochs": 1,
        "save_ckpt_dir": folder,
        "sample_steps": 1,
        "sample_num_inference_steps": 1,
    }
    common = ["train", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]
    wanted = {name: [*common, "--training_kind", name] for name in ("lora", "full")}
    ran = python("-c", COMMANDS, json.dumps(list(wanted.values())), packages=broken, cwd=folder)
    assert ran.returncode == 0, ran.stderr[-2000:]
    ends = re.split(r"^== \w+ (\d+)\n", ran.stdout, flags=re.MULTILINE)
    return {name: (ends[2 * at], int(ends[2 * at + 1]), ran.stderr) for at, name in enumerate(wanted)}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_needs_none_of_them(kind, runs):
    printed, status, errors = runs[kind]
    assert status == 0
    assert "finished:" in printed
    assert "kernels" not in errors  # bitsandbytes' line about it is nobody's concern here


IN_A_KERNEL = """
import sys
from everydream_kit.models.loading import load_model
from everydream_kit.models.lora.injection import add_lora
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


NEXT_TO_A_DRIVER = """
from everydream_kit.doctor import Machine, diagnose
print(*diagnose(".", Machine(nvidia_driver=lambda: True)).checks, sep="\\n")
"""


def test_doctor_says_what_is_lost_without_bitsandbytes(broken, tmp_path):
    ran = python("-c", NEXT_TO_A_DRIVER, packages=broken, cwd=tmp_path)
    assert "CUDA Setup failed" in ran.stdout, ran.stderr[-2000:]
    assert "8-bit optimizers are missing" in ran.stdout
