"""EveryDream Kit: fine-tune Stable Diffusion from a notebook, a script or the command line.

The names below are the public face. They are loaded when first used: importing the package costs milliseconds and
does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everydream_kit import panels as panels
    from everydream_kit.config import TrainConfig as TrainConfig
    from everydream_kit.data.preparation import prepare_dataset as prepare_dataset
    from everydream_kit.errors import KitError as KitError
    from everydream_kit.export.hub import push_to_hub as push_to_hub
    from everydream_kit.export.single_file_export import export_checkpoint as export_checkpoint
    from everydream_kit.generation import sample as sample
    from everydream_kit.jobs import attach as attach
    from everydream_kit.jobs import start as start
    from everydream_kit.models.loading import load_model as load_model
    from everydream_kit.preflight.planning import plan as plan
    from everydream_kit.runs import RunFolder as RunFolder
    from everydream_kit.sessions import resume as resume
    from everydream_kit.sessions import train as train
    from everydream_kit.settings import load_config as load_config

__version__ = "0.1.0"

_PLACES = {
    "KitError": "errors",
    "RunFolder": "runs",
    "TrainConfig": "config",
    "attach": "jobs",
    "export_checkpoint": "export.single_file_export",
    "load_config": "settings",
    "load_model": "models.loading",
    "plan": "preflight.planning",
    "prepare_dataset": "data.preparation",
    "push_to_hub": "export.hub",
    "resume": "sessions",
    "sample": "generation",
    "start": "jobs",
    "train": "sessions",
}

__all__ = [*sorted(_PLACES), "panels"]  # noqa: PLE0604 (every name in the table is a string)


def __getattr__(name: str) -> Any:
    if name == "panels":
        return importlib.import_module("everydream_kit.panels")
    if name not in _PLACES:
        raise AttributeError(f"module 'everydream_kit' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"everydream_kit.{_PLACES[name]}"), name)
    if isinstance(found, type):
        return found
    from everydream_kit.public_arguments import with_checked_places

    return with_checked_places(found)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
