"""Settings of one part alone: the UNet's and the text encoder's own optimizer settings, and which layers are frozen.

Each `unet_X` and `text_encoder_X` stands for `X` in that part only; None takes the value of `X`. A new setting of
optimizers is declared three times, in `optimizer_settings` and twice here; a test compares.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from everydream_kit.config.declaration import (
    EVERYTHING,
    MEMORY_AND_RESULT,
    RESULT,
    Betas,
    Decay,
    Epsilon,
    Facts,
    Group,
    Guess,
    Knob,
    Momentum,
    OwnRate,
    PositiveSteps,
    Schedule,
    Steps,
)


class UnetGroup(Group):
    """UNet: settings of its own."""

    unet_optimizer: Annotated[
        str | None,
        Knob(when="the UNet should have another optimizer"),
        Facts(
            EVERYTHING,
            "never",
            unless=("disable_unet_training",),
            names="Python class that runs as the optimizer of the UNet",
        ),
    ] = None
    """The UNet's optimizer; by default `optimizer`. Another one does not inherit `momentum`, `d0`, `decouple` and
    `optimizer_args`."""
    unet_lr: Annotated[
        OwnRate | None,
        Knob(unit="per optimizer step", when="the text encoder takes `lr`, and the UNet another rate", log=True),
        Facts(RESULT, "resume", unless=("disable_unet_training",)),
    ] = None
    """The UNet's peak learning rate; by default `lr`."""
    unet_lr_scheduler: Annotated[
        Schedule | None,
        Knob(when="the UNet should stop learning earlier or later"),
        Facts(RESULT, "resume", unless=("disable_unet_training",)),
    ] = None
    """Course of the UNet's rate; by default `lr_scheduler`."""
    unet_lr_warmup_steps: Annotated[
        Steps | None,
        Knob(unit="optimizer steps", when="the UNet should start more slowly"),
        Facts(RESULT, "resume", unless=("disable_unet_training",)),
    ] = None
    """Warm-up of the UNet's rate; by default `lr_warmup_steps`."""
    unet_lr_decay_steps: Annotated[
        PositiveSteps | None,
        Knob(unit="optimizer steps", when="the UNet should stop learning earlier or later"),
        Facts(RESULT, "resume", unless=("disable_unet_training",)),
    ] = None
    """Steps until the UNet's schedule reaches zero; by default `lr_decay_steps`."""
    unet_weight_decay: Annotated[
        Decay | None,
        Knob(unit="share per step, times the rate", when="the UNet overfits first"),
        Facts(RESULT, "resume", unless=("disable_unet_training",)),
    ] = None
    """The UNet's weight decay; by default `weight_decay`."""
    unet_betas: Annotated[
        Betas | None,
        Knob(unit="one number for each average", when="with an optimizer of its own"),
        Facts(RESULT, "resume", unless=("disable_unet_training",)),
    ] = None
    """The UNet's betas; by default `betas`."""
    unet_eps: Annotated[
        Epsilon | None,
        Knob(when="with an optimizer of its own"),
        Facts(RESULT, "resume", unless=("disable_unet_training",)),
    ] = None
    """The UNet's epsilon; by default `eps`."""
    unet_momentum: Annotated[
        Momentum | None,
        Knob(when="with an optimizer of its own"),
        Facts(MEMORY_AND_RESULT, "resume", unless=("disable_unet_training",)),
    ] = None
    """The UNet's momentum; by default `momentum`."""
    unet_d0: Annotated[
        Guess | None,
        Knob(when="with an optimizer of its own"),
        Facts(RESULT, "resume", unless=("disable_unet_training",)),
    ] = None
    """The UNet's first guess of a rate; by default `d0`."""
    unet_decouple: Annotated[
        bool | None,
        Knob(when="with an optimizer of its own"),
        Facts(RESULT, "resume", unless=("disable_unet_training",)),
    ] = None
    """Whether the UNet's decay is apart from the gradient; by default `decouple`."""
    unet_optimizer_args: Annotated[
        dict[str, Any] | None,
        Knob(when="with an optimizer of its own"),
        Facts(EVERYTHING, "resume", unless=("disable_unet_training",)),
    ] = None
    """Further arguments of the UNet's optimizer, added to `optimizer_args`."""
    unet_train_layers: Annotated[
        list[str] | None,
        Knob(
            memory="saves gradients and optimizer state of the rest", when="only some layers should be trained: `attn2`"
        ),
        Facts(
            EVERYTHING,
            "never",
            kinds=("full",),
            unless=("disable_unet_training",),
            names="regular expressions for the UNet's layers",
        ),
    ] = None
    """Train only UNet parameters in whose name one of these regular expressions is found; by default all."""
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
    """And none in whose name one of these is found."""


