"""Settings of one part alone: the UNet's and the text encoder's own optimizer settings, and which layers are frozen.

Each `unet_X` and `text_encoder_X` stands for `X` in that part only; None takes the value of `X`. Type, unit and facts are those
of `X`, so a new setting of optimizers is declared once, in `optimizer_settings`, and gets its words for a part in `OWN`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, create_model

from everydream_kit.config.declaration import DIFFUSION, EVERYTHING, RESULT, Facts, Group, Knob, OwnRate
from everydream_kit.config.length_settings import LengthGroup
from everydream_kit.config.optimizer_settings import OptimizerGroup

OF_ITS_OWN = "the {part} has another optimizer"
OWN = {
    "optimizer": (
        "the {part} should have another optimizer",
        "The {part}'s optimizer; by default `optimizer`. Another one does not inherit `momentum`, `d0`, `decouple` and "
        "`optimizer_args`.",
    ),
    "lr": ("{lr}", "The {part}'s peak learning rate; by default `lr`."),
    "lr_scheduler": (
        "the {part} should stop learning earlier or later",
        "Learning rate schedule of the {part}; by default `lr_scheduler`.",
    ),
    "lr_warmup_steps": (
        "the {part} should start more slowly",
        "Warm-up of the {part}'s rate; by default `lr_warmup_steps`.",
    ),
    "lr_decay_steps": (
        "the {part} should stop learning earlier or later",
        "Steps until the {part}'s schedule reaches zero; by default `lr_decay_steps`.",
    ),
    "weight_decay": ("the {part} overfits first", "The {part}'s weight decay; by default `weight_decay`."),
    "betas": (OF_ITS_OWN, "The {part}'s betas; by default `betas`."),
    "eps": (OF_ITS_OWN, "The {part}'s epsilon; by default `eps`."),
    "momentum": (OF_ITS_OWN, "The {part}'s momentum; by default `momentum`."),
    "d0": (OF_ITS_OWN, "The {part}'s first guess of a rate; by default `d0`."),
    "decouple": (
        OF_ITS_OWN,
        "Whether the {part}'s weight decay is decoupled from the gradient; by default `decouple`.",
    ),
    "optimizer_args": (OF_ITS_OWN, "Further arguments of the {part}'s optimizer, added to `optimizer_args`."),
}
"""Settings that a part may have of its own: when to give it one, and what it is."""


def _own_settings(prefix: str, part: str, off: str, lr: str, **facts_of_part: Any) -> Any:
    """A group of the settings in `OWN` for a part.

    Args:
        prefix: of their names.
        part: in words.
        off: the setting that freezes the part, which takes their effect away.
        lr: when to give it a rate of its own.
        facts_of_part: more `Facts` of all of them.
    """
    fields: dict[str, Any] = {}
    for name, (when, text) in OWN.items():
        field = (LengthGroup if name in LengthGroup.model_fields else OptimizerGroup).model_fields[name]
        knob = next(one for one in field.metadata if isinstance(one, Knob))
        facts = next(one for one in field.metadata if isinstance(one, Facts))
        kind: Any = OwnRate if name == "lr" else field.annotation
        fields[f"{prefix}{name}"] = Annotated[
            kind | None,
            Field(description=text.format(part=part)),
            Knob(unit=knob.unit, when=when.format(part=part, lr=lr), log=knob.log),
            Facts(
                facts.affects,
                facts.change,
                unless=(off,),
                names=f"{facts.names} of the {part}" if facts.names else "",
                **facts_of_part,
            ),
        ], None  # fmt: skip
    return create_model(f"Own{prefix.title()}", __base__=Group, __module__=__name__, **fields)


class UnetGroup(
    _own_settings(  # type: ignore[misc]
        "unet_", "UNet", "disable_unet_training", "the text encoder takes `lr`, and the UNet another rate"
    )
):
    """UNet: settings of its own."""

    unet_train_layers: Annotated[
        list[str] | None,
        Knob(
            memory="saves the gradients and optimizer state of the others",
            when="only some layers should be trained: `attn2`",
        ),
        Facts(
            EVERYTHING,
            "never",
            kinds=("full",),
            unless=("disable_unet_training",),
            names="regular expressions for the UNet's layers",
        ),
    ] = None
    """Train only UNet parameters whose name matches one of these regular expressions; by default all."""
    unet_freeze_layers: Annotated[
        list[str] | None,
        Knob(memory="saves their gradients and optimizer state", when="some layers should stay as they are"),
        Facts(
            EVERYTHING,
            "never",
            kinds=("full",),
            unless=("disable_unet_training",),
            names="regular expressions for the UNet's layers",
        ),
    ] = None
    """Freeze UNet parameters whose name matches one of these regular expressions."""


class TextEncoderGroup(
    _own_settings(  # type: ignore[misc]
        "text_encoder_",
        "text encoder",
        "disable_textenc_training",
        "half of `lr` or less: the text encoder overfits first",
        families=DIFFUSION,
    )
):
    """Text encoder: settings of its own."""

    text_encoder_lr_scale: Annotated[
        OwnRate | None,
        Knob(unit="times lr", when="the text encoder's rate should follow `lr`: 0.5"),
        Facts(RESULT, "resume", families=DIFFUSION, unless=("disable_textenc_training", "text_encoder_lr")),
    ] = None
    """The text encoder's peak learning rate as a factor on `lr`, where `text_encoder_lr` is not given."""
    text_encoder_freeze_embeddings: Annotated[
        bool,
        Knob(memory="saves their gradients and optimizer state", when="the text encoder should keep its words"),
        Facts(EVERYTHING, "never", kinds=("full",), families=DIFFUSION, unless=("disable_textenc_training",)),
    ] = False
    """Keep the text encoder's token and position embeddings as they are."""
    text_encoder_unfreeze_last_n_layers: Annotated[
        Annotated[int, Field(ge=0)] | None,
        Knob(
            unit="layers",
            memory="saves the gradients and optimizer state of the other layers",
            when="SD 2.x: 1 to 6",
            step=1,
        ),
        Facts(EVERYTHING, "never", kinds=("full",), families=DIFFUSION, unless=("disable_textenc_training",)),
    ] = None
    """Train only this many layers of the text encoder, counted from the end; by default all."""
    text_encoder_freeze_front_n_layers: Annotated[
        int | None,
        Knob(
            unit="layers",
            memory="saves their gradients and optimizer state",
            when="an old optimizer.json has it",
            step=1,
        ),
        Facts(EVERYTHING, "never", kinds=("full",), families=DIFFUSION, unless=("disable_textenc_training",)),
    ] = None
    """Older form of `text_encoder_unfreeze_last_n_layers`: freeze this many layers from the front; a negative number freezes all
    but the last ones."""
    text_encoder_freeze_final_layer_norm: Annotated[
        bool,
        Knob(when="the last layers are frozen, too"),
        Facts(EVERYTHING, "never", kinds=("full",), families=DIFFUSION, unless=("disable_textenc_training",)),
    ] = False
    """Keep the norm after the text encoder's last layer as it is."""
