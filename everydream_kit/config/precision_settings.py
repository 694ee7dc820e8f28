"""Precision, memory, and the moving average of the weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from everydream_kit.config.declaration import (
    DIFFUSION,
    EVERYTHING,
    FLOW,
    MEMORY,
    MEMORY_AND_RESULT,
    MEMORY_AND_SPEED,
    NOTHING,
    RESULT,
    SPEED,
    SPEED_AND_RESULT,
    Facts,
    Group,
    Knob,
)


class PrecisionGroup(Group):
    """Precision and memory."""

    amp: Annotated[
        bool,
        Knob(memory="halves the activations", when="off only to hunt numerical trouble"),
        Facts(EVERYTHING, "resume"),
    ] = True
    """Automatic mixed precision on a GPU: bfloat16 where it has it, else float16 with a gradient scaler. On a CPU see
    `amp_dtype`."""
    disable_amp: Annotated[
        bool,
        Knob(memory="doubles the activations", when="EveryDream 2's name for amp off"),
        Facts(EVERYTHING, "resume"),
    ] = False
    """Train in plain float32; the same as `amp: false`."""
    amp_dtype: Annotated[
        Literal["auto", "bf16", "fp16"],
        Knob(when="to force a format; bf16 pays on a CPU from 256 px on"),
        Facts(EVERYTHING, "resume", needs=("amp",), unless=("disable_amp",), fsdp2=("auto", "bf16")),
    ] = "auto"
    """Format of mixed precision. `auto` chooses by the GPU, and means float32 on a CPU."""
    apply_grad_scaler_step_tweaks: Annotated[
        bool,
        Knob(when="float16 runs that lose steps to overflows: off"),
        Facts(RESULT, "resume", needs=("amp",), unless=("disable_amp",)),
    ] = True
    """Float16 only: raise the loss scale more and more slowly as the run continues."""
    weight_dtype: Annotated[
        Literal["float32", "bfloat16"],
        Knob(
            memory="bfloat16 halves weights and gradients",
            when="the GPU has about two thirds of the memory that is needed",
        ),
        Facts(EVERYTHING, "resume", fsdp2=("float32",)),
    ] = "float32"
    """Format of the trained weights. bfloat16 weights are updated with stochastic rounding."""
    frozen_dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"],
        Knob(memory="a half-precision base takes half", when="to compare with a float32 base"),
        Facts(EVERYTHING, "resume", fsdp2=("auto", "float32")),
    ] = "auto"
    """Format of the parts that are not trained: the base of a LoRA, a frozen text encoder. `auto` is the format of mixed
    precision on a GPU (float16 or bfloat16), which leaves the numbers as they are, and float32 on a CPU. The VAE stays
    float32. In full training, `auto` keeps a frozen part as precise as its file, since checkpoints hold it too."""
    quantization: Annotated[
        Literal["none", "fp8", "int8", "nf4"],
        Knob(
            memory="fp8 and int8 halve the base of a LoRA, nf4 takes it to 28 %",
            when="a LoRA of a large transformer does not fit: int8 first",
        ),
        Facts(EVERYTHING, "resume", kinds=("lora", "textual_inversion"), fsdp2=("none",)),
    ] = "none"
    """Keep the frozen UNet or transformer beneath a LoRA, DoRA, LoHa, LoKr or new tokens in 8 or 4 bits: the linear layers of its
    repeated blocks. Norms, embedders, modulation and convolutions keep `frozen_dtype`, text encoders and VAE theirs. `fp8` is
    e4m3 and `int8` integers, both with a scale for each row; `nf4` needs bitsandbytes, which the kit installs. Weights are
    dequantized to the format of mixed precision at each use, so GPUs without fp8 arithmetic can train, too, and steps take
    longer. Checkpoints hold the adapter alone; merging and export take the base as its files have it."""
    text_quantization: Annotated[
        Literal["none", "fp8", "int8", "nf4"],
        Knob(
            memory="as `quantization`, of a language model that encodes captions",
            when="encoding captions takes more memory than the steps of a LoRA",
        ),
        Facts(
            EVERYTHING,
            "resume",
            kinds=("lora",),
            families=FLOW,
            refusal="it is for language models; CLIP's text encoders are small",
            fsdp2=("none",),
        ),
    ] = "none"
    """Keep a language model that encodes the captions of a LoRA (Qwen3 or Qwen-VL, T5 of FLUX.1) in 8 or 4 bits, as
    `quantization` does with the transformer. Captions are then encoded slightly differently than by apps that sample with the
    original."""
    gradient_checkpointing: Annotated[
        bool,
        Knob(basic=True, memory="saves most of the activations", when="out of memory; costs about a quarter in speed"),
        Facts(MEMORY_AND_SPEED, "resume"),
    ] = False
    """Recompute activations in the backward pass instead of keeping them."""
    checkpointing_share: Annotated[
        float,
        Field(gt=0, le=1),
        Knob(
            memory="0.5 saves most of what 1 does",
            when="gradient_checkpointing leaves memory unused: lower is faster",
            step=0.1,
        ),
        Facts(MEMORY_AND_SPEED, "resume", needs=("gradient_checkpointing",)),
    ] = 1.0
    """Share of the denoiser's blocks that are recomputed, with `gradient_checkpointing`; starting with those that save the most
    memory for the time that they take. Below 1, text encoders keep their activations."""
    fused_backward: Annotated[
        bool,
        Knob(memory="saves the gradients", when="memory is short and grad_accum is 1"),
        Facts(MEMORY_AND_SPEED, "resume", fsdp2=(False,)),
    ] = False
    """Step the optimizer for each parameter inside the backward pass, so that gradients never exist all at once."""
    flat_weights: Annotated[
        Literal["auto", "on", "off"],
        Knob(memory="up to 512 MiB for gradients side by side", when="a GPU run misbehaves: off, to compare"),
        Facts(MEMORY_AND_SPEED, "resume", fsdp2=("auto", "off")),
    ] = "auto"
    """Keep the trained weights in a few large buffers, so that an optimizer's update takes a few kernels instead of hundreds.
    `auto` does so on a GPU. It has no effect on optimizers that need each tensor's shape, paged optimizers, bfloat16 weights and
    `fused_backward`. Before the run, a few small updates are compared with separate ones; where a number differs, the weights
    stay separate, with a warning."""
    cuda_graphs: Annotated[
        Literal["off", "on"],
        Knob(memory="keeps all gradients, and activations a second time", when="a fast GPU that waits for its host"),
        Facts(MEMORY_AND_SPEED, "resume", fsdp2=("off",)),
    ] = "off"
    """Capture forward and backward once for each shape of batch, and replay them without the host. Off until a GPU has shown what
    it gains. The first three steps of a shape run eagerly, and so do shapes beyond the eighth. Needs one NVIDIA GPU, and no
    dropout, plug-ins, `fused_backward` or `torch_compile`."""
    offload_idle_models: Annotated[
        bool,
        Knob(memory="saves the VAE and frozen text encoders", when="memory is short; costs a little time"),
        Facts(MEMORY_AND_SPEED, "resume"),
    ] = False
    """Keep the VAE and frozen text encoders in host memory while they are not needed."""
    blocks_to_swap: Annotated[
        Annotated[int, Field(ge=0, le=1000)] | Literal["auto"],
        Knob(
            memory="saves their weights, which are in host memory",
            when="a LoRA's base does not fit, with gradient_checkpointing on; costs time for copying",
        ),
        Facts(MEMORY_AND_SPEED, "resume", fsdp2=(0,)),
    ] = 0
    """Number of the denoiser's blocks that are kept in host memory, each copied to the GPU one block ahead of its use. Works
    where the base is frozen: a LoRA in any form, or textual inversion. Losses and weights stay the same. `auto` takes as few as
    the memory requires. Full training is refused: every block changes at every step, and would have to be copied back."""
    speed: Annotated[
        Literal["manual", "auto"],
        Knob(when="runs of hours: auto measures for a few seconds what is fastest here"),
        Facts(SPEED, "resume", fsdp2=("manual",)),
    ] = "manual"
    """Whether `channels_last`, `cuda_graphs` and `torch_compile` are as set, or `auto`: chosen among those that are off by a
    short measurement at the start of a run of at least 2,000 forward and backward passes. What gives other losses or gradients
    than plain passes, fails, does not fit the memory or saves less than 3 % is not chosen. The choice is logged and goes into
    the run's settings, so a resumed run keeps it."""
    channels_last: Annotated[
        bool,
        Knob(when="a GPU with tensor cores; often a few percent faster"),
        Facts(MEMORY_AND_SPEED, "resume", fsdp2=(False,)),
    ] = False
    """Keep convolution weights in channels-last order."""
    torch_compile: Annotated[
        bool,
        Knob(when="long runs on a GPU; minutes of compiling first"),
        Facts(MEMORY_AND_SPEED, "resume", fsdp2=(False,)),
    ] = False
    """Compile the denoiser's blocks with torch.compile, shapes dynamic."""
    attn_type: Annotated[
        Literal["sdp", "slice", "xformers"],
        Knob(when="slice when even one image does not fit"),
        Facts(
            MEMORY_AND_SPEED,
            "resume",
            families=DIFFUSION,
            refusal="transformers have torch's own attention only; lower batch_size to save memory",
        ),
    ] = "sdp"
    """Attention: torch's own, or sliced to save memory. `xformers` is taken as `sdp`, with a warning."""
    gpuid: Annotated[
        int,
        Field(ge=0, le=63),
        Knob(when="the machine has several GPUs and one should be used"),
        Facts(NOTHING, "resume"),
    ] = 0
    """Index of the GPU of a single-process run."""
    parallel: Annotated[
        Literal["ddp", "fsdp2"],
        Knob(
            memory="fsdp2 divides weights, gradients and optimizer state by the number of processes",
            when="several GPUs, and the model with its optimizer does not fit on one of them: fsdp2; slower",
        ),
        Facts(MEMORY_AND_SPEED, "resume"),
    ] = "ddp"
    """How several processes (`accelerate launch`, `torchrun`) share the model: `ddp` replicates it, `fsdp2` shards it."""


