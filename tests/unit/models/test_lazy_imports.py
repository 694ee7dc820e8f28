"""What loading a model for training does not import, and that whoever asks for it still gets it."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
from everydream_kit.demo import base_model_path
from everydream_kit.models.loading import load_model
model = load_model(base_model_path())
print(json.dumps(sorted(sys.modules)))

import bitsandbytes, diffusers
from bitsandbytes.optim import AdamW8bit
from diffusers import AutoencoderTiny, EulerDiscreteScheduler, FluxTransformer2DModel, StableDiffusionPipeline
from diffusers.hooks import apply_layerwise_casting
from diffusers.models.unets import UNetMotionModel
from peft import LoraConfig
scheduler = EulerDiscreteScheduler(use_beta_sigmas=True)
scheduler.set_timesteps(5)
asked_for = (AdamW8bit, AutoencoderTiny, FluxTransformer2DModel, StableDiffusionPipeline, UNetMotionModel, LoraConfig)
print(json.dumps([*(each.__name__ for each in asked_for), apply_layerwise_casting.__name__, len(scheduler.sigmas)]))
print(json.dumps([isinstance(model.unet, diffusers.UNet2DConditionModel), bool(bitsandbytes.__version__)]))
print(json.dumps("scipy.stats._stats_py" in sys.modules))

import numpy, scipy.integrate, transformers.models
from scipy.optimize import minimize_scalar
from transformers import BertModel
from transformers.loss.loss_for_object_detection import linear_sum_assignment
from transformers.models import auto, bert
rows, columns = linear_sum_assignment(numpy.array([[4.0, 1.0], [2.0, 9.0]]))
print(json.dumps([columns.tolist(), scipy.integrate.quad(lambda x: x, 0, 2)[0], round(minimize_scalar(lambda x: x * x).x, 6)]))
print(json.dumps([BertModel is bert.BertModel, transformers.models.bert is bert, callable(auto.AutoModel)]))
"""


@pytest.fixture(scope="module")
def printed():
    """What a fresh Python has to say: one process for all tests, since it costs seconds."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "module",
    [
        "scipy.stats._stats_py",
        "scipy.integrate._quadpack_py",
        "scipy.optimize._optimize",
        "transformers.models.bert",
        "bitsandbytes.functional",
        "diffusers.models.transformers.transformer_flux",
        "diffusers.models.unets.unet_3d_condition",
        "diffusers.models.unets.unet_motion_model",
        "torch._inductor.lowering",
    ],
)
def test_loading_a_model_leaves_out_what_training_does_not_use(printed, module):
    assert "diffusers.models.unets.unet_2d_condition" in printed[0]
    assert module not in printed[0]


def test_what_was_left_out_comes_when_it_is_asked_for(printed):
    _, names, checks, has_scipy, numbers, same = printed
    assert names == [
        *("AdamW8bit", "AutoencoderTiny", "FluxTransformer2DModel", "StableDiffusionPipeline", "UNetMotionModel"),
        *("LoraConfig", "apply_layerwise_casting", 6),
    ]
    assert checks == [True, True]
    assert has_scipy
    assert numbers == [[1, 0], 2.0, 0.0]
    assert same == [True, True, True]
