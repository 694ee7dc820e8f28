"""The prompts of a project's samples: read, and written back without losing what else their file has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from everydream_kit.atomic import write_atomic
from everydream_kit.config.sample_settings import SampleGroup
from everydream_kit.models.family import SamplerSpec
from everydream_kit.training.prompt_file import STABLE_DIFFUSION, SampleSettings, read_prompt_file


def read_prompts(path: Path, sampler: SamplerSpec = STABLE_DIFFUSION) -> SampleSettings:
    """What a prompt file asks for; the defaults where there is none.

    Args:
        sampler: of the model's family.

    Raises:
        ConfigError: it cannot be read at all.
    """
    defaults = SampleSettings.of(SampleGroup(), sampler)
    return read_prompt_file(path, defaults).settings if path.is_file() else defaults


def prompt_lines(settings: SampleSettings) -> list[str]:
    """The prompts that a person wrote; random captions have none."""
    return [entry.prompt for entry in settings.samples if entry.prompt]


def write_prompts(path: Path, prompts: Sequence[str]) -> None:
    """Keep these prompts. Of a `.json`, everything else stays, also what belongs to a prompt that already exists.

    Without prompts captions of the dataset are sampled, and a plain file goes away.

    Raises:
        ConfigError: a `.json` cannot be read. It is not overwritten.
    """
    if path.suffix.lower() != ".json":
        if prompts:
            write_atomic(path, "\n".join(prompts) + "\n")
        else:
            path.unlink(missing_ok=True)
        return
    held = read_prompts(path).model_dump(exclude_unset=True)
    entries = {entry.get("prompt", ""): entry for entry in held.get("samples", [])}
    kept = [entry for entry in held.get("samples", []) if not entry.get("prompt")]
    samples = [entries.get(prompt, {"prompt": prompt}) for prompt in prompts] + kept
    write_atomic(path, json.dumps({**held, "samples": samples}, indent=2, ensure_ascii=False) + "\n")
