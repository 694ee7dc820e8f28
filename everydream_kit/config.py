"""Every parameter of a training run, declared once.

A parameter is one annotated field: name, type, range and default in the line, its effect in the docstring below,
and a `Knob` with what else a person wants to know. The command line, the JSON file, the widget form,
`docs/parameters.md` and the error messages are all made from these declarations (`params.py` walks them); adding a
parameter is one edit here.

Groups are mixin classes: seen from outside a `TrainConfig` is flat (`TrainConfig(lr=1e-6)`, `--lr 1e-6`,
`"lr": 1e-6`), and the class that declares a field is its group. A config is frozen; values derived from it (total
steps, the resolved seed) live on the run.

Not here: reading them from files and flags (`settings`).
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from everydream_kit.errors import ConfigError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

VERSION = 1
"""Of the saved file's layout. `settings.load_config` upgrades older files."""


@dataclass(frozen=True)
class Knob:
    """What a form and the reference page say about a parameter beside its effect.

    Attributes:
        basic: shown unfolded in the form.
        unit: unit of the value, in words.
        memory: what it costs or saves in device memory.
        when: when to change it.
        step: sensible increment for a slider.
        log: a slider for it should be logarithmic.
    """

    basic: bool = False
    unit: str = ""
    memory: str = "none"
    when: str = ""
    step: float | None = None
    log: bool = False


class Group(BaseModel):
    """A heading under which parameters are declared: frozen, strict, and closed to unknown names."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


Share = Annotated[float, Field(ge=0, le=1)]
Resolution = Annotated[int, Field(ge=64, le=2048, multiple_of=8)]


class BaseModelGroup(Group):
    """Base model: what is fine-tuned."""

    resume_ckpt: Annotated[
        str,
        Field(min_length=1),
        Knob(basic=True, memory="the model's own size", when="always: it is the model you start from"),
    ]
    """Base model: a diffusers folder, a `.safetensors` or `.ckpt` file, a Hugging Face Hub id, or `findlast` for the
    newest checkpoint of this project. `embedded` is the small model that ships with the kit."""
    base_revision: Annotated[str | None, Knob(when="to pin a Hub model to a commit, tag or branch")] = None
    """Branch, tag or commit of a Hub model."""
    base_subfolder: Annotated[str | None, Knob(when="the Hub repository holds several models")] = None
    """Folder of a Hub repository that holds the diffusers model."""
    base_variant: Annotated[str | None, Knob(when="only the half-precision files are wanted: `fp16`")] = None
    """Variant of the weight files of a Hub model, such as `fp16`."""
    family: Annotated[
        Literal["sd1", "sd2", "sdxl"] | None, Knob(when="the file's own keys mislead; normally never")
    ] = None
    """Model family. Recognised from the files unless given."""
    prediction_type: Annotated[
        Literal["epsilon", "v_prediction", "sample"] | None,
        Knob(when="a single file does not say that it is a v-prediction model"),
    ] = None
    """What the UNet predicts. Recognised from the files unless given."""
    vae: Annotated[str | None, Knob(when="a single file holds no VAE, or another VAE is to go with the model")] = None
    """VAE to use in place of the base's own, or where a single file holds none: its file, or a diffusers folder."""
    clip_skip: Annotated[
        int,
        Field(ge=0, le=4),
        Knob(basic=True, unit="layers", when="an SD 1 base was trained so, as many anime models were: 2"),
    ] = 0
    """Which hidden layer of the text encoder is used, counted from the end: 0 and 1 are the last, 2 the penultimate, with
    the final layer norm. SD 2's encoder ends at the layer that it was trained with, the penultimate of the original, so 0 is
    right there. SDXL takes its penultimate layers without the norm: 0 to 2 all mean that, 3 and 4 go deeper.
    Use the same value when sampling with the result."""


