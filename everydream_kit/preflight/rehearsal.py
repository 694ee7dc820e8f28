"""A run on tensors without values: every phase is gone through once, and every byte is followed.

What runs is the trainer's own: `assemble_run` builds the run around a skeleton of the model, its learner makes the step.
The images are one batch of the largest bucket. Nothing is read but config files, nothing is written.

Not here: what the numbers mean for a GPU (`memory_estimate`).
"""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from everydream_kit.data.cache_room import MOMENT_CHANNELS
from everydream_kit.data.dataset import FROM_TEXT, Dataset, DatasetBuilder, Defaults
from everydream_kit.data.records import Batch, Draw, MicroBatch, Size, StepBatches
from everydream_kit.models.block_swap import repeated_blocks
from everydream_kit.models.encoding import decode_latents, encode_captions, encode_moments
from everydream_kit.models.family import Sizes, has_large_texts
from everydream_kit.models.lora.injection import lora_parameters, without_chance
from everydream_kit.models.quantized import is_quantized, num_weights
from everydream_kit.models.sampling import guide, is_doubled
from everydream_kit.models.tokenizer import saved_bytes
from everydream_kit.preflight.imitation import imitate_autocast, replace_bitsandbytes
from everydream_kit.preflight.memory_records import CATEGORIES, MemoryEstimate, Phase, Question, SampleShape
from everydream_kit.preflight.skeleton import build_skeleton
from everydream_kit.preflight.tracker import (
    BACKWARD,
    FORWARD,
    OPTIMIZER,
    RECOMPUTED,
    SCRATCH,
    Lives,
    StorageTracker,
)
from everydream_kit.runs import RunFolder
from everydream_kit.training.base_model import (
    choose_formats,
    choose_idle_modules,
    precision_of,
    refuse_float16,
    select_trained,
)
from everydream_kit.training.cuda_graphs import why_eager
from everydream_kit.training.flat_weights import flat_optimizers
from everydream_kit.training.journal import Journal
from everydream_kit.training.kept_gradients import KeptGradients
from everydream_kit.training.ranks import Ranks
from everydream_kit.training.run_builder import assemble_run
from everydream_kit.training.run_snapshot import count_bytes

if TYPE_CHECKING:
    from everydream_kit.config import TrainConfig
    from everydream_kit.models.family import Model
    from everydream_kit.training.run import Run

WEIGHTS, GRADIENTS, STATES, EMA = "weights", "gradients", "optimizer states", "EMA"
HOST, IDLE, IDLE_VAE = "host", "idle weights", "idle VAE"
"""What is in host memory, and what is kept there while steps are made."""
VAE_WEIGHTS, LARGE_TEXTS = "VAE weights", "language model"
"""What stays when the denoiser leaves the device for a large text encoder, and that encoder, which is there for captions only."""
SHARED_GRADIENTS = "shared gradients"
"""What the buffers of flat weights lay their gradients in; it is there all the time, as the states are."""
CACHED_TOGETHER = {"disk": 4, "memory": 1}
"""Crops that are encoded together: before the run, or next to everything that it holds."""
FIRST_UPDATE = "first update"
"""Phase of the launches that no later update has."""
RECOMPUTED_COSTS = 2.7
"""Launches that one counts as which gradient checkpointing repeats: Python packs and unpacks what it saves. Fitted to the one
figure with checkpointing in docs/gpu.md."""
CAPTION_TOKENS = 100
"""Of a caption as captioning models write them; where the encoder pads to more, a caption has those."""
CAPTION = "a photo of a cat, sitting, by the window"
ALLOCATOR_GRANULE = 512
"""Bytes that torch's CUDA allocator rounds a tensor's size up to (c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize)."""


