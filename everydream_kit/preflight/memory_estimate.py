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
from collections import Counter
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from everydream_kit.atomic import write_atomic
from everydream_kit.config import wants_auto_optimizer
from everydream_kit.data.buckets import largest_bucket
from everydream_kit.data.records import Size
from everydream_kit.errors import ConfigError, KitError
from everydream_kit.preflight.memory_records import MemoryEstimate, Question, SampleShape
from everydream_kit.settings import with_side_files
from everydream_kit.strict_json import read_json

if TYPE_CHECKING:
    from everydream_kit.config import TrainConfig
    from everydream_kit.data.cache_room import CacheMode
    from everydream_kit.data.dataset import Dataset
    from everydream_kit.models.family import SamplerSpec
    from everydream_kit.preflight.skeleton import Architecture

VERSION = 11
"""Of the method: raised where the same settings would now give other numbers."""

DEFAULT_CONTEXT_BYTES = 600 * 2**20
"""CUDA's context with torch's kernels loaded, and the workspaces of cuBLAS and cuDNN: 300 to 800 MiB are seen on common
GPUs."""
DEFAULT_FRAGMENTATION = 0.05
"""Share of what is allocated that lies in gaps of the caching allocator at the worst moment."""

PROCESS_BYTES = 600 * 2**20
"""On a CPU: Python with torch and diffusers loaded, and what their kernels keep for the next time: 440 to 570 MB next
to the tensors were measured (docs/experiments.md)."""

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "bitsandbytes", "pytorch_optimizer", "everydream-kit")

KEY_HAS_OTHERWISE = frozenset(
    {"resume_ckpt", "resolution", "ema_decay_rate", "ema_strength_target", "sample_steps"}
    | {"shuffle_tags", "caption_variants"}
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
texts are known before the run, whether an average is kept, the shapes of samples and of validation."""


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
        dataset: says which texts the run will ask for, which decides what may be kept in host memory; by default the settings
            and the number of files say it.
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
    from everydream_kit.models.family import has_large_texts

    folder = cache_folder or Path(config.logdir) / ".edk_cache" / "preflight"
    config, _ = with_side_files(config)
    architecture = architecture or architecture_of(config)
    asked = Question(
        config=config,
        architecture=architecture,
        device=device,
        has_bf16=has_bf16,
        bucket=bucket or largest_bucket(config.resolutions),
        latents=estimate_latent_mode(config),
        texts_known=_knows_texts(config, dataset, large_texts=has_large_texts(architecture.files.family)),
        validates=validated_together(config),
        samples=sampled_together(config, architecture.files.family.sampler),
        dataset=dataset,
    )
    kept = folder / f"{_key(asked)}.json"
    estimate = _read_kept(kept)
    if estimate is None:
        from everydream_kit.preflight.rehearsal import rehearse  # torch, which kept answers do without

        estimate = rehearse(asked)
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


def _knows_texts(config: TrainConfig, dataset: Dataset | None, *, large_texts: bool) -> bool:
    """Whether the steps of a run do without text encoders that are not trained; of an unknown dataset, by its number of files."""
    from everydream_kit.data.image_files import count_images
    from everydream_kit.training.caching import MOST_TEXTS, texts_of_run
    from everydream_kit.training.training_images import make_plan_settings

    if config.plugins:  # one of them may change captions
        return False
    if dataset is not None:
        settings = make_plan_settings(config, max(0, config.seed), 1)
        return texts_of_run(config, dataset, settings, large_texts=large_texts) is not None
    if not config.shuffle_tags and config.caption_lines != "choose":
        return True
    count = count_images(config.data_root) if large_texts else None
    return (
        count is not None and count * min(config.max_epochs, config.caption_variants or config.max_epochs) <= MOST_TEXTS
    )


def _key(asked: Question) -> str:
    """A hash of all that is asked, and of the libraries that decide what is allocated."""
    settings = asked.config.model_dump(mode="json")
    facts = {
        "version": VERSION,
        "settings": {name: settings[name] for name in settings_in_key()},
        "has_ema": has_ema(asked.config),
        "grad_accum": min(2, asked.config.grad_accum),
        "architecture": asked.architecture.identity(),
        "device": [asked.device, asked.has_bf16],
        "bucket": asked.bucket,
        "texts_known": asked.texts_known,
        "validates": asked.validates,
        "samples": None if asked.samples is None else asdict(asked.samples),
        "libraries": [_version(name) for name in LIBRARIES],
    }
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


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
    """What the config's base model is made of.

    Raises:
        ModelError, CheckpointError: the base cannot be used.
        ConfigError: settings mean nothing for its family; training refuses them, too.
    """
    from everydream_kit.preflight.skeleton import read_architecture
    from everydream_kit.training.base_model import find_base, refuse_settings

    architecture = read_architecture(
        find_base(config),
        revision=config.base_revision,
        subfolder=config.base_subfolder,
        variant=config.base_variant,
        family=config.family,
        prediction_type=config.prediction_type,
        vae=config.vae,
    )
    refuse_settings(config, architecture.files.family)
    return architecture


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


def sampled_together(config: TrainConfig, sampler: SamplerSpec) -> SampleShape | None:
    """The largest batch of sample images that the prompt file, or the lack of one, leads to.

    Args:
        sampler: of the model's family.
    """
    if config.sample_steps is None:
        return None
    from everydream_kit.training.prompt_file import prompts_of
    from everydream_kit.training.sampling_listener import sample_grids

    counts: Counter[Size] = Counter()
    for size, number in sample_grids(config, sampler):
        counts[size] += number
    assert isinstance(config.batch_size, int)
    trained_pixels, settings = config.batch_size * max(config.resolutions) ** 2, prompts_of(config, sampler).settings
    together = {size: min(settings.images_together(*size, trained_pixels), number) for size, number in counts.items()}
    size = max(together, key=lambda size: together[size] * size[0] * size[1])
    return SampleShape(together[size], size)