class DataGroup(Group):
    """Data: which pictures and how they are cut."""

    data_root: Annotated[
        str | list[str] | dict[str, Any],
        Knob(basic=True, when="always: the folder with your captioned pictures"),
    ] = "input"
    """Dataset: a folder, a `.json` index, a `.zip` or `.tar` archive, a Hub dataset id, a list of these, or EveryDream 2's
    `{"resolver": "multi", ...}`."""
    resolution: Annotated[
        Resolution | Annotated[list[Resolution], Field(min_length=1)],
        Knob(
            basic=True,
            unit="pixels",
            memory="activations grow with its square",
            when="match the base: 512 for SD 1.x, 768 for SD 2.x-v, 1024 for SDXL; lower it to save memory",
            step=64,
        ),
    ] = 512
    """Area class: every bucket holds about resolution² pixels at its own aspect ratio. Several values train each picture
    in every class that it is big enough for."""
    batch_size: Annotated[
        Annotated[int, Field(ge=1, le=4096)] | Literal["auto"],
        Knob(
            basic=True,
            unit="pictures",
            memory="activations grow with it",
            when="as large as the card allows, up to about 8; `auto` takes the largest that fits",
            step=1,
        ),
    ] = 2
    """Pictures that go through the model together (on each process). `auto` foretells the memory before anything is loaded
    and takes the largest number, up to 16 on a GPU and 4 on a CPU, that leaves 7 % free; the run's `config.json` holds the
    number, so a resumed run takes the same."""
    flip_p: Annotated[
        Share,
        Knob(basic=True, unit="probability", when="0.5 for styles; not for faces or captions with left and right"),
    ] = 0.0
    """Probability that a picture is mirrored left to right. A folder's or picture's own `flip_p` wins."""
    crop_jitter: Annotated[
        Annotated[float, Field(ge=0, le=0.25)],
        Knob(unit="fraction of the side", when="0 for pictures whose borders matter"),
    ] = 0.02
    """Up to this share of each side is trimmed at random before resizing, where the picture is larger than its bucket."""
    background: Annotated[
        str,
        Field(pattern=r"^#[0-9a-fA-F]{6}$"),
        Knob(unit="#rrggbb", when="transparent pictures should stand on another colour"),
    ] = "#ffffff"
    """Colour put behind transparent pictures."""
    loss_mask: Annotated[Literal["off", "file", "alpha"], Knob(when="only a part of each picture should be learnt")] = (
        "off"
    )
    """Weigh the loss by a mask: `file` reads `name.mask.png` beside `name.png` (white counts, black does not), `alpha` takes
    the picture's own transparency."""
    num_workers: Annotated[
        Annotated[int, Field(ge=0, le=64)] | None,
        Knob(unit="processes", memory="host memory only", when="the log says that the loader is slower than the model"),
    ] = None
    """Loader processes. By default as many as help: none with latents in memory, else up to the number of cores less one, at
    most 8. The number changes no result."""
    cache_latents: Annotated[
        Literal["auto", "off", "memory", "disk"],
        Knob(when="`off` for very large datasets that are seen once", memory="saves the VAE's share of each step"),
    ] = "auto"
    """Encode the pictures once instead of at every step: in memory when a crop is drawn for the first time, on disk before
    the run, for later runs too. `auto` uses memory if the latents fit in a quarter of it, then disk if they fit in half of what
    is free, else off."""
    cache_variants: Annotated[
        int,
        Field(ge=1, le=64),
        Knob(unit="crops for each picture", when="more keeps more of the crop jitter, and takes more room", step=1),
    ] = 4
    """Crop variants kept for each picture in the latent cache (twice as many where it may be flipped)."""
    latent_cache_dir: Annotated[str | None, Knob(when="the default disk is small or slow")] = None
    """Where the disk cache lives; by default `.edk_cache` beside the run folders."""
    rated_dataset: Annotated[bool, Knob(when="pictures carry ratings and the best should be seen more")] = False
    """Draw fewer of the low-rated pictures as epochs go by (weighted sampling without replacement)."""
    rated_dataset_target_dropout_percent: Annotated[
        int, Field(ge=0, le=100), Knob(unit="percent", when="with rated_dataset")
    ] = 50
    """Share of pictures left out by the last epoch, with `rated_dataset`."""
    write_schedule: Annotated[bool, Knob(when="to see exactly which pictures form which batch")] = False
    """Write `ep<N>_batch_schedule.txt` into the run folder for every epoch."""


class CaptionGroup(Group):
    """Captions: what the text encoder reads."""

    cond_dropout: Annotated[
        Share,
        Knob(
            basic=True, unit="share of captions", when="0.1 to 0.15 pushes a style harder; above 0.26 bleeds", step=0.01
        ),
    ] = 0.04
    """Share of captions that are replaced by the empty prompt, so that guidance keeps working."""
    shuffle_tags: Annotated[bool, Knob(basic=True, when="captions are lists of comma-separated tags")] = False
    """Shuffle the tags after the first comma, differently for every picture and epoch."""
    keep_tags: Annotated[
        int, Field(ge=0, le=100), Knob(unit="tags", when="the first tags are trigger words", step=1)
    ] = 0
    """This many tags after the main prompt stay in place when shuffling."""
    caption_lines: Annotated[
        Literal["join", "choose"], Knob(when="each line of a .txt is a caption of its own: `choose`")
    ] = "join"
    """A caption file with several lines: `join` makes one caption of them, `choose` draws one line per epoch."""