class TextEncoderGroup(Group):
    """Text encoder: settings of its own."""

    text_encoder_optimizer: Annotated[
        str | None,
        Knob(when="the text encoder should have another optimizer"),
        Facts(
            EVERYTHING,
            "never",
            unless=("disable_textenc_training",),
            names="Python class that runs as the optimizer of the text encoder",
        ),
    ] = None
    """The text encoder's optimizer; by default `optimizer`. Another one does not inherit `momentum`, `d0`, `decouple` and
    `optimizer_args`."""
    text_encoder_lr: Annotated[
        OwnRate | None,
        Knob(unit="per optimizer step", when="half of `lr` or less: the text encoder overfits first", log=True),
        Facts(RESULT, "resume", unless=("disable_textenc_training",)),
    ] = None
    """The text encoder's peak learning rate; by default `lr`."""
    text_encoder_lr_scheduler: Annotated[
        Schedule | None,
        Knob(when="the text encoder should stop learning earlier or later"),
        Facts(RESULT, "resume", unless=("disable_textenc_training",)),
    ] = None
    """Course of the text encoder's rate; by default `lr_scheduler`."""
    text_encoder_lr_warmup_steps: Annotated[
        Steps | None,
        Knob(unit="optimizer steps", when="the text encoder should start more slowly"),
        Facts(RESULT, "resume", unless=("disable_textenc_training",)),
    ] = None
    """Warm-up of the text encoder's rate; by default `lr_warmup_steps`."""
    text_encoder_lr_decay_steps: Annotated[
        PositiveSteps | None,
        Knob(unit="optimizer steps", when="the text encoder should stop learning earlier or later"),
        Facts(RESULT, "resume", unless=("disable_textenc_training",)),
    ] = None
    """Steps until the text encoder's schedule reaches zero; by default `lr_decay_steps`."""
    text_encoder_weight_decay: Annotated[
        Decay | None,
        Knob(unit="share per step, times the rate", when="the text encoder overfits first"),
        Facts(RESULT, "resume", unless=("disable_textenc_training",)),
    ] = None
    """The text encoder's weight decay; by default `weight_decay`."""
    text_encoder_betas: Annotated[
        Betas | None,
        Knob(unit="one number for each average", when="with an optimizer of its own"),
        Facts(RESULT, "resume", unless=("disable_textenc_training",)),
    ] = None
    """The text encoder's betas; by default `betas`."""
    text_encoder_eps: Annotated[
        Epsilon | None,
        Knob(when="with an optimizer of its own"),
        Facts(RESULT, "resume", unless=("disable_textenc_training",)),
    ] = None
    """The text encoder's epsilon; by default `eps`."""
    text_encoder_momentum: Annotated[
        Momentum | None,
        Knob(when="with an optimizer of its own"),
        Facts(MEMORY_AND_RESULT, "resume", unless=("disable_textenc_training",)),
    ] = None
    """The text encoder's momentum; by default `momentum`."""
    text_encoder_d0: Annotated[
        Guess | None,
        Knob(when="with an optimizer of its own"),
        Facts(RESULT, "resume", unless=("disable_textenc_training",)),
    ] = None
    """The text encoder's first guess of a rate; by default `d0`."""
    text_encoder_decouple: Annotated[
        bool | None,
        Knob(when="with an optimizer of its own"),
        Facts(RESULT, "resume", unless=("disable_textenc_training",)),
    ] = None
    """Whether the text encoder's decay is apart from the gradient; by default `decouple`."""
    text_encoder_optimizer_args: Annotated[
        dict[str, Any] | None,
        Knob(when="with an optimizer of its own"),
        Facts(EVERYTHING, "resume", unless=("disable_textenc_training",)),
    ] = None
    """Further arguments of the text encoder's optimizer, added to `optimizer_args`."""
    text_encoder_lr_scale: Annotated[
        OwnRate | None,
        Knob(unit="times lr", when="the text encoder's rate should follow `lr`: 0.5"),
        Facts(RESULT, "resume", unless=("disable_textenc_training", "text_encoder_lr")),
    ] = None
    """The text encoder's peak learning rate as a factor on `lr`, where `text_encoder_lr` is not given."""
    text_encoder_freeze_embeddings: Annotated[
        bool,
        Knob(memory="saves their gradients and optimizer state", when="the text encoder should keep its words"),
        Facts(EVERYTHING, "never", kinds=("full",), unless=("disable_textenc_training",)),
    ] = False
    """Keep the text encoder's token and position embeddings as they are."""
    text_encoder_unfreeze_last_n_layers: Annotated[
        Annotated[int, Field(ge=0)] | None,
        Knob(unit="layers", memory="saves the rest's gradients and optimizer state", when="SD 2.x: 1 to 6", step=1),
        Facts(EVERYTHING, "never", kinds=("full",), unless=("disable_textenc_training",)),
    ] = None
    """Train only this many layers of the text encoder, counted from the end; by default all."""
    text_encoder_freeze_front_n_layers: Annotated[
        int | None,
        Knob(
            unit="layers",
            memory="saves their gradients and optimizer state",
            when="an old optimizer.json says it so",
            step=1,
        ),
        Facts(EVERYTHING, "never", kinds=("full",), unless=("disable_textenc_training",)),
    ] = None
    """An older way to say it: freeze this many layers from the front; negative: all but the last so many."""
    text_encoder_freeze_final_layer_norm: Annotated[
        bool,
        Knob(when="the last layers are frozen, too"),
        Facts(EVERYTHING, "never", kinds=("full",), unless=("disable_textenc_training",)),
    ] = False
    """Keep the norm after the text encoder's last layer as it is."""
