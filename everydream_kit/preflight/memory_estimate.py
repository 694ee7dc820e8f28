"""How much memory a run needs, estimated without a GPU and without weights.

`estimate_memory` lets the trainer go through its phases on tensors without values (`rehearsal`), takes each phase's
worst moment, and adds a stated allowance for what no tensor stands for: the driver's context and the allocator's gaps,
or on a CPU the process. The answer is kept on disk by everything that it depends on, so asking again costs nothing.

A number here is a prediction. `benchmarks/memory_model.py` shows how near it is on a CPU; `probe` measures on a real
GPU.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everydream_kit.atomic import write_atomic
from everydream_kit.config import wants_auto_optimizer
from everydream_kit.data.records import Size
from everydream_kit.errors import ConfigError, KitError
from everydream_kit.strict_json import read_json

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Sequence

    from everydream_kit.config import TrainConfig
    from everydream_kit.data.cache_room import CacheMode
    from everydream_kit.data.dataset import Dataset
    from everydream_kit.preflight.rehearsal import Rehearsal, SampleShape
    from everydream_kit.preflight.skeleton import Architecture

VERSION = 9
"""Of the method: raised where the same settings would now give other numbers."""

DEFAULT_CONTEXT_BYTES = 600 * 2**20
"""CUDA's context with torch's kernels loaded, and the workspaces of cuBLAS and cuDNN: 300 to 800 MiB are seen on common
GPUs."""
DEFAULT_FRAGMENTATION = 0.05
"""Share of what is allocated that lies in gaps of the caching allocator at the worst moment."""

PROCESS_BYTES = 600 * 2**20
"""On a CPU: Python with torch and diffusers loaded, and what their kernels keep for the next time: 440 to 570 MB next
to the tensors were measured (docs/experiments.md)."""

RECOMPUTED_COSTS = 2.7
"""Launches that one counts as which gradient checkpointing repeats: Python packs and unpacks what it saves. Fitted to the one
figure with checkpointing in docs/gpu.md."""

CATEGORIES = ("weights", "gradients", "optimizer states", "activations", "EMA", "other")
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "bitsandbytes", "pytorch_optimizer", "everydream-kit")

KEY_HAS_OTHERWISE = frozenset(
    {"resume_ckpt", "resolution", "shuffle_tags", "ema_decay_rate", "ema_strength_target", "sample_steps"}
    | {"sample_prompts", "optimizer_config", "validation_config", "validation_split_mode", "validation_batch_size"}
    | {
        "validation_extra_data_roots",
        "stabilize_training_loss",
        "sample_cfgs",
        "sample_resolution",
        "sample_batch_size",
    }
)
"""Settings that affect the memory and stand in the key in another form: what the base is made of, the bucket, whether
captions vary, whether an average is kept, the shapes of samples and of validation."""


@dataclass(frozen=True)
class Phase:
    """One phase of a run at its worst moment.

    Attributes:
        name: "text caching", "latent caching", "training step", "validation", "sampling" or "saving".
        peak_bytes: alive on the device at that moment.
        by_category: of these, by `CATEGORIES`.
    """

    name: str
    peak_bytes: int
    by_category: dict[str, int]


@dataclass(frozen=True)
class MemoryEstimate:
    """What a run needs.

    Attributes:
        phases: in the order in which a run meets them.
        allowance_bytes: context and fragmentation of the GPU; on a CPU the process itself.
        step_flops: floating-point operations of one optimizer step, all of its micro-batches.
        num_trained_parameters, num_parameters: numbers, not tensors.
        weight_bytes_written: the weights of one checkpoint, the averaged ones of an EMA included.
        state_bytes_written: its resume state.
        side_bytes_written: what its folders hold next to weights: tokenizers and headers.
        host_bytes: host memory that the run takes next to a GPU's: paged states, averages and modules that are kept
            there, and the copy that is written in the background. On a CPU only the copy, which is made where there is
            space for it.
        pass_launches: kernels that the forward and backward passes of one optimizer step launch, all micro-batches
            together.
        update_launches: kernels that its update launches. Both are weighed by what each costs the host.
        copied_bytes: of blocks that wait in host memory, to the device, in one optimizer step.
        num_blocks: blocks of the denoiser that could wait there.
    """

    phases: tuple[Phase, ...]
    allowance_bytes: int
    step_flops: int
    num_trained_parameters: int
    num_parameters: int
    weight_bytes_written: int
    state_bytes_written: int
    host_bytes: int = 0
    pass_launches: int = 0
    update_launches: int = 0
    side_bytes_written: int = 0
    copied_bytes: int = 0
    num_blocks: int = 0

    @property
    def worst(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        """What the device must have: the greatest phase and the allowance."""
        return self.worst.peak_bytes + self.allowance_bytes

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "phases": [asdict(phase) for phase in self.phases], "peak_bytes": self.peak_bytes}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> MemoryEstimate:
        kept = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        return cls(**{**kept, "phases": tuple(Phase(**phase) for phase in values["phases"])})


def estimate_memory(
    config: TrainConfig,
    *,
    device: str = "cuda",
    has_bf16: bool = True,
    context_bytes: int | None = None,
    fragmentation: float | None = None,
    cache_folder: Path | None = None,
    bucket: Size | None = None,
    dataset: Dataset | None = None,
    architecture: Architecture | None = None,
) -> MemoryEstimate:
    """Estimate the memory of a run.

    Full-size models take 15 to 60 s of a processor's time the first time.

    Args:
        config: of the run; `batch_size` is a number. With `blocks_to_swap: auto`, every block waits in host memory.
        device: "cuda" or "cpu".
        has_bf16: whether the GPU computes in bfloat16 (compute capability 8.0 on).
        context_bytes, fragmentation: of the GPU; by default the cautious values above. Without effect on a CPU, whose
            allowance is the process.
        cache_folder: where answers are kept; by default `.edk_cache/preflight` next to the run folders.
        bucket: (width, height) of the images; by default the largest of the resolution.
        dataset: says whether captions vary, which decides what may be kept in host memory; by default the settings say
            it.
        architecture: of the base, where it has been read already.

    Raises:
        ConfigError: batch_size is "auto", or a side file is wrong.
        ModelError: the base is not there, or of a kind that the kit does not train.
    """
    if not isinstance(config.batch_size, int):
        raise ConfigError(
            "batch_size: memory can be estimated for a number only; give one, or ask the advice for the largest"
        )
    if wants_auto_optimizer(config):
        raise ConfigError("optimizer: memory can be estimated for a named one only; give its name, or ask the advice")
    question = _Question.of(config, device, has_bf16, bucket, dataset, architecture)
    folder = cache_folder or Path(config.logdir) / ".edk_cache" / "preflight"
    kept = folder / f"{question.key()}.json"
    estimate = _read_kept(kept)
    if estimate is None:
        estimate = question.answer()
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, json.dumps(estimate.to_json(), indent=1))
    return replace(estimate, allowance_bytes=allowance(estimate, device, context_bytes, fragmentation))


def allowance(
    estimate: MemoryEstimate, device: str, context_bytes: int | None = None, fragmentation: float | None = None
) -> int:
    """Bytes that a GPU, or the process on a CPU, takes next to the tensors."""
    if device == "cpu":
        return PROCESS_BYTES
    context = DEFAULT_CONTEXT_BYTES if context_bytes is None else context_bytes
    share = DEFAULT_FRAGMENTATION if fragmentation is None else fragmentation
    return context + int(share * estimate.worst.peak_bytes)


def _read_kept(path: Path) -> MemoryEstimate | None:
    """An earlier answer, or None where there is none that can be read."""
    try:
        return MemoryEstimate.from_json(read_json(path))
    except (OSError, KitError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class _Question:
    """Everything that an estimate depends on."""

    config: TrainConfig
    architecture: Architecture
    device: str
    has_bf16: bool
    bucket: Size
    captions_vary: bool
    validates: int | None
    samples: SampleShape | None
    dataset: Dataset | None

    @classmethod
    def of(  # noqa: PLR0917 - what `estimate_memory` was asked, in its order
        cls,
        config: TrainConfig,
        device: str,
        has_bf16: bool,
        bucket: Size | None,
        dataset: Dataset | None,
        architecture: Architecture | None,
    ) -> _Question:
        from everydream_kit.data.text_cache import captions_vary
        from everydream_kit.preflight.rehearsal import largest_bucket
        from everydream_kit.settings import with_side_files

        config, _ = with_side_files(config)
        architecture = architecture or architecture_of(config)
        return cls(
            config=config,
            architecture=architecture,
            device=device,
            has_bf16=has_bf16,
            bucket=bucket or largest_bucket(config.resolutions),
            captions_vary=config.shuffle_tags if dataset is None else captions_vary(dataset),
            validates=validated_together(config),
            samples=sampled_together(config, dataset, multiple=architecture.files.family.sampler.size_multiple),
            dataset=dataset,
        )

    def key(self) -> str:
        """A hash of all of it, and of the libraries that decide what is allocated."""
        settings = self.config.model_dump(mode="json")
        facts = {
            "version": VERSION,
            "settings": {name: settings[name] for name in settings_in_key()},
            "has_ema": has_ema(self.config),
            "grad_accum": min(2, self.config.grad_accum),
            "architecture": self.architecture.identity(),
            "device": [self.device, self.has_bf16],
            "bucket": self.bucket,
            "captions_vary": self.captions_vary,
            "validates": self.validates,
            "samples": None if self.samples is None else asdict(self.samples),
            "libraries": [_version(name) for name in LIBRARIES],
        }
        return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()

    def answer(self) -> MemoryEstimate:
        """Go through the run."""
        from everydream_kit.preflight.rehearsal import rehearse

        rehearsal = rehearse(
            self.config,
            self.architecture,
            device_type=self.device,
            has_bf16=self.has_bf16,
            bucket=self.bucket,
            latents=estimate_latent_mode(self.config),
            validates=self.validates,
            samples=self.samples,
            dataset=self.dataset,
        )
        return _conclude(self.config, rehearsal, self.device)


def settings_in_key() -> list[str]:
    """Names of the settings whose values decide an estimate."""
    from everydream_kit.config import facts

    return [name for name, one in facts().items() if "memory" in one.affects and name not in KEY_HAS_OTHERWISE]


def estimate_latent_mode(config: TrainConfig) -> CacheMode:
    """Where latents are kept, as far as the settings say it: `auto` takes memory unless there are very many images."""
    if config.plugins:  # one of them may change images
        return "off"
    return "memory" if config.cache_latents == "auto" else config.cache_latents


def architecture_of(config: TrainConfig) -> Architecture:
    """What the config's base model is made of. Raises: ModelError, CheckpointError."""
    from everydream_kit.preflight.skeleton import read_architecture
    from everydream_kit.training.base import find_base

    return read_architecture(
        find_base(config),
        revision=config.base_revision,
        subfolder=config.base_subfolder,
        variant=config.base_variant,
        family=config.family,
        prediction_type=config.prediction_type,
        vae=config.vae,
    )