def rehearse(asked: Question) -> MemoryEstimate:
    """Go through a run. The estimate's allowance is left to whoever knows the device."""
    device_type, latents, bucket = asked.device, asked.latents, asked.bucket
    tracker = StorageTracker(granule=ALLOCATOR_GRANULE if device_type == "cuda" else 1)
    dataset = asked.dataset or stand_in_dataset(asked.config, bucket)
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        logdir = stack.enter_context(tempfile.TemporaryDirectory())
        config = _as_on(device_type, asked.has_bf16, asked.config)
        # with the settings as they were asked for: the answer to a GPU without bfloat16 is another than to `amp_dtype fp16`
        refuse_float16(asked.config, asked.architecture.files.family, precision_of(config, device_type))
        model = build_skeleton(asked.architecture, choose_formats(config, precision_of(config, device_type)))
        select_trained(model, config, config.seed)  # on meta: adapters are drawn at random
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(tracker)
        _materialise(model, tracker)
        if device_type == "cuda":
            imitate_autocast(model.modules().values())
        run = _assemble(config, model, dataset, Path(logdir), device_type, tracker)
        _keep_gradients(run, tracker, device_type)
        _label_waiting(model, tracker, HOST if device_type != "cpu" else WEIGHTS)
        without_chance(model.denoiser)
        idle = choose_idle_modules(
            config,
            model,
            run.journal,
            device_type=device_type,
            latents_cached=latents != "off",
            texts_known=asked.texts_known,
        )
        _label_idle(model, idle, tracker)
        channels = model.family.latent_space.stored_channels
        batch = make_batch(bucket, run.plan_settings.batch_size, with_moments=latents != "off", channels=channels)
        text_bytes, text_flops = 0, 0
        if has_large_texts(model.family) and model.text_encoders[0] in idle:
            text_bytes, text_flops = _rehearse_texts(run, tracker)
        if latents != "off":
            _rehearse_caching(run, tracker, bucket, CACHED_TOGETHER[latents])
        num_micro_batches = _rehearse_step(run, tracker, batch)
        copied_bytes = 0 if model.block_swap is None else model.block_swap.copied_bytes
        if asked.validates is not None:
            _rehearse_validation(run, tracker, make_batch(bucket, asked.validates, with_moments=False))
        if asked.samples is not None:
            _rehearse_sampling(run, tracker, asked.samples, averaged=config.ema_sample_ema_model)
        estimate = _conclude(asked, run, tracker, num_micro_batches, copied_bytes)
        return replace(estimate, text_bytes=text_bytes, text_flops=text_flops)


def _as_on(device_type: str, has_bf16: bool, config: TrainConfig) -> TrainConfig:
    """The settings with the format of mixed precision that a GPU of this kind leads to."""
    if device_type == "cpu" or config.amp_dtype != "auto" or config.weight_dtype != "float32":
        return config
    return config.replace(amp_dtype="bf16" if has_bf16 else "fp16")


@contextmanager
def _quiet() -> Iterator[None]:
    """Libraries' notes about how the real run's modules are used: the real run makes them again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def stand_in_dataset(config: TrainConfig, bucket: Size) -> Dataset:
    """A dataset of one image that need not exist."""
    builder = DatasetBuilder(["."])
    builder.add("image.png", width=bucket[0], height=bucket[1], caption=CAPTION, caption_kind=FROM_TEXT)
    return builder.build(Defaults(shuffle_tags=config.shuffle_tags, keep_tags=config.keep_tags))


def _materialise(model: Model, tracker: StorageTracker) -> None:
    """Put fake tensors in the place of meta ones, and follow their gradients."""
    for module in model.modules().values():
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    values = torch.empty(parameter.shape, dtype=parameter.dtype)
                    fake = torch.nn.Parameter(values, parameter.requires_grad)
                    part._parameters[name] = fake
                    _follow_gradient(fake, tracker)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
        tracker.label([*module.parameters(), *module.buffers()], WEIGHTS)


def _follow_gradient(parameter: torch.nn.Parameter, tracker: StorageTracker) -> None:
    """Before the optimizer's own hook, which may drop the gradient at once."""

    def label(owner: torch.Tensor) -> None:
        if owner.grad is not None:
            tracker.label([owner.grad], GRADIENTS, unless=SHARED_GRADIENTS)

    if parameter.requires_grad:
        parameter.register_post_accumulate_grad_hook(label)


def _assemble(  # noqa: PLR0917 - what a run is made of, each once
    config: TrainConfig,
    model: Model,
    dataset: Dataset,
    logdir: Path,
    device_type: str,
    tracker: StorageTracker,
) -> Run:
    """The run as `assemble_run` makes it, but for what needs files, values or a driver."""
    changes: dict[str, Any] = {"cache_latents": "off", "ema_resume_model": None, "torch_compile": False}
    folder = RunFolder(logdir)
    with tracker.births_are(EMA):
        run = assemble_run(
            config.replace(**changes),
            folder,
            Journal(folder, writes=False),
            Ranks(0, 1, torch.device("cpu")),
            model=model,
            dataset=dataset,
            seed=max(0, config.seed),
            device_type=device_type,
            encodes_ahead=False,
        )
    learner = run.learner
    for flat in flat_optimizers(learner.optimizer):
        tracker.label(flat.weights, WEIGHTS)
        tracker.label(flat.gradients, SHARED_GRADIENTS)
    # a scaler's memory is a few numbers, and whether it lets a step happen depends on values that do not exist here
    learner.precision = replace(learner.precision, device_type="cpu", scaler=None)
    learner.updates_in_backward = False  # the optimizer's hooks stay; only the look at losses that have no values goes
    replace_bitsandbytes(learner.optimizer, tracker, HOST, device_type=device_type)
    if learner.ema is not None and device_type != "cpu" and config.ema_device == "cpu":
        tracker.label(learner.ema.averages, HOST)
    return run