class LengthGroup(Group):
    """Length and learning rate."""

    max_epochs: Annotated[
        int,
        Field(ge=1, le=1_000_000),
        Knob(basic=True, unit="epochs", when="watch the samples; 30 to 100 are common", step=1),
    ] = 300
    """Times that the whole dataset is seen."""
    max_steps: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Knob(unit="optimizer steps", when="a fixed budget matters more than whole epochs"),
    ] = None
    """Stop after this many optimizer steps, if the epochs have not ended before."""
    grad_accum: Annotated[
        int,
        Field(ge=1, le=4096),
        Knob(basic=True, unit="micro-batches", memory="none beyond 2", when="the wished batch does not fit", step=1),
    ] = 1
    """Micro-batches whose gradients are averaged into one optimizer step."""
    lr: Annotated[
        Annotated[float, Field(gt=0, le=1)],
        Knob(
            basic=True,
            unit="per optimizer step",
            when="2e-6 to 5e-6 at 512 px and batch 6-8 on SD 1.x; halve it at 768",
            log=True,
        ),
    ] = 1e-6
    """Peak learning rate of the UNet, and of the text encoder where the optimizer config gives it none of its own."""
    lr_scheduler: Annotated[
        Literal["constant", "linear", "cosine", "polynomial"], Knob(basic=True, when="cosine with a 25-50 % higher lr")
    ] = "constant"
    """Course of the learning rate over the run."""
    lr_warmup_steps: Annotated[
        Annotated[int, Field(ge=0)] | None, Knob(unit="optimizer steps", when="training from scratch wants more")
    ] = None
    """Steps in which the learning rate rises from 0; by default 2 % of the decay steps. `constant` has none unless given."""
    lr_decay_steps: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Knob(unit="optimizer steps", when="the rate should reach zero sooner or later"),
    ] = None
    """Steps until the schedule reaches zero; by default 1.5 × all steps, so cosine ends near a quarter of lr."""
    scale_lr: Annotated[bool, Knob(when="batch_size and grad_accum change often")] = False
    """Multiply the learning rate by (batch_size × grad_accum)^0.55. The rate used is logged."""
    seed: Annotated[
        int,
        Field(ge=-1, le=2**31 - 1),
        Knob(basic=True, when="keep it to compare settings; -1 for a new one each time", step=1),
    ] = 555
    """Address of every random draw of the run. -1 draws one and logs it."""


class OptimizerGroup(Group):
    """Optimizer and what is trained."""

    optimizer: Annotated[
        str | None,
        Knob(
            memory="8-bit states take a quarter of AdamW's 8 bytes a weight",
            when="adamw8bit on a GPU, adamw elsewhere; lion8bit or adafactor when memory is short",
        ),
    ] = None
    """Optimizer by name (adamw, adamw8bit, pagedadamw8bit, lion, lion8bit, adafactor, prodigy, dadaptadam, dowg ...) or
    `module.Class`. adafactor's lr is relative: it is multiplied by the size of each weight, so 1e-3 and below is usual there.
    By default bitsandbytes' AdamW8bit on a CUDA GPU and fused AdamW elsewhere. `optimizer_config` says more."""
    optimizer_config: Annotated[
        str | dict[str, Any] | None, Knob(when="the text encoder needs its own rate, or layers should be frozen")
    ] = None
    """EveryDream 2's `optimizer.json`: a path, or the object itself. Separate text-encoder settings and freezing live there."""
    clip_grad_norm: Annotated[
        Annotated[float, Field(gt=0)] | None, Knob(unit="L2 norm", when="the loss explodes; 1.0 is a common bound")
    ] = None
    """Bound on the norm of all gradients together; larger ones are scaled down to it. The log shows the norm before it."""
    disable_unet_training: Annotated[
        bool, Knob(memory="saves its gradients and optimizer state", when="only words should be learnt")
    ] = False
    """Freeze the UNet."""
    disable_textenc_training: Annotated[
        bool,
        Knob(
            basic=True,
            memory="saves its gradients and optimizer state",
            when="memory is short, or the concept needs no new words",
        ),
    ] = False
    """Freeze the text encoder."""
    training_kind: Annotated[
        Literal["full", "lora", "textual_inversion"],
        Knob(basic=True, memory="lora trains about 1 % of the weights", when="small card or small file: lora"),
    ] = "full"
    """Train all weights, a low-rank adapter (LoRA), or only the embeddings of new tokens."""
    lora_rank: Annotated[
        int, Field(ge=1, le=1024), Knob(memory="grows with it", when="8 to 32 for a person, 64 for a style", step=1)
    ] = 16
    """Rank of the LoRA matrices."""
    lora_alpha: Annotated[
        Annotated[float, Field(gt=0)] | None, Knob(when="to change the adapter's strength at a given rank")
    ] = None
    """Scale of the adapter is lora_alpha / lora_rank; by default lora_rank, that is 1."""
    lora_dropout: Annotated[Annotated[float, Field(ge=0, lt=1)], Knob(unit="probability", when="a LoRA overfits")] = 0.0
    """Dropout on the adapter's input."""
    lora_targets: Annotated[
        list[str] | None, Knob(when="to train fewer or more layers than the attention projections")
    ] = None
    """Names or regular expressions of the UNet layers that get an adapter; by default attention projections."""
    lora_text_encoder: Annotated[bool, Knob(when="new words should be learnt as well")] = False
    """Give the text encoders an adapter, too."""
    lora_dora: Annotated[bool, Knob(when="a low rank should come closer to full training; slower")] = False
    """Weight-decomposed LoRA (DoRA)."""
    new_tokens: Annotated[dict[str, str] | None, Knob(when="training_kind is textual_inversion")] = None
    """Textual inversion: `{"<my-cat>": "cat"}`, each new token with the word whose embedding it starts from."""


