"""What a person can do besides training, once for all faces: the command line, the panels and background tasks read this.

Training, resuming and planning take the settings, whose records are in `config`.
"""

from __future__ import annotations

from everydream_kit.actions.action import Action
from everydream_kit.errors import ConfigError

PREPARE = Action("check a dataset and report", "actions.dataset_report:report_dataset", {"as_json": "json"})
SAMPLE = Action(
    "generate images with a checkpoint",
    "generation:sample",
    {"prompts": "prompt", "cfgs": "cfg", "adapter_base": "base"},
)
EXPORT = Action(
    "write a checkpoint as one file that every image app loads, as a folder, or a LoRA alone",
    "actions.converting:export",
)
MERGE = Action("merge a LoRA into a model, or mix two models", "actions.converting:merge")
EXTRACT = Action(
    "write the difference of two models as a LoRA",
    "actions.converting:extract",
    {"adapter_base": "base"},
    opposites={"text_encoder": "unet_only"},
)
PUSH = Action(
    "upload a run, checkpoint or single file to the Hugging Face Hub",
    "export.hub:push_to_hub",
    opposites={"private": "public"},
    skip=("token", "api", "sleep"),
)
FETCH = Action(
    "fetch a run from the Hugging Face Hub, to resume, sample or export it here",
    "export.hub:fetch_run",
    skip=("given", "token", "api", "sleep"),
)

ACTIONS = {
    "prepare": PREPARE,
    "sample": SAMPLE,
    "export": EXPORT,
    "merge": MERGE,
    "extract": EXTRACT,
    "push": PUSH,
    "fetch": FETCH,
}
"""By the name of the command."""

TIDY_STEPS = {
    "resize": Action("make smaller copies of large images", "data.tidying:resize_images"),
    "convert": Action("make copies in another format", "data.tidying:convert_images"),
    "set-aside-duplicates": Action("move duplicates out of a folder", "data.tidying:exclude_duplicates"),
    "split-validation": Action("move images into a validation set", "data.tidying:split_validation"),
    "edit-tags": Action("add and remove tags in captions", "data.tagging:edit_tags"),
    "captions-from-table": Action("write captions from a table", "data.tagging:captions_from_table"),
    "auto-caption": Action("caption images with a model", "data.captioning:auto_caption"),
    "undo": Action("undo a step", "data.changes:undo"),
}
"""Steps of preparation, by name."""


def find_action(name: str) -> Action:
    """The action of a command or of a step of preparation.

    Raises:
        ConfigError: there is none of this name.
    """
    known = {**ACTIONS, **TIDY_STEPS}
    if name not in known:
        raise ConfigError(f"{name}: no such action; there are {', '.join(known)}.")
    return known[name]
