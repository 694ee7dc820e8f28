"""The base model: what is fine-tuned."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from everydream_kit.config.declaration import DIFFUSION, EVERYTHING, RESULT, Facts, FamilyName, Group, Knob

EMBEDDED_MODEL = "embedded"
"""What `resume_ckpt` calls the small model that ships with the kit."""


class BaseModelGroup(Group):
    """Base model: what is fine-tuned."""

    resume_ckpt: Annotated[
        str,
        Field(min_length=1),
        Knob(basic=True, memory="the model's own size", when="always: it is the model you start from"),
        Facts(EVERYTHING, "never", names="base model", holds_path=True, of_project=True),
    ]
    """Base model: a diffusers folder, a `.safetensors` or `.ckpt` file, a Hugging Face Hub id, or `findlast` for the
    latest checkpoint of this project. `embedded` is the small model that ships with the kit."""
    base_revision: Annotated[
        str | None,
        Knob(when="to pin a Hub model to a commit, tag or branch"),
        Facts(RESULT, "resume", names="revision of the base model's repository"),
    ] = None
    """Branch, tag or commit of a Hub model."""
    base_subfolder: Annotated[
        str | None,
        Knob(when="the Hub repository holds several models"),
        Facts(RESULT, "resume", names="folder in the base model's repository"),
    ] = None
    """Folder of a Hub repository that holds the diffusers model."""
    base_variant: Annotated[
        str | None,
        Knob(when="only the half-precision files are wanted: `fp16`"),
        Facts(RESULT, "resume", names="variant of the base model's files"),
    ] = None
    """Variant of the weight files of a Hub model, such as `fp16`."""
    family: Annotated[
        FamilyName | None,
        Knob(when="the file's own keys mislead; normally never"),
        Facts(RESULT, "never"),
    ] = None
    """Model family. Recognized from the files unless given."""
    prediction_type: Annotated[
        Literal["epsilon", "v_prediction", "sample"] | None,
        Knob(when="a single file does not say that it is a v-prediction model"),
        Facts(RESULT, "resume", families=DIFFUSION, refusal="flow matching predicts the velocity from image to noise"),
    ] = None
    """What the UNet predicts. Recognized from the files unless given."""
    vae: Annotated[
        str | None,
        Knob(when="a single file holds no VAE, or another VAE is to go with the model"),
        Facts(
            RESULT,
            "resume",
            names="file or folder of the VAE",
            families=DIFFUSION,
            refusal="it is used with its own VAE",
            holds_path=True,
        ),
    ] = None
    """VAE to use in place of the base's own, or where a single file holds none: its file, or a diffusers folder."""
    clip_skip: Annotated[
        int,
        Field(ge=0, le=4),
        Knob(basic=True, unit="layers", when="an SD 1 base was trained so, as many anime models were: 2"),
        Facts(EVERYTHING, "resume", families=DIFFUSION, refusal="the layers of its text encoder are fixed"),
    ] = 0
    """Which hidden layer of the text encoder is used, counted from the end: 0 and 1 are the last, 2 the penultimate, with
    the final layer norm. SD 2's encoder ends at the layer that it was trained with, the penultimate of the original, so 0 is
    right there. SDXL takes its penultimate layers without the norm: 0 to 2 all mean that, 3 and 4 go deeper.
    Use the same value when sampling with the result."""