def _keep_gradients(run: Run, tracker: StorageTracker, device_type: str) -> None:
    """Where passes would be captured: gradients that are there all the time."""
    learner = run.learner
    if run.config.cuda_graphs == "off" or why_eager(run.config, learner.model, learner.ranks, device_type) is not None:
        return
    for flat in flat_optimizers(learner.optimizer):
        tracker.label(flat.gradients, SCRATCH)  # gone before the first step
    learner.kept_gradients = KeptGradients(learner.optimizer)
    for parameter in learner.parameters():
        parameter.grad = torch.zeros_like(parameter)
    learner.kept_gradients.clear()
    tracker.label(learner.kept_gradients.buffers, SHARED_GRADIENTS)


def _label_idle(model: Model, idle: list[torch.nn.Module], tracker: StorageTracker) -> None:
    """Say of weights which of them are on the device at which time."""
    tracker.label(model.vae.parameters(), VAE_WEIGHTS)
    for module in idle:
        kind = LARGE_TEXTS if has_large_texts(model.family) else IDLE
        weights = [*module.parameters(), *(module.buffers() if is_quantized(module) else ())]
        tracker.label(weights, IDLE_VAE if module is model.vae else kind)


def _label_waiting(model: Model, tracker: StorageTracker, where: str) -> None:
    """Say of blocks that wait in host memory where they wait, and that what comes to the device is weights."""
    if model.block_swap is not None:
        tracker.label(model.block_swap.host_buffers, where)
        model.block_swap.watch = lambda buffer: tracker.label([buffer], WEIGHTS)


