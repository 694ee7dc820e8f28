"""The deferred imports: what training does not use stays away, and nothing is missing for anybody."""

import subprocess
import sys

import pytest

LOAD = """
import sys
from everydream_kit.models.components import build_unet
from everydream_kit.models.scratch import build_tiny_model
model = build_tiny_model("sd1")
heavy = ["diffusers.models.transformers.transformer_flux", "diffusers.models.unets.unet_3d_condition", "torch._inductor.lowering"]
print([name for name in heavy if name in sys.modules])
"""
USE = """
import diffusers
from diffusers import FluxTransformer2DModel, StableDiffusionPipeline, UNet3DConditionModel, AutoencoderTiny
from diffusers.hooks import apply_layerwise_casting
import bitsandbytes
from bitsandbytes.optim import AdamW8bit
from peft import LoraConfig
print(bitsandbytes.__version__ is not None, isinstance(model.unet, diffusers.UNet2DConditionModel))
"""


@pytest.mark.parametrize(("script", "expected"), [(LOAD, ["[]"]), (LOAD + USE, ["[]", "True True"])])
def test_deferred_packages_stay_away_until_they_are_asked_for(script, expected):
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=280, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines() == expected
