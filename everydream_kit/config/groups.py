"""All groups of parameters together: what the rules are about. `TrainConfig` adds the rules and the messages."""

from __future__ import annotations

from everydream_kit.config.base_model_settings import BaseModelGroup
from everydream_kit.config.data_settings import CaptionGroup, DataGroup
from everydream_kit.config.length_settings import LengthGroup
from everydream_kit.config.objective_settings import ObjectiveGroup
from everydream_kit.config.optimizer_settings import OptimizerGroup
from everydream_kit.config.part_settings import TextEncoderGroup, UnetGroup
from everydream_kit.config.precision_settings import EmaGroup, PrecisionGroup
from everydream_kit.config.sample_settings import SampleGroup, ValidationGroup
from everydream_kit.config.saving_settings import LoggingGroup, SavingGroup


class AllGroups(
    BaseModelGroup,
    DataGroup,
    CaptionGroup,
    LengthGroup,
    OptimizerGroup,
    UnetGroup,
    TextEncoderGroup,
    ObjectiveGroup,
    PrecisionGroup,
    EmaGroup,
    SampleGroup,
    ValidationGroup,
    SavingGroup,
    LoggingGroup,
):
    """In the order in which forms and the reference page show them."""