def make_batch(bucket: Size, batch_size: int, *, with_moments: bool, channels: int = MOMENT_CHANNELS) -> Batch:
    """A batch of gray images of one bucket, or of their cached latents of so many channels."""
    width, height = bucket
    return Batch(
        planned=MicroBatch(0, 0, 0, bucket, (Draw(0, 0),) * batch_size),
        captions=[f"{CAPTION} {number}" for number in range(batch_size)],
        loss_scale=torch.ones(batch_size),
        pixels=None if with_moments else torch.zeros(batch_size, 3, height, width, dtype=torch.uint8),
        moments=torch.zeros(batch_size, channels, height // 8, width // 8) if with_moments else None,
        mask=None,
        original_sizes=[bucket] * batch_size,
        crop_top_lefts=[(0, 0)] * batch_size,
        paths=["image.png"] * batch_size,
    )


def _rehearse_texts(run: Run, tracker: StorageTracker) -> tuple[int, int]:
    """Captions are encoded one by one, while the denoiser is in host memory. Returns what one takes on disk, and the
    operations that it takes."""
    with tracker.stretch("text caching") as stretch, torch.no_grad(), run.learner.precision.autocast():
        encoded = encode_captions(run.learner.model, [CAPTION], run.config.clip_skip)
    states, pooled = encoded.encoder_hidden_states, 0 if encoded.pooled is None else encoded.pooled.numel()
    longer = max(1.0, CAPTION_TOKENS / states.shape[1])
    num_bytes = round(2 * (longer * states.numel() + pooled))  # in bfloat16
    return num_bytes, round(longer * stretch.flops)


def _rehearse_caching(run: Run, tracker: StorageTracker, bucket: Size, num_together: int) -> None:
    with tracker.stretch("latent caching"):
        encode_moments(run.learner.model, torch.zeros(num_together, 3, bucket[1], bucket[0], dtype=torch.uint8))


def _rehearse_step(run: Run, tracker: StorageTracker, batch: Batch) -> int:
    """One optimizer step; of many micro-batches two, since those after it are like the second. Returns how many."""
    num = min(2, run.config.grad_accum)
    work = StepBatches(0, 0, 1, num * len(batch.paths), num * len(batch.paths), [batch] * num)
    with tracker.stretch("training step"):
        run.learner.set_learning_rates(0)
        for _ in range(num):
            run.learner.backward(batch, work, 0)
        with tracker.births_are(SCRATCH), tracker.phase(FIRST_UPDATE):
            run.learner.update_weights(0)
        if run.learner.ema is not None:
            run.learner.ema.update(1)
        tracker.label(_states(run), STATES, unless=HOST)
        for flat in flat_optimizers(run.learner.optimizer):
            tracker.label(flat.weights, WEIGHTS)  # new ones where the first update took unused parameters out
    tracker.record.named("training step").launches[OPTIMIZER] = _launches_of_update(run, tracker)
    return num


def _launches_of_update(run: Run, tracker: StorageTracker) -> int:
    """Of every update but the first, which creates the states; it does not belong to the memory's trace."""
    stays = run.learner.kept_gradients is not None
    for parameter in () if stays else run.learner.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with tracker.stretch("update") as stretch:
        run.learner.update_weights(1)
    for parameter in () if stays else run.learner.parameters():
        parameter.grad = None  # where steps are made within the backward pass, the update leaves them
    tracker.record.stretches.pop()
    return stretch.launches.total()


def _states(run: Run) -> list[torch.Tensor]:
    """The optimizer's tensors, but for those that were given another place."""
    return [leaf for leaf in tree_leaves(list(run.learner.optimizer.state.values())) if isinstance(leaf, torch.Tensor)]


def _rehearse_validation(run: Run, tracker: StorageTracker, batch: Batch) -> None:
    """As `measure_loss` does it: pixels, the whole model on the device, no gradients."""
    work = StepBatches(0, 0, 1, len(batch.paths), len(batch.paths), [batch])
    with tracker.stretch("validation"), torch.no_grad(), run.sync.full_model():
        run.learner.image_losses(batch, work)


def _rehearse_sampling(run: Run, tracker: StorageTracker, samples: SampleShape, *, averaged: bool) -> None:
    """One denoising step with guidance and the decoding, as `sample_images` does them."""
    model, (width, height) = run.learner.model, samples.size
    num, clip_skip = samples.num_images, run.config.clip_skip
    if has_large_texts(model.family):  # before, and remembered
        run.learner.encode_captions(["", CAPTION])
    with (
        tracker.stretch("sampling"),
        torch.no_grad(),
        run.learner.averaged_weights() if averaged else nullcontext(),
        run.learner.precision.autocast(keep_casts=False),
    ):
        latents = torch.zeros(num, *model.family.latent_space.shape(model, width, height))
        texts = ["", CAPTION]
        has_cache = has_large_texts(model.family)
        encoded = run.learner.encode_captions(texts) if has_cache else encode_captions(model, texts, clip_skip)
        doubled = is_doubled(model.family)
        conditioning = encoded.rows([0] * num + [1] * num if doubled else [1] * num)
        noisy = torch.cat([latents, latents]) if doubled else latents
        sizes = Sizes.uncropped(width, height, len(noisy))
        prediction = model.family.predict(model, noisy, torch.zeros(len(noisy)).long(), conditioning, sizes)
        if doubled:
            negative, positive = prediction.chunk(2)
            prediction = guide(negative, positive, torch.ones(num, 1, 1, 1))
            del negative, positive
        latents = prediction
        del prediction, noisy, conditioning, encoded
        decode_latents(model, latents)


def _conclude(
    asked: Question, run: Run, tracker: StorageTracker, num_micro_batches: int, copied_bytes: int
) -> MemoryEstimate:
    """Phases from the trace, and what is written."""
    config, learner, model = asked.config, run.learner, run.learner.model
    modules = model.modules().values()
    states = _count(learner.optimizer.state.values())
    trained = count_bytes(learner.trained_weights())
    is_full, has_ema = config.training_kind == "full", learner.ema is not None
    whole = sum(_count(module.state_dict()) for module in modules) if is_full else trained
    averages = 0 if learner.ema is None else _count(learner.ema.averages)
    lives, standing = tracker.record, Counter(tracker.alive())
    phases = _phases(asked, lives)
    has_graphs = learner.kept_gradients is not None
    stays = {name: standing[name] for name in (WEIGHTS, VAE_WEIGHTS, STATES, EMA)}
    if has_graphs:
        stays[SHARED_GRADIENTS] = standing[SHARED_GRADIENTS]
    swapped = averages if config.ema_device != "cpu" or asked.device == "cpu" else 0
    phases.append(_phase("saving", {**stays, "other": swapped}))
    if has_graphs:
        phases = _next_to_graphs(phases)
    snapshot = trained + states + (trained + averages if has_ema else 0)  # of a save in the background
    host = sum(standing[name] for name in (HOST, IDLE, IDLE_VAE, LARGE_TEXTS)) + snapshot
    if any(stretch.name == "text caching" for stretch in lives.stretches):
        host = max(host, standing[WEIGHTS] + standing[HOST])
    training = lives.named("training step")
    return MemoryEstimate(
        phases=tuple(phases),
        allowance_bytes=0,
        step_flops=training.flops * config.grad_accum // num_micro_batches,
        num_trained_parameters=sum(part.num_parameters for part in learner.parts),
        num_parameters=sum(map(num_weights, modules)),
        weight_bytes_written=2 * whole if has_ema else whole,
        state_bytes_written=states + averages,
        side_bytes_written=_side_bytes(model) * (2 if has_ema else 1) if is_full else 0,
        host_bytes=host,
        pass_launches=_launches_of_passes(training.launches) * config.grad_accum // num_micro_batches,
        update_launches=training.launches[OPTIMIZER],
        copied_bytes=copied_bytes * config.grad_accum // num_micro_batches,
        num_blocks=len(repeated_blocks(model.denoiser, model.family.denoiser.blocks)),
        num_file_parameters=_num_in_single_file(model),
        family=model.family.name,
    )


def _phases(asked: Question, lives: Lives) -> list[Phase]:
    """Each stretch of the trace at its worst moment, without what is not on the device then."""
    phases = []
    for stretch in lives.stretches:
        caching = stretch.name == "latent caching"
        before_run = caching and asked.latents == "disk"
        never = [HOST, LARGE_TEXTS, *([EMA, GRADIENTS, SHARED_GRADIENTS] if before_run else [IDLE] if caching else [])]
        if stretch.name == "training step":
            never += [IDLE, IDLE_VAE]
        if stretch.name == "text caching":  # before the run, while the denoiser waits in host memory
            absent = [WEIGHTS, EMA, GRADIENTS, SHARED_GRADIENTS, HOST, IDLE_VAE]
            phases.append(_phase(stretch.name, lives.peak(stretch, never=absent).by_category))
            continue
        peak = lives.peak(stretch, always=() if before_run else (STATES, SHARED_GRADIENTS), never=never)
        if before_run:
            peak.by_category.pop(STATES, None)
        phases.append(_phase(stretch.name, peak.by_category))
    return phases


def _next_to_graphs(phases: Sequence[Phase]) -> list[Phase]:
    """Phases with the memory that captured passes hold: a pass's activations, next to whatever is eager.

    That is the training step too, where a further shape's first passes come while another's graph is there.
    """
    step = next(phase for phase in phases if phase.name == "training step")
    pool = sum(step.by_category.get(name, 0) for name in ("activations", "other"))
    return [
        phase
        if phase.name.endswith("caching")
        else _phase(phase.name, {**phase.by_category, "activations": phase.by_category.get("activations", 0) + pool})
        for phase in phases
    ]


def _launches_of_passes(launches: Counter[str]) -> int:
    return launches[FORWARD] + launches[BACKWARD] + round(RECOMPUTED_COSTS * launches[RECOMPUTED])


def _phase(name: str, by_category: dict[str, int]) -> Phase:
    """A phase under the public categories: what waited and came back is weights again."""
    kinds = dict.fromkeys((IDLE, IDLE_VAE, LARGE_TEXTS, VAE_WEIGHTS), WEIGHTS)
    public = {**kinds, SHARED_GRADIENTS: GRADIENTS}
    named = dict.fromkeys(CATEGORIES, 0)
    for category, num_bytes in by_category.items():
        named[public.get(category, category)] += num_bytes
    return Phase(name, sum(named.values()), {key: value for key, value in named.items() if value})


def _num_in_single_file(model: Model) -> int:
    """Numbers in a single file of the model, into which an adapter is merged: the components that apps load from it."""
    layout, modules = model.family.layout, model.modules()
    held = modules if layout.holds_all else (model.family.denoiser.folder, *layout.also_holds)
    return sum(num_weights(modules[name]) for name in held) - sum(one.numel() for one in lora_parameters(model))


HEADER_BYTES = 120
"""Of one tensor in a safetensors file's header: name, format, shape and place."""


def _side_bytes(model: Model) -> int:
    """What a whole model's folder holds next to weights, and what counts where a model is small: headers, tokenizers."""
    num_tensors = sum(len(module.state_dict()) for module in model.modules().values())
    return HEADER_BYTES * num_tensors + sum(map(saved_bytes, model.tokenizers))


def _count(values: Any) -> int:
    """Bytes of the different tensors in nested containers."""
    leaves = tree_leaves(values if isinstance(values, dict) else list(values))
    tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}
    return sum(tensor.nbytes for tensor in tensors.values())
