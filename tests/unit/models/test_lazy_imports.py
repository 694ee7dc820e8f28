"""What loading a model for training does not import, and that whoever asks for it still gets it."""

import subprocess
import sys

import pytest

LOAD = """
import sys
from everydream_kit.demo import base_model_path
from everydream_kit.models.loading import load_model
load_model(base_model_path())
"""


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def loaded_modules():
    """Names of every module that a fresh Python has imported once the embedded model is loaded."""
    return set(run_python(LOAD + "print('\\n'.join(sys.modules))").split())


@pytest.mark.parametrize(
    "module",
    [
        "scipy.stats._stats_py",
        "bitsandbytes.functional",
        "diffusers.models.transformers.transformer_flux",
        "diffusers.models.unets.unet_motion_model",
    ],
)
def test_loading_a_model_leaves_out_what_training_does_not_use(loaded_modules, module):
    assert "diffusers.models.unets.unet_2d_condition" in loaded_modules
    assert module not in loaded_modules


def test_what_was_left_out_comes_when_it_is_asked_for():
    printed = run_python(
        LOAD
        + "from diffusers import EulerDiscreteScheduler\n"
        + "from diffusers.models.unets import UNetMotionModel\n"
        + "scheduler = EulerDiscreteScheduler(use_beta_sigmas=True)\n"
        + "scheduler.set_timesteps(5)\n"
        + "print(UNetMotionModel.__name__, len(scheduler.sigmas), 'scipy.stats._stats_py' in sys.modules)\n"
    )

    assert printed.split() == ["UNetMotionModel", "6", "True"]
