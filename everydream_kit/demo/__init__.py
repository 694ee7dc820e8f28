"""The embedded base model, a small Stable Diffusion 1.x that draws emoji, and the demo's images to fine-tune it with.

    base_model_path()   a diffusers folder: `TrainConfig(resume_ckpt=str(base_model_path()), resolution=128, ...)`
    images_path()       a dataset folder: 32 ink drawings with captions, a look the base has never seen

Importing this costs nothing; the recipe that made both is `recipes/` in the repository.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def base_model_path() -> Path:
    """The embedded base model as a diffusers folder, in half precision: load it with `dtype=torch.float32` on a CPU."""
    return _HERE / "base"


def images_path() -> Path:
    """The demo's dataset folder: 32 ink drawings in several aspect ratios, each with its caption in a .txt file."""
    return _HERE / "images"
