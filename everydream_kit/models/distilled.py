"""Models that were distilled to few steps without guidance: recognized by their index or their name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from everydream_kit.strict_json import read_json

TRAINED = re.compile(r"-ep\d+-gs\d+(_ema)?(\.\w+)?/?$")
"""Names of checkpoints of a run (`runs.layout`): what was trained is not distilled, whatever the project is called."""
STABLE_DIFFUSION = r"(turbo|lightning|hyper[-_]?sd|(?<![a-z])(lcm|dmd2?)(?![a-z]))[^/]*/?$"


def why_distilled(source: str, pattern: str, what: str, base: str, apps: str = "the distilled one") -> str | None:
    """Why a model should not be trained on, where its index or its name says that it is distilled; else None.

    Args:
        pattern: of names of distilled models; capitals do not matter.
        what, base, apps: the distilled model, what to train on instead, and what to use the LoRA with, for the message.
    """
    is_named = re.search(pattern, source, re.IGNORECASE) and not TRAINED.search(source)
    if not is_named and not _says_distilled(source):
        return None
    return (
        f"looks like {what}, distilled to few steps without guidance, which are lost when it is trained on. Train on "
        f"{base}, and sample with the LoRA on {apps}."
    )


def distilled_from(base: str) -> Callable[[str], str | None]:
    """A `Family.distilled` of Stable Diffusion, whose distilled models have names of their methods."""
    return lambda source: why_distilled(source, STABLE_DIFFUSION, "a Turbo, Lightning, Hyper or LCM model", base)


def _says_distilled(source: str) -> bool:
    """Whether the index of a model's folder says that it is distilled."""
    index = Path(source).expanduser() / "model_index.json"
    return index.is_file() and read_json(index).get("is_distilled") is True
