"""What is wrong with settings and can be known without the model: checked before there is a run folder.

What needs the model or the dataset is checked by `run_builder`, the cheapest first.
"""

from __future__ import annotations

from pathlib import Path

from everydream_kit.config import TrainConfig
from everydream_kit.config.rules import wants_auto_optimizer
from everydream_kit.errors import ConfigError
from everydream_kit.training.optimizers import require_optimizer
from everydream_kit.training.parts import TEXT_ENCODER, UNET, part_settings


def check_start(config: TrainConfig) -> None:
    """Refuse a training that cannot start as it was asked for.

    Raises:
        ConfigError: an unknown optimizer, or a prompt file that was named and is not there.
        HubError: `push_to` is no repository's name, or there is no token to push with.
    """
    if not wants_auto_optimizer(config):
        for part in (UNET, TEXT_ENCODER):
            require_optimizer(part_settings(config, part, "adamw").optimizer)
    prompts = Path(config.sample_prompts)
    usual = prompts.name == TrainConfig.model_fields["sample_prompts"].default  # of projects, where it may be missing
    samples = config.sample_steps is not None or config.sample_before_training
    if samples and not usual and not prompts.is_file():
        raise ConfigError(
            f"sample_prompts: {config.sample_prompts} is not there. Give a file of prompts, one a line, or leave "
            "sample_prompts out to sample captions of the dataset."
        )
    if config.push_to is not None:
        from everydream_kit.export.hub.access import check_repo_id
        from everydream_kit.export.hub.connection import HubConnection

        check_repo_id(config.push_to)
        HubConnection()
