"""The registry of model families. A new family: one new file next to `sd1.py`, and one line here."""

from __future__ import annotations

from collections.abc import Mapping

from everydream_kit.errors import ModelError
from everydream_kit.models.families.anima import ANIMA
from everydream_kit.models.families.flux1 import FLUX1
from everydream_kit.models.families.flux2_klein import FLUX2_KLEIN
from everydream_kit.models.families.krea2 import KREA2
from everydream_kit.models.families.qwen_image import QWEN_IMAGE
from everydream_kit.models.families.sd1 import SD1
from everydream_kit.models.families.sd2 import SD2
from everydream_kit.models.families.sdxl import SDXL
from everydream_kit.models.families.z_image import Z_IMAGE
from everydream_kit.models.family import Conditioning, Family, Sizes, TextEncoderSlot

__all__ = ["FAMILIES", "Conditioning", "Family", "Sizes", "TextEncoderSlot", "family_by_name", "family_in_header"]

FAMILIES: dict[str, Family] = {
    family.name: family for family in (SD1, SD2, SDXL, Z_IMAGE, FLUX2_KLEIN, FLUX1, ANIMA, KREA2, QWEN_IMAGE)
}


def family_by_name(name: str) -> Family:
    """The family of this name.

    Raises:
        ModelError: there is none; the message names those that are.
    """
    if name not in FAMILIES:
        raise ModelError(f"{name!r} is not a model family; known are {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def family_in_header(metadata: Mapping[str, str]) -> Family | None:
    """The family that a LoRA file was made for, as its header says; None where it says none that is known."""
    named = metadata.get("modelspec.architecture", "").removesuffix("/lora")
    return next((family for family in FAMILIES.values() if family.modelspec_architecture == named), None)
