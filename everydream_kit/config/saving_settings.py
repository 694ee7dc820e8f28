"""Checkpoints, the log, and what extends a run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from everydream_kit.config.declaration import EVERYTHING, NOTHING, Facts, Group, Knob


class SavingGroup(Group):
    """Saving: checkpoints."""

    project_name: Annotated[
        str,
        Field(pattern=r"^[^/\\:*?\"<>|\x00-\x1f]{1,100}$"),
        Knob(
            basic=True,
            unit='up to 100 characters, none of / \\ : * ? " < > |',
            when="always: it names the run folder and checkpoints",
        ),
        Facts(NOTHING, "never", of_project=True),
    ] = "myproj"
    """Names runs and checkpoints."""
    run_name: Annotated[
        str | None,
        Knob(when="Weights & Biases should show another name"),
        Facts(NOTHING, "resume", needs=("wandb",), of_project=True),
    ] = None
    """Name of the run for Weights & Biases; by default the run folder's."""
    logdir: Annotated[
        str,
        Knob(basic=True, when="another disk should hold the run folders"),
        Facts(
            NOTHING,
            "never",
            names="folder that holds the run folders",
            decided_here=True,
            holds_path=True,
            of_project=True,
        ),
    ] = "logs"
    """Folder that holds the run folders: logs, samples and checkpoints in diffusers form."""
    save_ckpt_dir: Annotated[
        str | None,
        Knob(basic=True, when="single files should land in your image app's models folder"),
        Facts(NOTHING, "resume", names="folder that single files are written to", holds_path=True, of_project=True),
    ] = None
    """Folder for single-file `.safetensors` checkpoints; by default the working folder."""
    ckpt_every_n_minutes: Annotated[
        Annotated[float, Field(gt=0)] | None,
        Knob(basic=True, unit="minutes", when="how much work may be lost in a crash", step=1),
        Facts(NOTHING, "live"),
    ] = None
    """Minutes between checkpoints; 20 where no other rule of saving is given."""
    save_every_n_epochs: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Knob(basic=True, unit="epochs", when="to compare epochs later", step=1),
        Facts(NOTHING, "live"),
    ] = None
    """Save at the end of every n-th epoch."""
    save_every_n_steps: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Knob(unit="optimizer steps", when="epochs are very long", step=1),
        Facts(NOTHING, "live"),
    ] = None
    """Optimizer steps between checkpoints."""
    save_ckpts_from_n_epochs: Annotated[
        int, Field(ge=0), Knob(unit="epochs", when="early checkpoints are of no use", step=1), Facts(NOTHING, "resume")
    ] = 0
    """Save by epoch only from this one on."""
    keep_last_n: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Knob(unit="checkpoints", when="disk is short", step=1),
        Facts(NOTHING, "resume"),
    ] = None
    """Keep only the latest checkpoints, with their single files; the best and the last stay in any case."""
    save_full_precision: Annotated[bool, Knob(when="the file will be trained on further"), Facts(NOTHING, "resume")] = (
        False
    )
    """Single files in float32 instead of float16."""
    save_optimizer: Annotated[
        bool, Knob(when="every checkpoint should be resumable, not only the latest"), Facts(NOTHING, "resume")
    ] = False
    """Keep the optimizer state in every checkpoint. The latest has it in any case."""
    no_save_ckpt: Annotated[bool, Knob(when="the diffusers folders are enough"), Facts(NOTHING, "resume")] = False
    """Write no single files."""
    no_prepend_last: Annotated[
        bool, Knob(when="file names should not begin with `last-`"), Facts(NOTHING, "resume")
    ] = False
    """Name the final checkpoint like all others."""
    push_to: Annotated[
        str | None,
        Knob(when="the machine may go away"),
        Facts(NOTHING, "resume", names="Hub repository that checkpoints are uploaded to"),
    ] = None
    """Hub repository (`me/jets`) that checkpoints are uploaded to while training."""
    push_every: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Knob(unit="checkpoints", when="uploads are slow", step=1),
        Facts(NOTHING, "resume", needs=("push_to",), follows=("push_to",)),
    ] = None
    """Upload every n-th checkpoint to `push_to`, with its resume state; by default only the last."""


class LoggingGroup(Group):
    """Watching and extending."""

    log_step: Annotated[
        int,
        Field(ge=1),
        Knob(unit="optimizer steps", when="rarely: it costs next to nothing", step=1),
        Facts(NOTHING, "resume"),
    ] = 25
    """Steps between points in the log."""
    wandb: Annotated[
        bool,
        Knob(when="you use Weights & Biases"),
        Facts(NOTHING, "resume", names="logging to Weights & Biases with this machine's account"),
    ] = False
    """Log to Weights & Biases as well (needs the `wandb` extra)."""
    plugins: Annotated[
        list[str],
        Knob(when="you write Python"),
        Facts(EVERYTHING, "resume", names="Python classes that run during training"),
    ] = []  # noqa: RUF012 - pydantic copies it
    """Listeners, as `module.Class`, with EveryDream 2's hook names."""
    load_settings_every_epoch: Annotated[bool, Knob(when="to steer a running training"), Facts(NOTHING, "resume")] = (
        False
    )
    """Re-read the live settings (`live.json` in the run folder: lr_factor, sample_steps, sample_prompts, save intervals) at each
    epoch's start."""
