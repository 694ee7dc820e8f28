"""The average of a run's weights as the run begins: from the settings, or from a checkpoint (`ema_resume_model`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from everydream_kit.errors import CheckpointError
from everydream_kit.models.adapters import is_adapter_folder
from everydream_kit.models.components import renamed_for
from everydream_kit.models.loading import load_model, open_model
from everydream_kit.models.tensors import LazyTensor, Tensors
from everydream_kit.runs import find_last_checkpoint
from everydream_kit.training.ema import Ema, decay_from_strength_target

if TYPE_CHECKING:
    import torch

    from everydream_kit.config import TrainConfig
    from everydream_kit.models.family import Model
    from everydream_kit.training.parameters import TrainedPart


def build_ema(
    config: TrainConfig, model: Model, parts: list[TrainedPart], num_steps: int, *, resumes: bool
) -> Ema | None:
    """The average of the trained weights, or None where it is off."""
    parameters = [parameter for part in parts for _, parameter in part.parameters]
    device = None if config.ema_device == "cuda" else config.ema_device
    if config.ema_strength_target is not None:
        decay = decay_from_strength_target(config.ema_strength_target, num_steps, config.ema_update_interval)
        ema = Ema(parameters, decay, device, config.ema_update_interval)
    elif config.ema_decay_rate is not None:
        ema = Ema(parameters, config.ema_decay_rate, device, config.ema_update_interval)
    else:
        return None
    if config.ema_resume_model is not None and not resumes:
        ema.load_averages(averages_of(config, model, parameters))
    return ema


def averages_of(config: TrainConfig, model: Model, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """The weights of the checkpoint that `ema_resume_model` names, in the order of the trained parameters.

    Raises:
        CheckpointError, ModelError: it is not there, or is another model's.
    """
    import torch

    source = config.ema_resume_model
    if source == "findlast":
        source = str(find_last_checkpoint(config.logdir, config.project_name, averaged=True))
    other = _weights_of(str(source), model)
    places = {id(p): (name, key) for name, module in model.modules().items() for key, p in module.named_parameters()}
    averages = []
    for parameter in parameters:
        name, key = places[id(parameter)]
        found = other.get(name, {}).get(key)
        if found is None or found.shape != tuple(parameter.shape):
            raise CheckpointError(
                f"ema_resume_model {source}: has no {name}.{key} of the shape {tuple(parameter.shape)}."
            )
        averages.append(found.load(torch.float32))
    return averages


def _weights_of(source: str, model: Model) -> dict[str, Tensors]:
    """A checkpoint's weights by this model's names, unread; an adapter's checkpoint is loaded with its base."""
    if is_adapter_folder(Path(source)):
        modules = load_model(source).modules()
        return {
            name: {key: LazyTensor.of(value) for key, value in module.state_dict().items()}
            for name, module in modules.items()
        }
    files = open_model(source)
    return {name: renamed_for(module, files.tensors.get(name, {})) for name, module in model.modules().items()}
