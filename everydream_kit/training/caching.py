"""Encoding once instead of at every step: which images' latents and which captions are kept, and where."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from everydream_kit import draws
from everydream_kit.atomic import require_writable
from everydream_kit.data.batches import LoadSettings
from everydream_kit.data.cache import CacheSettings, DiskCache, LatentCache, MemoryCache
from everydream_kit.data.cache_room import MOMENT_CHANNELS, CacheMode, choose_cache_mode, estimate_bytes
from everydream_kit.data.captions import compose_caption
from everydream_kit.data.loader import captions_of_run
from everydream_kit.data.text_cache import TextCache, TextStore, captions_vary
from everydream_kit.models.encoding import encode_captions, encode_moments
from everydream_kit.models.family import Conditioning, has_large_texts, join_conditioning
from everydream_kit.models.tokenizer import tokenizer_identity
from everydream_kit.share_bar import ShareBar
from everydream_kit.training.offload import in_host_memory
from everydream_kit.training.progress import WorkProgress

if TYPE_CHECKING:
    from everydream_kit.config import TrainConfig
    from everydream_kit.data.dataset import Dataset
    from everydream_kit.data.epoch_plan import PlanSettings
    from everydream_kit.models.family import Conditioning, Model
    from everydream_kit.training.control import StopSignal
    from everydream_kit.training.journal import Journal
    from everydream_kit.training.offload import IdleModels
    from everydream_kit.training.precision import Precision


MOST_TEXTS = 2_000
"""Texts that are encoded before the first step where each use has its own: a minute or two, and up to 16 GB of disk where a
family keeps padding."""


def latent_folder(config: TrainConfig) -> Path:
    """Where the latent cache on disk lives."""
    return Path(config.latent_cache_dir or Path(config.logdir) / ".edk_cache" / "latents")


def text_folder(config: TrainConfig) -> Path:
    """Where encoded captions are kept on disk."""
    return Path(config.logdir) / ".edk_cache" / "texts"


def require_output_folders(config: TrainConfig) -> None:
    """Every folder that a run writes to can be written. Called before anything is loaded: after hours it is too late.

    Raises:
        ConfigError: one cannot; its setting is named.
    """
    if not config.no_save_ckpt:
        require_writable(Path(config.save_ckpt_dir or "."), "save_ckpt_dir")
    if config.cache_latents in ("auto", "disk"):
        require_writable(latent_folder(config), "latent_cache_dir" if config.latent_cache_dir else "logdir")


def choose_latent_mode(
    mode: CacheMode | Literal["auto"],
    dataset: Dataset,
    plan_settings: PlanSettings,
    *,
    variants: int,
    channels: int = MOMENT_CHANNELS,
    folder: Path,
    transforms_images: bool,
) -> CacheMode:
    """Where the images' latents are kept.

    Args:
        mode: what `cache_latents` says.
        variants: crops kept for each image.
        channels: of what is kept for each cell.
        folder: of the disk cache.
        transforms_images: a plug-in changes images at random, so that nothing can be kept.
    """
    if transforms_images:
        return "off"
    if mode == "auto":
        return choose_cache_mode(estimate_bytes(dataset, plan_settings, variants=variants, channels=channels), folder)
    return mode


def build_latent_cache(
    model: Model,
    dataset: Dataset,
    plan_settings: PlanSettings,
    journal: Journal,
    idle_models: IdleModels,
    *,
    mode: CacheMode,
    settings: CacheSettings,
    folder: Path,
    num_workers: int,
    stop: StopSignal | None = None,
) -> LatentCache | None:
    """The cache of the images' latents: on disk filled now, in memory as crops are drawn; None where there is none.

    Args:
        idle_models: what has to be fetched before the VAE can work.
        mode: from `choose_latent_mode`.
        settings: which crops are kept.
        folder: of the disk cache.
        num_workers: processes that decode images.
        stop: ends filling the one on disk; what is encoded stays there.

    Raises:
        StopRequested: by `stop`.
        DiskSpaceError: it does not fit on the disk.
    """
    if mode == "off":
        return None

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        with idle_models.at_work([model.vae]):
            return encode_moments(model, pixels)

    journal.report("latent cache", mode=mode, variants=settings.variants)
    if mode == "memory":
        return MemoryCache(dataset, encode, settings, num_workers=num_workers)
    with idle_models.at_work([model.vae]), ShareBar("encoding") as bar:
        cache = DiskCache.build(
            dataset,
            plan_settings,
            encode,
            identity=weights_identity(model.vae),
            folder=folder,
            settings=settings,
            num_workers=num_workers,
            progress=WorkProgress(journal, "starting", bar, stop=stop, message="Encoding the images once."),
        )
    for problem in cache.problems.values():
        journal.warn(str(problem))
    journal.set_state("starting", message=None)
    return cache


def weights_identity(module: torch.nn.Module) -> str:
    """A hash of a module's weights, their format, and a VAE's tiles: two modules with the same one compute the same."""
    digest = hashlib.blake2b(digest_size=16)
    if getattr(module, "use_tiling", False):
        digest.update(f"tiles of {module.tile_sample_min_size}".encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def build_text_cache(
    model: Model, clip_skip: int, *, trains_text: bool, folder: Path | None = None
) -> TextCache[Conditioning] | None:
    """Remember encoded captions where the text encoders are frozen.

    Args:
        folder: of the cache on disk, for text encoders that are never trained; None: in memory only.
    """
    if trains_text:
        return None
    store = None
    if folder is not None and has_large_texts(model.family):
        digest = hashlib.blake2b(model.family.prompt_version.encode(), digest_size=12)
        for text_encoder in model.text_encoders:
            digest.update(weights_identity(text_encoder).encode())
        for tokenizer in model.tokenizers:
            digest.update(tokenizer_identity(tokenizer).encode())
        store = TextStore(folder / digest.hexdigest())
    return TextCache(
        lambda captions: encode_captions(model, captions, clip_skip),
        join=join_conditioning,
        store=store,
        make=Conditioning,
        device=model.device,
    )


def texts_of_run(
    config: TrainConfig, dataset: Dataset, plan_settings: PlanSettings, *, large_texts: bool
) -> list[str] | None:
    """The texts that the steps of a run will ask for; None where they are not worth encoding before the run, or too many.

    Args:
        large_texts: a large text encoder reads them (`has_large_texts`).
    """
    if not captions_vary(dataset):
        return [*([""] if config.cond_dropout > 0 else []), *fixed_captions([dataset])]
    if not large_texts:  # encoded when they come: that costs little
        return None
    settings = LoadSettings(plan_settings.seed, caption_variants=config.caption_variants)
    drawn = captions_of_run(dataset, plan_settings, settings, num_epochs=config.max_epochs, most=MOST_TEXTS)
    return None if drawn is None else [*drawn, *fixed_captions([dataset])]  # samples take them as they are written


def fixed_captions(datasets: Sequence[Dataset]) -> list[str]:
    """Each image's caption as it is written, where nothing is drawn."""
    images = (dataset.image(index) for dataset in datasets for index in range(len(dataset)))
    generator = draws.generator(0, "no caption varies")
    return [
        compose_caption(replace(image.caption, alternatives=()), generator, False, image.keep_tags) for image in images
    ]