class ObjectiveGroup(Group):
    """Objective: what the loss asks for."""

    loss_type: Annotated[
        Literal["mse", "huber", "mse_huber", "huber_mse"],
        Knob(when="outliers dominate the loss; docs/training-objective.md shows the curves"),
    ] = "mse"
    """Plain squared error, Huber (delta 1), or a mix that goes over with the timestep: `mse_huber` is MSE at high noise and
    Huber at low noise, `huber_mse` the reverse."""
    min_snr_gamma: Annotated[
        Annotated[float, Field(gt=0)] | None, Knob(when="faster convergence on larger sets: 5")
    ] = None
    """Min-SNR weighting (arXiv 2303.09556): min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v-prediction."""
    debiased_estimation: Annotated[bool, Knob(when="instead of min_snr_gamma, for epsilon models")] = False
    """Weigh by 1 / sqrt(SNR) (arXiv 2310.08442), bounded."""
    enable_zero_terminal_snr: Annotated[bool, Knob(when="a v-prediction model should reach true black and white")] = (
        False
    )
    """Rescale the noise schedule to zero terminal SNR (arXiv 2305.08891). Needs a v-prediction model."""
    zero_frequency_noise_ratio: Annotated[
        Annotated[float, Field(ge=0, le=1)], Knob(when="dark and bright pictures: 0.02 to 0.1")
    ] = 0.0
    """Offset noise: this share of a constant per picture and channel is added to the noise."""
    pyramid_noise_discount: Annotated[
        Annotated[float, Field(gt=0, lt=1)] | None, Knob(when="richer contrast: 0.03 as EveryDream 2 ships it")
    ] = None
    """Multi-resolution noise: each coarser level is added with this factor to the power of its level."""
    input_perturbation: Annotated[Annotated[float, Field(ge=0, le=1)], Knob(when="small sets that overfit: 0.1")] = 0.0
    """Extra noise on the UNet's input only (arXiv 2301.11706)."""
    embedding_perturbation: Annotated[
        Annotated[float, Field(ge=0, le=100)], Knob(when="captions are memorised: 1.0")
    ] = 0.0
    """Noise on the text embeddings, gamma / sqrt(dim) (arXiv 2405.20494)."""
    timestep_start: Annotated[
        int, Field(ge=0, le=999), Knob(unit="timesteps", when="only coarse structure should be trained")
    ] = 0
    """First noise level that is trained on."""
    timestep_end: Annotated[
        int, Field(ge=1, le=1000), Knob(unit="timesteps", when="only fine detail should be trained")
    ] = 1000
    """Noise levels from here on are not trained on."""
    timestep_sampling: Annotated[
        Literal["uniform", "logit_normal", "stratified"],
        Knob(when="stratified for a calmer loss; logit_normal favours the middle"),
    ] = "uniform"
    """How timesteps are drawn. Stratified spreads the pictures of one optimizer step evenly over the range."""
    train_sampler: Annotated[Literal["ddpm", "pndm", "ddim"], Knob(when="never: all three add noise alike")] = "ddpm"
    """Kept for EveryDream 2's files: the noise schedule is the model's own in every case."""


class PrecisionGroup(Group):
    """Precision and memory."""

    amp: Annotated[bool, Knob(memory="halves the activations", when="off only to hunt numerical trouble")] = True
    """Automatic mixed precision on a GPU: bfloat16 where it has it, else float16 with a gradient scaler. On a CPU see
    `amp_dtype`."""
    disable_amp: Annotated[bool, Knob(memory="doubles the activations", when="EveryDream 2's name for amp off")] = False
    """Train in plain float32; the same as `amp: false`."""
    amp_dtype: Annotated[
        Literal["auto", "bf16", "fp16"], Knob(when="to force a format; bf16 pays on a CPU from 256 px on")
    ] = "auto"
    """Format of mixed precision. `auto` chooses by the GPU, and means float32 on a CPU."""
    weight_dtype: Annotated[
        Literal["float32", "bfloat16"],
        Knob(memory="bfloat16 halves weights and gradients", when="a card too small by a third"),
    ] = "float32"
    """Format of the trained weights. bfloat16 weights are updated with stochastic rounding."""
    frozen_dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"],
        Knob(memory="a half-precision base takes half", when="to compare with a float32 base"),
    ] = "auto"
    """Format of the parts that are not trained: the base of a LoRA, a frozen text encoder. `auto` is the format of mixed
    precision on a GPU (float16 or bfloat16), which leaves the numbers as they are, and float32 on a CPU. The VAE stays
    float32. In full training, `auto` keeps a frozen part as precise as its file, since checkpoints hold it too."""
    gradient_checkpointing: Annotated[
        bool,
        Knob(basic=True, memory="saves most of the activations", when="out of memory; costs about a quarter in speed"),
    ] = False
    """Recompute activations in the backward pass instead of keeping them."""
    fused_backward: Annotated[bool, Knob(memory="saves the gradients", when="memory is short and grad_accum is 1")] = (
        False
    )
    """Step the optimizer for each parameter inside the backward pass, so that gradients are never all alive."""
    offload_idle_models: Annotated[
        bool, Knob(memory="saves the VAE and frozen text encoders", when="memory is short; costs a little time")
    ] = False
    """Keep the VAE and frozen text encoders in host memory while they are not needed."""
    channels_last: Annotated[bool, Knob(when="a GPU with tensor cores; often a few percent faster")] = False
    """Keep convolution weights in channels-last order."""
    torch_compile: Annotated[bool, Knob(when="long runs on a GPU; minutes of compiling first")] = False
    """Compile the UNet's blocks with torch.compile, shapes dynamic."""
    attn_type: Annotated[Literal["sdp", "slice", "xformers"], Knob(when="slice when even one picture does not fit")] = (
        "sdp"
    )
    """Attention: torch's own, or sliced to save memory. `xformers` is taken as `sdp`, with a warning."""
    gpuid: Annotated[int, Field(ge=0, le=63), Knob(when="the machine has several GPUs and one should be used")] = 0
    """Number of the GPU of a single-process run."""
    parallel: Annotated[
        Literal["ddp", "fsdp2"],
        Knob(
            memory="fsdp2 divides weights, gradients and optimizer state by the number of processes",
            when="several GPUs, and the model with its optimizer does not fit on one of them: fsdp2; slower",
        ),
    ] = "ddp"
    """What several processes (`accelerate launch`, `torchrun`) have: `ddp` the whole model each, `fsdp2` a slice of it."""