def has_ema(config: TrainConfig) -> bool:
    """Whether an average of the weights is kept."""
    return config.ema_decay_rate is not None or config.ema_strength_target is not None


def _version(name: str) -> str:
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return f"{name} none"


def validated_together(config: TrainConfig) -> int | None:
    """Images whose loss is measured together, or None without validation."""
    from everydream_kit.config import measures_losses

    if not measures_losses(config):
        return None
    assert isinstance(config.batch_size, int)
    return config.validation_batch_size or config.batch_size


def sampled_together(config: TrainConfig, dataset: Dataset | None = None, *, multiple: int = 8) -> SampleShape | None:
    """The largest batch of sample images that the prompt file, or the lack of one, leads to.

    Args:
        multiple: as in `plan_prompts`.
    """
    if config.sample_steps is None:
        return None
    from everydream_kit.preflight.rehearsal import SampleShape
    from everydream_kit.training.prompt_file import SampleEntry, SampleSettings, read_prompt_file
    from everydream_kit.training.sampling_listener import NUM_RANDOM_CAPTIONS, plan_prompts, sample_size

    path = Path(config.sample_prompts)
    side = max(config.resolutions)
    settings = SampleSettings.of(config)
    if path.is_file():
        with suppress(ConfigError):  # a warning when it is read in training, where it may have been fixed
            settings = read_prompt_file(path, settings).settings
    written = [entry.model_copy(update={"random_caption": False}) for entry in settings.samples]
    if written:
        read = settings.model_copy(update={"samples": written})
        planned = plan_prompts(read, dataset, seed=0, resolution=side, step=0, multiple=multiple)
        images = [((one.width, one.height), len(one.cfgs)) for one in planned]
    else:
        size = sample_size(SampleEntry(), settings.resolution or side, multiple)
        images = [(size, len(settings.cfgs))] * NUM_RANDOM_CAPTIONS
    counts: dict[tuple[int, int], int] = {}
    for size, number in images:
        counts[size] = counts.get(size, 0) + number
    assert isinstance(config.batch_size, int)
    trained_pixels = config.batch_size * side**2
    together = {size: min(settings.images_together(*size, trained_pixels), number) for size, number in counts.items()}
    size = max(together, key=lambda size: together[size] * size[0] * size[1])
    return SampleShape(together[size], size)