def fill_text_cache(
    config: TrainConfig,
    model: Model,
    texts: Sequence[str] | None,
    *,
    trains_text: bool,
    precision: Precision,
    journal: Journal,
    idle_models: IdleModels,
) -> TextCache[Conditioning] | None:
    """The cache of what frozen text encoders make of captions; large ones fill it before the first step.

    So they need not stay on the device. Meanwhile the denoiser is in host memory: the two do not fit side by side on the GPUs
    that the families are trained on. Any other text is encoded when it comes.

    Args:
        texts: what large text encoders encode now, and keep on disk; None: nothing.
    """
    folder = None if texts is None else text_folder(config)
    text_cache = build_text_cache(model, config.clip_skip, trains_text=trains_text, folder=folder)
    if text_cache is None or texts is None or not has_large_texts(model.family):
        return text_cache
    wanted = [text for text in dict.fromkeys(texts) if not text_cache.knows([text])]
    if not wanted:
        return text_cache
    journal.report("text cache", captions=len(wanted))
    with torch.no_grad(), precision.autocast(), ShareBar("encoding texts") as bar:
        progress = WorkProgress(journal, "starting", bar, message="Encoding the captions once.")
        with in_host_memory(model.denoiser), idle_models.at_work(model.text_encoders):
            for done, caption in enumerate(wanted, 1):
                text_cache.encode([caption])
                progress(done, len(wanted))
    journal.set_state("starting", message=None)
    return text_cache