class EmaGroup(Group):
    """EMA: a slowly moving average of the weights."""

    ema_decay_rate: Annotated[
        Annotated[float, Field(gt=0, lt=1)] | None,
        Knob(memory="a second copy of the trained weights", when="0.99 to 0.9999; smooths long runs"),
        Facts(MEMORY_AND_RESULT, "resume", fsdp2=(None,)),
    ] = None
    """Share of the average that stays at each update, the first included: n updates leave ema_decay_rate^n of the starting
    weights. None and no strength target: EMA is off."""
    ema_strength_target: Annotated[
        Annotated[float, Field(gt=0, lt=1)] | None,
        Knob(when="instead of ema_decay_rate: 0.1"),
        Facts(MEMORY_AND_RESULT, "resume", fsdp2=(None,)),
    ] = None
    """Share of the starting weights that is left in the average after the whole run; the decay rate is computed from it."""
    ema_update_interval: Annotated[
        int,
        Field(ge=1),
        Knob(unit="optimizer steps", when="1 is exact; more is cheaper", step=1),
        Facts(SPEED_AND_RESULT, "resume", needs=("ema_decay_rate", "ema_strength_target")),
    ] = 500
    """Optimizer steps between updates of the average."""
    ema_device: Annotated[
        str,
        Knob(memory="`cpu` costs none of the GPU's", when="cuda is faster if it fits"),
        Facts(
            MEMORY_AND_SPEED,
            "resume",
            needs=("ema_decay_rate", "ema_strength_target"),
            names="device of the averaged weights",
        ),
    ] = "cpu"
    """Device of the averaged weights: cpu or cuda."""
    ema_sample_ema_model: Annotated[
        bool, Knob(when="EMA is on"), Facts(MEMORY, "resume", needs=("ema_decay_rate", "ema_strength_target"))
    ] = False
    """Generate the samples with the averaged weights."""
    ema_sample_nonema_model: Annotated[
        bool,
        Knob(when="EMA is on and both should be seen"),
        Facts(MEMORY, "resume", needs=("ema_decay_rate", "ema_strength_target")),
    ] = False
    """Generate samples with the live weights as well."""
    ema_resume_model: Annotated[
        str | None,
        Knob(when="continuing an EveryDream 2 run with EMA"),
        Facts(
            RESULT,
            "resume",
            needs=("ema_decay_rate", "ema_strength_target"),
            names="checkpoint that the average starts from",
            holds_path=True,
        ),
    ] = None
    """Checkpoint from which the average starts; `findlast` for the latest EMA checkpoint."""
