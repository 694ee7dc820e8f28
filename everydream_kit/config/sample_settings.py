"""What is looked at while a run trains: samples and the validation loss."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from everydream_kit.config.declaration import MEMORY, MEMORY_AND_RESULT, NOTHING, RESULT, Facts, Group, Knob

Cfgs = Annotated[list[Annotated[float, Field(ge=0, le=1000)]], Field(min_length=1, max_length=100)]
SamplerName = Literal[
    "ddim",
    "ddpm",
    "pndm",
    "lms",
    "euler",
    "euler_a",
    "heun",
    "dpm2",
    "dpm2_a",
    "dpm++_2s",
    "dpm++_2s_karras",
    "dpm++_sde",
    "dpm++_sde_karras",
    "dpm++_2m",
    "dpm++_2m_karras",
    "dpm++_2m_sde",
    "dpm++_2m_sde_karras",
    "unipc",
]
"""The names in `models.samplers`; a test compares."""
Proportion = Annotated[float, Field(gt=0, lt=1)]
MEASURED = ("validation_split_mode", "stabilize_training_loss", "validation_extra_data_roots")
"""Settings of which each makes a run measure losses."""


class SampleGroup(Group):
    """Samples: images generated while training."""

    sample_steps: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Knob(basic=True, unit="optimizer steps", when="small datasets need them more often", step=1),
        Facts(MEMORY, "live"),
    ] = 250
    """Steps between samples. None: never."""
    sample_prompts: Annotated[
        str,
        Knob(basic=True, when="always: prompts that show what you teach"),
        Facts(MEMORY, "live", names="file of sample prompts", holds_path=True, of_project=True),
    ] = "sample_prompts.txt"
    """File of prompts: one per line, or a JSON object with cfgs, scheduler, seeds and sizes. It may be edited
    while a run trains; a mistake in it is a warning."""
    sample_before_training: Annotated[
        bool, Knob(when="to see the base model's own images first"), Facts(NOTHING, "resume", needs=("sample_steps",))
    ] = False
    """Generate samples before step 0, too."""
    sample_cfgs: Annotated[
        Cfgs | None,
        Knob(unit="guidance scales", when="to see other columns, or stronger guidance"),
        Facts(MEMORY, "resume", needs=("sample_steps",)),
    ] = None
    """Guidance scales that each prompt is sampled with, side by side; by default 7, 4 and 1.01 for Stable Diffusion, and the
    one that is usual for any other model. The prompt file's own values win over these settings."""
    sample_scheduler: Annotated[
        SamplerName, Knob(when="your image app uses another one"), Facts(NOTHING, "resume", needs=("sample_steps",))
    ] = "ddim"
    """Scheduler of the samples."""
    sample_num_inference_steps: Annotated[
        Annotated[int, Field(ge=1, le=1000)] | None,
        Knob(unit="denoising steps", when="samples take too long: 15 to 20", step=1),
        Facts(NOTHING, "resume", needs=("sample_steps",)),
    ] = None
    """Denoising steps of a sample; by default as many as are usual for the model: 30 for Stable Diffusion, 28 to 50 for the
    others."""
    sample_seed: Annotated[
        Annotated[int, Field(ge=-1, lt=2**63)] | None,
        Knob(when="to see other images; -1 for new ones each time"),
        Facts(NOTHING, "resume", needs=("sample_steps",)),
    ] = None
    """Seed of the samples; by default `seed`, so that samples of different steps can be compared."""
    sample_resolution: Annotated[
        Annotated[int, Field(ge=64, le=4096, multiple_of=8)] | None,
        Knob(
            unit="pixels",
            memory="activations of a sample grow with its square",
            when="samples should be smaller than the training's",
            step=64,
        ),
        Facts(MEMORY, "resume", needs=("sample_steps",)),
    ] = None
    """Side of a square sample; by default the largest `resolution`."""
    sample_batch_size: Annotated[
        Annotated[int, Field(ge=1, le=4096)] | Literal["auto"],
        Knob(
            unit="images",
            memory="activations of a sample grow with it",
            when="a number where memory is plenty; 1 where sampling runs out of it",
            step=1,
        ),
        Facts(MEMORY, "resume", needs=("sample_steps",)),
    ] = "auto"
    """Images that are sampled together. `auto` takes up to 4, with no more pixels than a training batch or one image of 1024
    x 1024 has: four samples of 512 px, or one of 1024 px at batch 1. The samples are the same with every number, up to
    rounding."""


