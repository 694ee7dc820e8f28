"""Starting points for the training form: a name, a sentence, and the settings that differ from the defaults.

A preset replaces the one before it: what any of them sets goes back to where the form began, then its own settings come.
A project's own presets are in its `presets.json`, and replace all settings but those that say what and where. No widgets
here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from everydream_kit.actions.bases import (
    base_settings,
    recognize_family,
    settings_of_other_families,
    start_values,
    suggested_settings,
)
from everydream_kit.atomic import write_atomic
from everydream_kit.config import EMBEDDED_MODEL, facts
from everydream_kit.demo.main import TRAINING
from everydream_kit.errors import ConfigError
from everydream_kit.strict_json import read_json

OF_PROJECT = tuple(name for name, one in facts().items() if one.of_project)
"""What is trained, on what, and where to."""


@dataclass(frozen=True)
class Preset:
    """A named set of settings.

    Attributes:
        title: as the list shows it.
        why: when to take it, in one sentence.
        settings: what it sets; everything else keeps its value in the form.
        rate: its learning rate, as a multiple of the one that the base and what is trained of it begin with; None: none.
    """

    title: str
    why: str
    settings: dict[str, Any] = field(default_factory=dict)
    rate: float | None = None

    def settings_on(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """What it sets on a base: nothing that the base's family does not have or the base needs otherwise.

        Args:
            chosen: the form's values.
        """
        if "resume_ckpt" in self.settings:
            return dict(self.settings)
        family = recognize_family(chosen.get("resume_ckpt"), chosen.get("family"))
        skipped = settings_of_other_families(family) | base_settings(chosen).keys()
        kept = {name: value for name, value in self.settings.items() if name not in skipped}
        if self.rate is not None:
            kept["lr"] = float(f"{self.rate * suggested_settings(chosen)['lr']:.3g}")
        return kept


PRESETS: dict[str, Preset] = {
    "demo": Preset(
        "Demo (embedded base)",
        "Learn the panels in two minutes, on any machine: the small model that ships with the kit at 128 pixels.",
        {"resume_ckpt": EMBEDDED_MODEL, **TRAINING, "sample_steps": 30, "sample_before_training": True, "log_step": 1},
    ),
    "style": Preset(
        "Style",
        "A look: 30 to 300 images in one style. Mirrored images and a little more dropout push the style harder.",
        {
            "batch_size": 4,
            "lr_scheduler": "cosine",
            "max_epochs": 60,
            "flip_p": 0.5,
            "cond_dropout": 0.1,
        },
        rate=2.0,
    ),
    "person": Preset(
        "Person or character",
        "One subject: 15 to 60 images. Never mirrored, since faces are not symmetric.",
        {
            "batch_size": 4,
            "lr_scheduler": "constant",
            "max_epochs": 80,
            "flip_p": 0.0,
            "cond_dropout": 0.04,
        },
        rate=1.5,
    ),
    "big": Preset(
        "Big dataset",
        "Thousands of images: fewer epochs, larger batches, saves by time.",
        {
            "batch_size": 8,
            "grad_accum": 2,
            "lr_scheduler": "cosine",
            "max_epochs": 10,
            "ckpt_every_n_minutes": 30.0,
            "keep_last_n": 3,
        },
        rate=3.0,
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

TOUCHED = frozenset(name for preset in PRESETS.values() for name in preset.settings)
"""Everything that one of these presets sets."""


def with_preset(own: Mapping[str, Any], settings: Mapping[str, Any], touched: frozenset[str] | None) -> dict[str, Any]:
    """The form's values with a preset in place of whatever preset was there.

    Args:
        own: all values as the person had set them.
        settings: of the preset; none at all is the kit's defaults.
        touched: settings that go back to where the form began; None: all but those in `OF_PROJECT`.
    """
    base = settings.get("resume_ckpt", own.get("resume_ckpt"))
    start = start_values({**own, "resume_ckpt": base})
    back = start.keys() if touched is None else touched & start.keys()
    return {**own, **{name: start[name] for name in back if name not in OF_PROJECT}, "resume_ckpt": base, **settings}


class SavedPresets:
    """A project's own presets, by name, in a file that every notebook of it finds."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def read(self) -> dict[str, dict[str, Any]]:
        """All of them. Raises: ConfigError if the file is broken."""
        held = {} if self._path is None else read_json(self._path, error=ConfigError, missing={})
        if bad := next((name for name, settings in held.items() if not isinstance(settings, dict)), None):
            raise ConfigError(f"{self._path}: {bad} is not an object of settings. Fix it, or delete it.")
        return dict(held)

    def save(self, name: str, settings: Mapping[str, Any]) -> None:
        """Add one, or replace the one of this name.

        Raises:
            ConfigError: the name is empty or one of the kit's presets.
        """
        taken = {preset.title.lower() for preset in PRESETS.values()}
        if not name.strip() or name.strip().lower() in taken:
            raise ConfigError("Give the preset another name.")
        chosen = {key: value for key, value in settings.items() if key not in OF_PROJECT}
        self._write({**self.read(), name.strip(): chosen})

    def remove(self, name: str) -> None:
        """Remove one."""
        self._write({key: value for key, value in self.read().items() if key != name})

    def _write(self, presets: Mapping[str, Any]) -> None:
        if self._path is None:
            raise ConfigError("Presets are saved in a project; this form has none.")
        write_atomic(self._path, json.dumps(presets, indent=2, ensure_ascii=False), make_folder=True)