class EmaGroup(Group):
    """EMA: a slowly moving average of the weights."""

    ema_decay_rate: Annotated[
        Annotated[float, Field(gt=0, lt=1)] | None,
        Knob(memory="a second copy of the trained weights", when="0.99 to 0.9999; smooths long runs"),
    ] = None
    """Share of the average that stays at each update, the first included: n updates leave ema_decay_rate^n of the starting
    weights. None and no strength target: EMA is off."""
    ema_strength_target: Annotated[
        Annotated[float, Field(gt=0, lt=1)] | None, Knob(when="instead of ema_decay_rate: 0.1")
    ] = None
    """Share of the starting weights that is left in the average after the whole run; the decay rate is computed from it."""
    ema_update_interval: Annotated[
        int, Field(ge=1), Knob(unit="optimizer steps", when="1 is exact; more is cheaper", step=1)
    ] = 500
    """Optimizer steps between updates of the average."""
    ema_device: Annotated[str, Knob(memory="`cpu` costs none of the GPU's", when="cuda is faster if there is room")] = (
        "cpu"
    )
    """Where the average lives: cpu or cuda."""
    ema_sample_ema_model: Annotated[bool, Knob(when="EMA is on")] = False
    """Draw the samples with the averaged weights."""
    ema_sample_nonema_model: Annotated[bool, Knob(when="EMA is on and both should be seen")] = False
    """Draw samples with the live weights as well."""
    ema_resume_model: Annotated[str | None, Knob(when="continuing an EveryDream 2 run with EMA")] = None
    """Checkpoint from which the average starts; `findlast` for the newest EMA checkpoint."""


class SampleGroup(Group):
    """Samples: pictures drawn while training."""

    sample_steps: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Knob(basic=True, unit="optimizer steps", when="small sets want them more often", step=1),
    ] = 250
    """Steps between sample pictures. None: never."""
    sample_prompts: Annotated[str, Knob(basic=True, when="always: prompts that show what you teach")] = (
        "sample_prompts.txt"
    )
    """File of prompts: one per line, or a JSON object with cfgs, scheduler, seeds and sizes. It may be edited
    while a run trains; a mistake in it is a warning."""
    sample_before_training: Annotated[bool, Knob(when="to see the base model's own pictures first")] = False
    """Draw samples before step 0, too."""


class ValidationGroup(Group):
    """Validation: loss on pictures that are not trained on."""

    validation_config: Annotated[str | dict[str, Any] | None, Knob(when="from 50 pictures on, to see overfitting")] = (
        None
    )
    """EveryDream 2's `validation_default.json`: a path, or the object itself. None: no validation."""
    early_stopping_patience: Annotated[
        Annotated[int, Field(ge=1)] | None, Knob(unit="validations", when="unattended runs")
    ] = None
    """Stop when the validation loss has not improved for this many validations."""


