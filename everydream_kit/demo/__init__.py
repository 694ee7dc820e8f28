"""The embedded base model, a small Stable Diffusion 1.x that draws emoji, and the demo's pictures to fine-tune it with.

    base_model_path()   a diffusers folder: `TrainConfig(resume_ckpt=str(base_model_path()), resolution=128, ...)`
    pictures_path()     a dataset folder: 32 ink drawings with captions, a look the base has never seen

Importing this costs nothing; the recipe that made both is `recipes/` in the repository.
"""

from __future__ import annotations

import os
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def base_model_path() -> Path:
    """The embedded base model as a diffusers folder.

    While the packaged weights are not there yet, a seeded random model of the same shape is made once in the user's
    cache folder, so that everything around the model can be built and run.
    """
    packaged = _HERE / "base"
    if (packaged / "unet" / "diffusion_pytorch_model.safetensors").is_file():
        return packaged
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "everydream_kit" / "random-base-v1"
    if not (cache / "model_index.json").is_file():  # written last
        from everydream_kit.demo.folder import write_random_model

        beside = cache.with_name(f"{cache.name}.{os.getpid()}")
        write_random_model(beside, packaged / "tokenizer")
        try:
            beside.rename(cache)
        except OSError:  # another process was first
            import shutil

            shutil.rmtree(beside)
    return cache


def pictures_path() -> Path:
    """The demo's dataset folder: 32 ink drawings in several aspect ratios, each with its caption in a .txt file."""
    return _HERE / "pictures"
