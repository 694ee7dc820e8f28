"""The report of a dataset before it is trained on, for the command line and scripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from everydream_kit.config import EMBEDDED_MODEL, default_of
from everydream_kit.errors import ConfigError, DataError

DEFAULT_RESOLUTIONS: tuple[int, ...] = (default_of("resolution"),)


def report_dataset(
    data_root: str,
    *,
    resolution: Sequence[int] = DEFAULT_RESOLUTIONS,
    batch_size: int = default_of("batch_size"),
    as_json: bool = False,
    plot: str | Path | None = None,
    tokenizer: str | Path = EMBEDDED_MODEL,
) -> str:
    """Check a dataset and report.

    Args:
        data_root: folder, .json index, archive or Hub dataset id.
        resolution: area class in pixels, or several.
        batch_size: images of one training batch.
        as_json: the report as JSON.
        plot: image file for the bucket chart and the contact sheet.
        tokenizer: diffusers folder whose tokenizer counts the captions.

    Returns:
        The report's text, or its JSON.

    Raises:
        DataError: the dataset cannot be read, or holds no image; the report is in the message.
        ConfigError: a resolution has no buckets, or the plot cannot be written under its name.
    """
    from everydream_kit.data.preparation import prepare_dataset
    from everydream_kit.data.scanning import HOLDS_NO_IMAGE
    from everydream_kit.generation import caption_reading

    if plot is not None:
        _check_image_name(Path(plot))
    data = prepare_dataset(data_root, resolution=list(resolution), batch_size=batch_size, cache_dir=Path(".edk_cache"))
    count_tokens, max_tokens = caption_reading(tokenizer)
    report = data.report(count_tokens=count_tokens, max_tokens=max_tokens)
    if plot is not None:
        data.plot().save(plot)
    text = json.dumps(report.to_json(), indent=2) if as_json else report.text
    if not len(data):
        named = any(
            problem.skipped and not problem.cause.startswith(HOLDS_NO_IMAGE) for problem in data.dataset.problems
        )
        cure = "Fix what is listed above" if named else "Give the folder that holds yours"
        raise DataError(f"{text}\n{data_root}: holds no image that can be trained on. {cure}.")
    return text


def _check_image_name(path: Path) -> None:
    """Before the dataset is looked through. Raises ConfigError."""
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise ConfigError(f"plot: {path}: not the name of an image; let it end in .png or .jpg")
    if not path.parent.is_dir():
        raise ConfigError(f"plot: {path.parent}: no such folder")
