"""What a run notes about itself for others: numbers about the captions, and the versions that it was trained with."""

from __future__ import annotations

import statistics
from functools import lru_cache
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from everydream_kit.data.dataset import Dataset

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "peft",
    "safetensors",
    "numpy",
    "pillow",
)


@lru_cache(maxsize=1)
def library_versions() -> dict[str, str]:
    """The versions of the packages on which the numbers of a training may depend."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def summarise_captions(dataset: Dataset) -> dict[str, int]:
    """Counts over the images' captions as written (of several alternatives the first), by words for people."""
    captions = [dataset.caption(index) for index in range(len(dataset))]
    texts = [caption.text for caption in captions]
    return {
        "different_captions": len(set(texts)),
        "images_without_caption": sum(not text for text in texts),
        "images_with_tags": sum(bool(caption.tags) for caption in captions),
        "median_words_in_a_caption": round(statistics.median(len(text.split()) for text in texts)) if texts else 0,
    }
