"""How long a run trains, and its learning rate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from everydream_kit.config.declaration import EVERYTHING, RESULT, Facts, Group, Knob


class LengthGroup(Group):
    """Length and learning rate."""

    max_epochs: Annotated[
        int,
        Field(ge=1, le=1_000_000),
        Knob(basic=True, unit="epochs", when="watch the samples; 30 to 100 are common", step=1),
        Facts(RESULT, "resume"),
    ] = 300
    """Passes over the dataset."""
    max_steps: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Knob(unit="optimizer steps", when="a fixed budget matters more than whole epochs"),
        Facts(RESULT, "resume"),
    ] = None
    """Stop after this many optimizer steps, unless the epochs are over before."""
    grad_accum: Annotated[
        int,
        Field(ge=1, le=4096),
        Knob(
            basic=True,
            unit="micro-batches",
            memory="none beyond 2",
            when="the batch that you want does not fit",
            step=1,
        ),
        Facts(EVERYTHING, "resume"),
    ] = 1
    """Micro-batches whose gradients are averaged into one optimizer step."""
    lr: Annotated[
        Annotated[float, Field(gt=0, le=100)],
        Knob(
            basic=True,
            unit="per optimizer step",
            when="2e-6 to 5e-6 at 512 px and batch 6-8 on SD 1.x; halve it at 768",
            log=True,
        ),
        Facts(RESULT, "resume"),
    ] = 1e-6
    """Peak learning rate of the UNet, and of the text encoder unless `text_encoder_lr` or its scale sets one. Around 1 for
    optimizers that find their own rate."""
    lr_scheduler: Annotated[
        Literal["constant", "linear", "cosine", "polynomial"],
        Knob(basic=True, when="cosine with a 25-50 % higher lr"),
        Facts(RESULT, "resume"),
    ] = "constant"
    """Learning rate schedule."""
    lr_warmup_steps: Annotated[
        Annotated[int, Field(ge=0)] | None,
        Knob(unit="optimizer steps", when="training from scratch needs more"),
        Facts(RESULT, "resume"),
    ] = None
    """Steps in which the learning rate rises from 0; by default 2 % of the decay steps. `constant` has none unless given."""
    lr_decay_steps: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Knob(unit="optimizer steps", when="the rate should reach zero sooner or later"),
        Facts(RESULT, "resume"),
    ] = None
    """Steps until the schedule reaches zero; by default 1.5 × all steps, so cosine ends near a quarter of lr."""
    scale_lr: Annotated[bool, Knob(when="batch_size and grad_accum change often"), Facts(RESULT, "resume")] = False
    """Multiply the learning rate by (batch_size × grad_accum)^0.55. The rate used is logged."""
    seed: Annotated[
        int,
        Field(ge=-1, le=2**31 - 1),
        Knob(basic=True, when="keep it to compare settings; -1 for a new one each time", step=1),
        Facts(RESULT, "never"),
    ] = 555
    """Seed of every random number of the run. -1 chooses a new one and logs it."""