class SavingGroup(Group):
    """Saving: checkpoints."""

    project_name: Annotated[
        str,
        Field(pattern=r"^[^/\\:*?\"<>|\x00-\x1f]{1,100}$"),
        Knob(basic=True, when="always: it names the run folder and checkpoints"),
    ] = "myproj"
    """Names runs and checkpoints."""
    run_name: Annotated[str | None, Knob(when="Weights & Biases should show another name")] = None
    """Name of the run for Weights & Biases; by default the run folder's."""
    logdir: Annotated[str, Knob(basic=True, when="another disk should hold the run folders")] = "logs"
    """Folder that holds the run folders: logs, samples and checkpoints in diffusers form."""
    save_ckpt_dir: Annotated[
        str | None, Knob(basic=True, when="single files should land in your image app's models folder")
    ] = None
    """Folder for single-file `.safetensors` checkpoints; by default the working folder."""
    ckpt_every_n_minutes: Annotated[
        Annotated[float, Field(gt=0)] | None,
        Knob(basic=True, unit="minutes", when="how much work you can bear to lose", step=1),
    ] = None
    """Save every so many minutes; 20 where no other rule of saving is given."""
    save_every_n_epochs: Annotated[
        Annotated[int, Field(ge=1)] | None, Knob(basic=True, unit="epochs", when="to compare epochs later", step=1)
    ] = None
    """Save at the end of every n-th epoch."""
    save_every_n_steps: Annotated[
        Annotated[int, Field(ge=1)] | None, Knob(unit="optimizer steps", when="epochs are very long", step=1)
    ] = None
    """Save every so many optimizer steps."""
    save_ckpts_from_n_epochs: Annotated[
        int, Field(ge=0), Knob(unit="epochs", when="early checkpoints are of no use", step=1)
    ] = 0
    """No saving by epoch before this one."""
    keep_last_n: Annotated[
        Annotated[int, Field(ge=1)] | None, Knob(unit="checkpoints", when="disk is short", step=1)
    ] = None
    """Keep only the latest checkpoints, with their single files; the best and the last stay in any case."""
    save_full_precision: Annotated[bool, Knob(when="the file will be trained on further")] = False
    """Single files in float32 instead of float16."""
    save_optimizer: Annotated[bool, Knob(when="every checkpoint should be resumable, not only the newest")] = False
    """Keep the optimizer state in every checkpoint. The newest has it in any case."""
    no_save_ckpt: Annotated[bool, Knob(when="the diffusers folders are enough")] = False
    """Write no single files."""
    no_prepend_last: Annotated[bool, Knob(when="file names should not begin with `last-`")] = False
    """Name the final checkpoint like all others."""
    push_to: Annotated[str | None, Knob(when="the machine may go away")] = None
    """Hub repository (`me/jets`) that checkpoints are uploaded to while training."""
    push_every: Annotated[
        Annotated[int, Field(ge=1)] | None, Knob(unit="checkpoints", when="uploads are slow", step=1)
    ] = None
    """Upload every n-th checkpoint to `push_to`, with its resume state; by default only the last."""


class LoggingGroup(Group):
    """Watching and extending."""

    log_step: Annotated[
        int, Field(ge=1), Knob(unit="optimizer steps", when="rarely: it costs next to nothing", step=1)
    ] = 25
    """Steps between points in the log."""
    wandb: Annotated[bool, Knob(when="you use Weights & Biases")] = False
    """Log to Weights & Biases as well (needs the `wandb` extra)."""
    plugins: Annotated[list[str], Knob(when="you write Python")] = []
    """Listeners, as `module.Class`, with EveryDream 2's hook names."""
    load_settings_every_epoch: Annotated[bool, Knob(when="to steer a running training")] = False
    """Re-read the live settings (`live.json` in the run folder: lr_factor, sample_steps, sample_prompts, save intervals) at each
    epoch's start."""


GROUPS: tuple[type[Group], ...] = (
    BaseModelGroup,
    DataGroup,
    CaptionGroup,
    LengthGroup,
    OptimizerGroup,
    ObjectiveGroup,
    PrecisionGroup,
    EmaGroup,
    SampleGroup,
    ValidationGroup,
    SavingGroup,
    LoggingGroup,
)

PENDING: frozenset[str] = frozenset()
"""Declared, and not working yet in this version: accepted at their defaults only."""


