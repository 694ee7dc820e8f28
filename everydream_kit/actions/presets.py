"""Starting points for the training form: a name, a sentence, and the settings that differ from the defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from everydream_kit.demo.main import TRAINING


@dataclass(frozen=True)
class Preset:
    """A named set of settings.

    Attributes:
        title: as the list shows it.
        why: when to take it, in one sentence.
        settings: what it sets; everything else keeps its value in the form.
    """

    title: str
    why: str
    settings: dict[str, Any] = field(default_factory=dict)


PRESETS: dict[str, Preset] = {
    "demo": Preset(
        "Demo (embedded base)",
        "Learn the panels in two minutes, on any machine: the small model that ships with the kit at 128 pixels.",
        {"resume_ckpt": "embedded", **TRAINING, "sample_steps": 40, "sample_before_training": True, "log_step": 1},
    ),
    "style": Preset(
        "Style",
        "A look: 30 to 300 images in one style. Mirrored images and a little more dropout push the style harder.",
        {
            "resolution": 512,
            "batch_size": 4,
            "lr": 2e-6,
            "lr_scheduler": "cosine",
            "max_epochs": 60,
            "flip_p": 0.5,
            "cond_dropout": 0.1,
        },
    ),
    "person": Preset(
        "Person or character",
        "One subject: 15 to 60 images. Never mirrored, since faces are not symmetric.",
        {
            "resolution": 512,
            "batch_size": 4,
            "lr": 1.5e-6,
            "lr_scheduler": "constant",
            "max_epochs": 80,
            "flip_p": 0.0,
            "cond_dropout": 0.04,
        },
    ),
    "big": Preset(
        "Big dataset",
        "Thousands of images: fewer epochs, larger batches, saves by time.",
        {
            "resolution": 512,
            "batch_size": 8,
            "grad_accum": 2,
            "lr": 3e-6,
            "lr_scheduler": "cosine",
            "max_epochs": 10,
            "ckpt_every_n_minutes": 30.0,
            "keep_last_n": 3,
        },
    ),
    "low_memory": Preset(
        "Low memory",
        "A GPU of 12 GB or less: recomputed activations, batches of one averaged, a frozen text encoder.",
        {
            "batch_size": 1,
            "grad_accum": 4,
            "gradient_checkpointing": True,
            "disable_textenc_training": True,
            "offload_idle_models": True,
        },
    ),
}