def _conclude(config: TrainConfig, rehearsal: Rehearsal, device: str) -> MemoryEstimate:
    """Phases from a trace."""
    from everydream_kit.preflight.rehearsal import (
        EMA,
        GRADIENTS,
        HOST,
        IDLE,
        IDLE_VAE,
        LARGE_TEXTS,
        SHARED_GRADIENTS,
        STATES,
        VAE_WEIGHTS,
        WEIGHTS,
    )
    from everydream_kit.preflight.tracker import OPTIMIZER

    lives, phases = rehearsal.lives, []
    for stretch in lives.stretches:
        caching = stretch.name == "latent caching"
        before_run = caching and estimate_latent_mode(config) == "disk"
        never = [HOST, LARGE_TEXTS, *([EMA, GRADIENTS, SHARED_GRADIENTS] if before_run else [IDLE] if caching else [])]
        if stretch.name == "training step":
            never += [IDLE, IDLE_VAE]
        if stretch.name == "text caching":  # before the run, while the denoiser waits in host memory
            absent = [WEIGHTS, EMA, GRADIENTS, SHARED_GRADIENTS, HOST, IDLE_VAE]
            phases.append(_phase(stretch.name, lives.peak(stretch, never=absent).by_category))
            continue
        peak = lives.peak(stretch, always=() if before_run else (STATES, SHARED_GRADIENTS), never=never)
        if before_run:
            peak.num_bytes -= peak.by_category.pop(STATES, 0)
        phases.append(_phase(stretch.name, peak.by_category))
    stays = (WEIGHTS, VAE_WEIGHTS, STATES, EMA, *([SHARED_GRADIENTS] if rehearsal.has_graphs else []))
    standing = {name: rehearsal.standing.get(name, 0) for name in stays}
    swapped = rehearsal.ema_bytes if rehearsal.ema_on_device or (device == "cpu" and rehearsal.ema_bytes) else 0
    phases.append(_phase("saving", {**standing, "other": swapped}))
    if rehearsal.has_graphs:
        phases = _next_to_graphs(phases)
    training = lives.named("training step")
    host = sum(rehearsal.standing.get(name, 0) for name in (HOST, IDLE, IDLE_VAE, LARGE_TEXTS))
    host += rehearsal.snapshot_bytes
    if any(stretch.name == "text caching" for stretch in lives.stretches):
        host = max(host, standing[WEIGHTS] + rehearsal.standing.get(HOST, 0))
    return MemoryEstimate(
        phases=tuple(phases),
        allowance_bytes=0,
        step_flops=training.flops * config.grad_accum // rehearsal.num_micro_batches,
        num_trained_parameters=rehearsal.num_trained_parameters,
        num_parameters=rehearsal.num_parameters,
        weight_bytes_written=rehearsal.checkpoint_bytes + rehearsal.averaged_bytes,
        state_bytes_written=rehearsal.state_bytes,
        side_bytes_written=rehearsal.side_bytes * (2 if rehearsal.averaged_bytes else 1),
        host_bytes=host,
        pass_launches=_launches_of_passes(training.launches) * config.grad_accum // rehearsal.num_micro_batches,
        update_launches=training.launches[OPTIMIZER],
        copied_bytes=rehearsal.copied_bytes * config.grad_accum // rehearsal.num_micro_batches,
        num_blocks=rehearsal.num_blocks,
    )


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
    from everydream_kit.preflight.tracker import BACKWARD, FORWARD, RECOMPUTED

    return launches[FORWARD] + launches[BACKWARD] + round(RECOMPUTED_COSTS * launches[RECOMPUTED])


def _phase(name: str, by_category: dict[str, int]) -> Phase:
    """A phase under the public categories: what waited and came back is weights again."""
    from everydream_kit.preflight.rehearsal import (
        GRADIENTS,
        IDLE,
        IDLE_VAE,
        LARGE_TEXTS,
        SHARED_GRADIENTS,
        VAE_WEIGHTS,
        WEIGHTS,
    )

    kinds = dict.fromkeys((IDLE, IDLE_VAE, LARGE_TEXTS, VAE_WEIGHTS), WEIGHTS)
    public = {**kinds, SHARED_GRADIENTS: GRADIENTS}
    named = dict.fromkeys(CATEGORIES, 0)
    for category, num_bytes in by_category.items():
        named[public.get(category, category)] += num_bytes
    return Phase(name, sum(named.values()), {key: value for key, value in named.items() if value})
