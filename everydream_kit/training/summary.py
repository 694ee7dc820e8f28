"""What the run's log and the model card say about the captions: numbers only, no caption."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from everydream_kit.data.dataset import Dataset


def summarise_captions(dataset: Dataset) -> dict[str, int]:
    """Counts over the pictures' captions as written (of several alternatives the first), by words for people."""
    captions = [dataset.caption(index) for index in range(len(dataset))]
    texts = [caption.text for caption in captions]
    return {
        "different_captions": len(set(texts)),
        "pictures_without_caption": sum(not text for text in texts),
        "pictures_with_tags": sum(bool(caption.tags) for caption in captions),
        "median_words_in_a_caption": round(statistics.median(len(text.split()) for text in texts)) if texts else 0,
    }
