"""Tiny models of each family on disk, made once for each test process."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

FAMILY_NAMES = ("sd1", "sd2", "sdxl")


@cache
def _root():
    root = Path(tempfile.mkdtemp(prefix="edk-tiny-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@cache
def tiny_folder(family):
    """A diffusers folder of a family with random weights. Do not change it: tests share it."""
    from everydream_kit.models.random_models import build_tiny_model, write_model

    return write_model(build_tiny_model(family, seed=0), _root() / family)


def draw(model, prompt="a red square", **settings):
    """One 64-pixel image as an int array; few steps."""
    import numpy as np

    from everydream_kit.models.sampling import SamplePrompt, sample_images

    wanted = SamplePrompt(prompt, seed=4, width=64, height=64, cfgs=(3.0,))
    image = sample_images(model, [wanted], **{"num_inference_steps": 3, **settings})[0]
    return np.asarray(image).astype(int)