class TrainConfig(
    BaseModelGroup,
    DataGroup,
    CaptionGroup,
    LengthGroup,
    OptimizerGroup,
    ObjectiveGroup,
    PrecisionGroup,
    EmaGroup,
    SampleGroup,
    ValidationGroup,
    SavingGroup,
    LoggingGroup,
):
    """All settings of one training run. See `docs/parameters.md` for each.

    Raises:
        ConfigError: from the constructor, with every problem on a line of its own.
    """

    def __init__(self, **values: Any) -> None:
        unknown = [name for name in values if name not in type(self).model_fields]
        problems = [_unknown_name(name) for name in unknown]
        try:
            super().__init__(**{name: value for name, value in values.items() if name not in unknown})
        except ValidationError as error:
            problems.append(_describe(error))
        if problems:
            raise ConfigError("\n".join(problems))

    @model_validator(mode="after")
    def _check_combinations(self) -> TrainConfig:
        problems = list(_combination_problems(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Area classes, ascending, each once."""
        values = self.resolution if isinstance(self.resolution, list) else [self.resolution]
        return tuple(sorted(set(values)))

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with some settings changed, validated as a whole."""
        kept = {name: getattr(self, name) for name in self.model_fields_set}
        return TrainConfig(**{**kept, **changes})

    def to_json(self) -> str:
        """The file form: flat, every parameter, with the layout's version. `load_config` reads it back.

        `given` lists what was said rather than left at its default: `optimizer_config` fills in what was not said.
        """
        head = {"version": VERSION, "given": sorted(self.model_fields_set)}
        return json.dumps({**head, **self.model_dump(mode="json")}, indent=2, ensure_ascii=False)


RETIRED: dict[str, str] = {
    "useadam8bit": "optimizer (adamw8bit is the default on a GPU)",
    "lowvram": "gradient_checkpointing and offload_idle_models",
    "ed1_mode": "nothing: captions and buckets are always read the same way",
    "notebook": "nothing: progress adapts to where it runs",
    "xformers": "nothing: torch's own attention is used",
    "disable_xformers": "nothing: torch's own attention is used",
    "cache_dir": "HF_HOME, the Hugging Face Hub's own setting",
    "config": "nothing: a file cannot name another",
    "mixed_precision": "amp and amp_dtype",
    "shuffle_captions": "shuffle_tags",
    "text_encoder_lr_scale": "text_encoder_overrides.lr in optimizer_config",
    "hf_repo_subfolder": "base_subfolder",
    "lr_end": "lr_decay_steps",
    "debug_invert_min_snr_gamma": "nothing: the weighting follows the prediction type",
    "validate_every_n_epochs": "every_n_epochs in validation_config",
}
"""EveryDream 2 names that have gone out of use, with what replaces them. They load with a warning."""


OTHER_TRAINERS: dict[str, str] = {
    "pretrained_model_name_or_path": "resume_ckpt",
    "instance_data_dir": "data_root",
    "train_data_dir": "data_root",
    "output_dir": "logdir",
    "learning_rate": "lr",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accum",
    "num_train_epochs": "max_epochs",
    "max_train_epochs": "max_epochs",
    "max_train_steps": "max_steps",
    "max_grad_norm": "clip_grad_norm",
    "mixed_precision": "amp_dtype",
    "use_8bit_adam": "optimizer",
    "optimizer_type": "optimizer",
    "snr_gamma": "min_snr_gamma",
    "noise_offset": "zero_frequency_noise_ratio",
    "multires_noise_discount": "pyramid_noise_discount",
    "caption_dropout_rate": "cond_dropout",
    "shuffle_caption": "shuffle_tags",
    "network_dim": "lora_rank",
    "rank": "lora_rank",
    "network_alpha": "lora_alpha",
    "hub_model_id": "push_to",
}
"""Names of diffusers' example scripts and of sd-scripts that look like none of ours, or like another one."""

IN_OPTIMIZER_CONFIG: dict[str, str] = {
    "weight_decay": "base.weight_decay",
    "adam_weight_decay": "base.weight_decay",
    "betas": "base.betas",
    "adam_beta1": "base.betas",
    "adam_beta2": "base.betas",
    "epsilon": "base.epsilon",
    "eps": "base.epsilon",
    "adam_epsilon": "base.epsilon",
    "momentum": "base.momentum",
    "d0": "base.d0",
    "decouple": "base.decouple",
    "optimizer_args": "base.kwargs",
    "optimizer_kwargs": "base.kwargs",
    "unet_lr": "unet_overrides.lr",
    "text_encoder_lr": "text_encoder_overrides.lr",
    "text_encoder_learning_rate": "text_encoder_overrides.lr",
    "te_lr": "text_encoder_overrides.lr",
    "freeze_embeddings": "text_encoder_freezing.freeze_embeddings",
    "unfreeze_last_n_layers": "text_encoder_freezing.unfreeze_last_n_layers",
}
"""Names that people look for among the settings, and that stand in the file or object that `optimizer_config` gives."""


def nearest_name(name: str) -> str | None:
    """The parameter that this name means in other trainers, or looks most like; None if it means nothing."""
    if name.lower() in OTHER_TRAINERS:
        return OTHER_TRAINERS[name.lower()]
    matches = difflib.get_close_matches(name.lower(), list(TrainConfig.model_fields), n=1, cutoff=0.6)
    return matches[0] if matches else None


def _unknown_name(name: str) -> str:
    if name in RETIRED:
        return f"{name}: no longer used; replaced by {RETIRED[name]}."
    if name.lower() in IN_OPTIMIZER_CONFIG:
        return f"{name}: unknown setting; give {IN_OPTIMIZER_CONFIG[name.lower()]} in optimizer_config"
    near = nearest_name(name)
    return f"{name}: unknown setting" + (
        f"; did you mean {near}?" if near else ". `everydream train --help` lists them all."
    )


def _describe(error: ValidationError) -> str:
    """Pydantic's errors, one a line: the name, the rule, the value."""
    lines: dict[str, None] = {}
    by_name: dict[str, list[ErrorDetails]] = {}
    for problem in error.errors():
        if problem["type"] == "value_error":
            lines[str(problem["ctx"]["error"])] = None
        else:
            by_name.setdefault(str(problem["loc"][0]), []).append(problem)
    for name, problems in by_name.items():
        if problems[0]["type"] == "missing":
            lines[f"{name}: required, and not given"] = None
        else:
            lines[_of_the_branch_meant(name, problems)] = None
    return "\n".join(lines)


def _of_the_branch_meant(name: str, problems: list[ErrorDetails]) -> str:
    """A value of a union is wrong for each branch: the branch whose kind it has speaks, or, if it has none, all together."""
    inside = [problem for problem in problems if len(problem["loc"]) > 2]  # of an entry of a list
    of_its_kind = [
        problem for problem in problems if not problem["type"].endswith(("_type", "_parsing", "literal_error"))
    ]
    if inside or of_its_kind:
        return value_problem(name, (inside or of_its_kind)[0])
    wanted = " or ".join(dict.fromkeys(problem["msg"].removeprefix("Input should be ") for problem in problems))
    return f"{name}: must be {wanted} (got {problems[0]['input']!r})"


def value_problem(name: str, problem: ErrorDetails) -> str:
    """One of pydantic's errors about a value in our words: the name, the rule, the value."""
    message = problem["msg"].replace("Input should be", "must be").replace("Value should", "must")
    return f"{name}: {message} (got {problem['input']!r})"


def mixes_precision(config: TrainConfig) -> bool:
    """Whether mixed precision is on."""
    return config.amp and not config.disable_amp


def frozen_in_half(config: TrainConfig) -> bool:
    """Whether frozen weights were asked for in half precision."""
    return config.frozen_dtype in ("float16", "bfloat16")


def _combination_problems(config: TrainConfig) -> list[str]:
    """Rules about two settings; each names both and the cure."""
    c = config
    problems = []
    if c.timestep_start >= c.timestep_end:
        problems.append(
            f"timestep_start, timestep_end: the start must be below the end (got {c.timestep_start} and {c.timestep_end})"
        )
    if c.disable_unet_training and c.disable_textenc_training:
        problems.append("disable_unet_training, disable_textenc_training: nothing is left to train; switch one off")
    if c.ema_decay_rate is not None and c.ema_strength_target is not None:
        problems.append("ema_decay_rate, ema_strength_target: give one of them, the other follows")
    if c.min_snr_gamma is not None and c.debiased_estimation:
        problems.append("min_snr_gamma, debiased_estimation: two weightings of the same thing; give one of them")
    if c.fused_backward and (c.grad_accum > 1 or c.clip_grad_norm is not None):
        problems.append(
            "fused_backward: steps inside the backward pass, so it works without grad_accum and clip_grad_norm only; "
            "set grad_accum to 1 and clip_grad_norm to none, or fused_backward off"
        )
    if frozen_in_half(c) and c.weight_dtype == "float32" and not mixes_precision(c):
        problems.append(
            f"frozen_dtype, amp: frozen weights in {c.frozen_dtype} need mixed precision; set frozen_dtype to auto, or amp on"
        )
    if c.parallel == "fsdp2":
        problems += _sharding_problems(c)
    if c.training_kind == "textual_inversion" and not c.new_tokens:
        problems.append('new_tokens: textual_inversion needs at least one, for instance {"<my-cat>": "cat"}')
    if c.push_every is not None and c.push_to is None:
        problems.append("push_every, push_to: name the Hub repository in push_to, or leave push_every out")
    if c.early_stopping_patience is not None and c.validation_config is None:
        problems.append(
            "early_stopping_patience, validation_config: early stopping needs validation; give a validation_config"
        )
    default = TrainConfig.model_fields
    problems += [
        f"{name}: this version of EveryDream Kit does not have it yet; leave it at {default[name].default!r}"
        for name in sorted(PENDING)
        if getattr(c, name) != default[name].default
    ]
    return problems


def _sharding_problems(c: TrainConfig) -> list[str]:
    """What does not work on the slices of a model."""
    clashes = {
        "training_kind": c.training_kind != "full",
        "weight_dtype": c.weight_dtype != "float32",
        "frozen_dtype": frozen_in_half(c),
        "amp_dtype": c.amp_dtype == "fp16" and c.amp and not c.disable_amp,
        "ema_decay_rate": c.ema_decay_rate is not None,
        "ema_strength_target": c.ema_strength_target is not None,
        "fused_backward": c.fused_backward,
        "channels_last": c.channels_last,
        "torch_compile": c.torch_compile,
    }
    return [
        f"parallel, {name}: fsdp2 does not work with {name} {getattr(c, name)}; set it to "
        f"{json.dumps(TrainConfig.model_fields[name].default)}, or parallel to ddp"
        for name, clash in clashes.items()
        if clash
    ]


def config_warnings(config: TrainConfig) -> list[str]:
    """Settings that are allowed, and probably not what is wanted, or without effect beside the others."""
    c = config
    warnings = []
    if c.cond_dropout > 0.26:
        warnings.append(f"cond_dropout {c.cond_dropout}: above 0.26 most models bleed and overfit.")
    if c.lr_scheduler == "constant" and c.lr_decay_steps is not None:
        warnings.append("lr_decay_steps: has no effect with lr_scheduler constant.")
    if c.keep_tags and not c.shuffle_tags:
        warnings.append(
            "keep_tags: has an effect only where tags are shuffled (shuffle_tags, or a folder's own setting)."
        )
    if c.attn_type == "xformers":
        warnings.append("attn_type xformers: torch's own attention (sdp) is used instead; it is as fast.")
    if c.train_sampler != "ddpm":
        warnings.append(
            f"train_sampler {c.train_sampler}: the model's own noise schedule is used; all samplers add noise alike."
        )
    if (c.ema_sample_ema_model or c.ema_sample_nonema_model) and not c.ema_decay_rate and not c.ema_strength_target:
        warnings.append(
            "ema_sample_ema_model, ema_sample_nonema_model: EMA is off; give ema_decay_rate or ema_strength_target."
        )
    if c.training_kind == "full" and frozen_in_half(c):
        warnings.append(
            f"frozen_dtype {c.frozen_dtype}: checkpoints hold what is not trained in {c.frozen_dtype} too; auto keeps the "
            "precision of the base."
        )
    return warnings