class ValidationGroup(Group):
    """Validation: loss on images that are not trained on."""

    validation_config: Annotated[
        str | dict[str, Any] | None,
        Knob(when="you have a `validation_default.json` of EveryDream 2"),
        Facts(MEMORY_AND_RESULT, "resume", names="validation file, or folders in it", holds_path=True),
    ] = None
    """EveryDream 2's `validation_default.json`: a path, or the object itself. What it says becomes the settings here; a
    setting that is given next to it wins."""
    validation_split_mode: Annotated[
        Literal["none", "automatic", "manual"],
        Knob(when="from 50 images on, to see overfitting: automatic"),
        Facts(MEMORY_AND_RESULT, "resume", follows=("validation_data_root",)),
    ] = "none"
    """Which images are measured: `automatic` takes a share of the dataset out of training, `manual` takes those of
    `validation_data_root`. The curve is `loss/val`."""
    validation_split_proportion: Annotated[
        Proportion,
        Knob(unit="share of the images", when="small sets: less", step=0.05),
        Facts(RESULT, "resume", needs=("validation_split_mode",)),
    ] = 0.15
    """Share of the images that an automatic split takes out of training."""
    validation_data_root: Annotated[
        str | None,
        Knob(when="validation_split_mode is manual"),
        Facts(
            NOTHING,
            "resume",
            needs=("validation_split_mode",),
            names="folder with the validation images",
            holds_path=True,
        ),
    ] = None
    """Dataset that a manual split measures."""
    validation_extra_data_roots: Annotated[
        dict[str, str] | None,
        Knob(when="some images should have a curve of their own"),
        Facts(MEMORY, "resume", names="folders with further validation images", holds_path=True),
    ] = None
    """Further datasets to measure, by name: `{"cats": "input/cats"}` gives the curve `loss/cats`."""
    validation_every_n_epochs: Annotated[
        Annotated[float, Field(gt=0)],
        Knob(unit="epochs", when="long epochs: 0.25 measures four times in each"),
        Facts(RESULT, "resume", needs=MEASURED),
    ] = 1.0
    """Epochs between measurements."""
    validation_seed: Annotated[
        Annotated[int, Field(ge=0)],
        Knob(when="to see whether the split matters"),
        Facts(RESULT, "resume", needs=MEASURED),
    ] = 555
    """Seed of the split and of the fixed noise. It is not `seed`, so that runs of different seeds can be compared."""
    validation_batch_size: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Knob(unit="images", memory="activations without gradients", when="measuring is slow, or out of memory", step=1),
        Facts(MEMORY, "resume", needs=MEASURED),
    ] = None
    """Images measured together; by default `batch_size`."""
    stabilize_training_loss: Annotated[
        bool, Knob(when="the training loss is too noisy to read"), Facts(MEMORY, "resume")
    ] = False
    """Measure a share of the training images in the same way: `loss/train-stabilized`."""
    stabilize_split_proportion: Annotated[
        Proportion,
        Knob(unit="share of the images", when="small sets: more", step=0.05),
        Facts(NOTHING, "resume", needs=("stabilize_training_loss",)),
    ] = 0.15
    """Share of the training images that `stabilize_training_loss` measures. They stay in training."""
    early_stopping_patience: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Knob(unit="validations", when="unattended runs"),
        Facts(
            RESULT,
            "resume",
            needs=("validation_split_mode", "validation_config"),
            follows=("validation_config", "validation_data_root"),
        ),
    ] = None
    """Stop when the validation loss has not improved for this many validations."""
