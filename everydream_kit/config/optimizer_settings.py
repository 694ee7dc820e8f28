"""The optimizer of all parts, and what is trained. Settings of one part alone are in `part_settings`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from everydream_kit.config.declaration import (
    DIFFUSION,
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
)


def _not_dora(form: Any) -> Any:
    if form == "dora":
        raise ValueError("lora_form: must be lora, loha or lokr (got 'dora'); for DoRA set lora_dora to true")
    return form


class OptimizerGroup(Group):
    """Optimizer and what is trained."""

    optimizer: Annotated[
        str | None,
        Knob(
            memory="8-bit states take a quarter of AdamW's 8 bytes a weight",
            when="auto where memory may be plenty; lion8bit or adafactor when it is short",
        ),
        Facts(EVERYTHING, "never", names="Python class that runs as the optimizer"),
    ] = None
    """Optimizer by name (adamw, adamw8bit, pagedadamw8bit, lion, lion8bit, adafactor, prodigy, dadaptadam, dowg ...) or
    `module.Class`. adafactor's lr is relative: it is multiplied by the size of each weight, so 1e-3 and below is usual there.
    By default bitsandbytes' AdamW8bit on a CUDA GPU and fused AdamW elsewhere. `auto` takes fused AdamW on a GPU, too, where
    the run fits with it; the log says what was chosen."""
    optimizer_config: Annotated[
        str | dict[str, Any] | None,
        Knob(when="you have an `optimizer.json` of EveryDream 2"),
        Facts(EVERYTHING, "resume", names="optimizer file, or a Python class in it", holds_path=True),
    ] = None
    """EveryDream 2's `optimizer.json`: a path, or the object itself. What it says becomes the settings here; a setting that
    is given next to it wins."""
    weight_decay: Annotated[
        Decay | None,
        Knob(unit="share per step, times the rate", when="small sets that overfit: more; exact copies: 0"),
        Facts(RESULT, "resume"),
    ] = None
    """Share of each weight that is taken away at each step, times the learning rate. By default 0.01; 0 for sgd, dowg and
    the D-Adaptation kinds, and a `module.Class` has its own."""
    betas: Annotated[
        Betas | None,
        Knob(unit="one number for each average", when="large batches: a smaller second one, 0.99"),
        Facts(RESULT, "resume"),
    ] = None
    """Decay rates of the optimizer's averages, such as `[0.9, 0.999]`; by default the optimizer's own."""
    eps: Annotated[Epsilon | None, Knob(when="tiny gradients in half precision: 1e-6"), Facts(RESULT, "resume")] = None
    """Number added to the optimizer's denominator; by default the optimizer's own, mostly 1e-8."""
    momentum: Annotated[
        Momentum | None,
        Knob(when="with sgd and dadapt_sgd"),
        Facts(MEMORY_AND_RESULT, "resume", optimizer_argument=True),
    ] = None
    """Momentum of sgd (0.9 by default) and dadapt_sgd."""
    d0: Annotated[
        Guess | None,
        Knob(when="an optimizer that finds its own rate starts too slowly"),
        Facts(RESULT, "resume", optimizer_argument=True),
    ] = None
    """First guess of the optimizers that find their own rate (prodigy, dadapt_*)."""
    decouple: Annotated[
        bool | None,
        Knob(when="decay should act through the gradient, and the optimizer offers the choice"),
        Facts(RESULT, "resume", optimizer_argument=True),
    ] = None
    """Decouple weight decay from the gradient, as AdamW does, where the optimizer offers the choice."""
    optimizer_args: Annotated[
        dict[str, Any] | None,
        Knob(when="an optimizer has a setting that has no name here"),
        Facts(EVERYTHING, "resume"),
    ] = None
    """Further keyword arguments of the optimizer's class, such as `{"amsgrad": true}`."""
    clip_grad_norm: Annotated[
        Annotated[float, Field(gt=0)] | None,
        Knob(unit="L2 norm", when="the loss explodes; 1.0 is a common bound"),
        Facts(EVERYTHING, "resume"),
    ] = None
    """Bound on the norm of all gradients together; larger ones are scaled down to it. The log shows the norm
    before clipping."""
    disable_unet_training: Annotated[
        bool,
        Knob(memory="saves its gradients and optimizer state", when="only words should be learned"),
        Facts(EVERYTHING, "never"),
    ] = False
    """Freeze the UNet."""
    disable_textenc_training: Annotated[
        bool,
        Knob(
            basic=True,
            memory="saves its gradients and optimizer state",
            when="memory is short, or the concept needs no new words",
        ),
        Facts(EVERYTHING, "never", families=DIFFUSION),
    ] = False
    """Freeze the text encoder."""
    training_kind: Annotated[
        Literal["full", "lora", "textual_inversion"],
        Knob(basic=True, memory="lora trains about 1 % of the weights", when="small GPU or small file: lora"),
        Facts(EVERYTHING, "never", fsdp2=("full",)),
    ] = "full"
    """Train all weights, a low-rank adapter (LoRA), or only the embeddings of new tokens."""
    lora_rank: Annotated[
        int,
        Field(ge=1, le=1024),
        Knob(memory="grows with it", when="8 to 32 for a person, 64 for a style", step=1),
        Facts(EVERYTHING, "never", kinds=("lora",)),
    ] = 16
    """Rank of the LoRA matrices."""
    lora_alpha: Annotated[
        Annotated[float, Field(gt=0)] | None,
        Knob(when="to change the adapter's strength at a given rank"),
        Facts(RESULT, "never", kinds=("lora",)),
    ] = None
    """Scale of the adapter is lora_alpha / lora_rank; by default lora_rank, that is 1."""
    lora_dropout: Annotated[
        Annotated[float, Field(ge=0, lt=1)],
        Knob(unit="probability", when="a LoRA overfits"),
        Facts(EVERYTHING, "never", kinds=("lora",)),
    ] = 0.0
    """Dropout on the adapter's input."""
    lora_targets: Annotated[
        list[str] | None,
        Knob(when="to train fewer or more layers than the attention projections"),
        Facts(EVERYTHING, "never", kinds=("lora",), names="regular expressions for the adapted layers"),
    ] = None
    """Names or regular expressions of the layers of UNet or transformer that get an adapter; by default attention projections."""
    lora_text_encoder: Annotated[
        bool,
        Knob(when="new words should be learned as well"),
        Facts(EVERYTHING, "never", kinds=("lora",), families=DIFFUSION, refusal="its text encoder is never trained"),
    ] = False
    """Give the text encoders an adapter, too."""
    lora_form: Annotated[
        Annotated[Literal["lora", "loha", "lokr"], BeforeValidator(_not_dora)],
        Knob(when="a LoRA bleeds into other subjects, or learns too little at its size: lokr"),
        Facts(EVERYTHING, "never", kinds=("lora",)),
    ] = "lora"
    """What the adapter is made of: two matrices (LoRA), the elementwise product of two such pairs (LoHa), or a Kronecker
    product (LoKr)."""
    lora_dora: Annotated[
        bool,
        Knob(when="a low rank should come closer to full training; slower"),
        Facts(EVERYTHING, "never", kinds=("lora",)),
    ] = False
    """Weight-decomposed LoRA (DoRA)."""
    new_tokens: Annotated[
        dict[str, str] | None,
        Knob(when="training_kind is textual_inversion"),
        Facts(
            MEMORY_AND_RESULT,
            "never",
            kinds=("textual_inversion",),
            families=DIFFUSION,
            refusal="it learns no new words; train a LoRA",
        ),
    ] = None
    """Textual inversion: `{"<my-cat>": "cat"}`, each new token with the word whose embedding it starts from."""
