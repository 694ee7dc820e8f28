"""The folder that a run was started in: where its relative paths lead when it is resumed from another one.

Settings keep paths as they were typed, so a project that moves as a whole still finds its images. Only what is not where the
resume is started, and is where the run was, is taken from there.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from everydream_kit.config import TrainConfig, facts
from everydream_kit.errors import JobError
from everydream_kit.runs import RunFolder
from everydream_kit.strict_json import read_json

logger = logging.getLogger(__name__)

KEY = "started_in"
"""In the run's `environment.json`."""


def read_start_folder(run_folder: Path) -> Path | None:
    """Where a run was started; None for one of an older version or another machine's."""
    try:
        facts = read_json(RunFolder(run_folder).environment_path, error=JobError, missing={})
    except JobError as problem:
        logger.warning("%s Relative paths are looked for in %s.", problem, Path.cwd())
        return None
    return Path(facts[KEY]) if isinstance(facts.get(KEY), str) else None


def with_paths_from(config: TrainConfig, start_folder: Path | None) -> tuple[TrainConfig, list[str]]:
    """A config whose relative paths lead where they did, and a sentence for each that is taken from there."""
    changes: dict[str, Any] = {}
    if start_folder is not None and start_folder != Path.cwd():
        for name in (name for name, one in facts().items() if one.holds_path):
            value = getattr(config, name)
            found = _found(value, start_folder)
            if found != value:
                changes[name] = found
    notes = [
        f"{name}: not in {Path.cwd()}, so {found} is used: the run was started there."
        for name, found in changes.items()
    ]
    return (config.replace(**changes) if changes else config), notes


def _found(value: Any, start_folder: Path) -> Any:
    if isinstance(value, list):
        return [_found(one, start_folder) for one in value]
    if isinstance(value, dict):
        return {key: _found(one, start_folder) for key, one in value.items()}
    if not isinstance(value, str) or not value or Path(value).expanduser().is_absolute():
        return value
    there = start_folder / value
    return str(there) if not Path(value).exists() and there.exists() else value
