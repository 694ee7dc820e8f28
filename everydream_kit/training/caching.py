"""Encoding once instead of at every step: which pictures' latents and which captions are kept, and where."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from everydream_kit.data.cache import LatentCache
from everydream_kit.data.cache_room import choose_cache_mode, foretell_bytes
from everydream_kit.data.text_cache import TextCache
from everydream_kit.models.encoding import encode_captions, encode_moments

if TYPE_CHECKING:
    from everydream_kit.data.dataset import Dataset
    from everydream_kit.data.plan import PlanSettings
    from everydream_kit.models.family import Model
    from everydream_kit.training.journal import Journal


def build_latent_cache(
    model: Model,
    dataset: Dataset,
    plan_settings: PlanSettings,
    journal: Journal,
    *,
    mode: str,
    variants: int,
    crop_jitter: float,
    background: str,
    folder: Path,
    num_workers: int,
    transforms_pictures: bool,
) -> LatentCache | None:
    """Encode every picture's crops once, or decide not to.

    Args:
        mode: auto, off, memory or disk, as `cache_latents` says.
        variants: crops kept for each picture.
        folder: of the disk cache.
        transforms_pictures: a plug-in changes pictures at random, so that nothing can be kept.

    Raises:
        DiskSpaceError: it does not fit on the disk.
    """
    if mode == "off" or transforms_pictures:
        return None
    if mode == "auto":
        mode = choose_cache_mode(foretell_bytes(dataset, plan_settings, variants=variants), folder)
        if mode == "off":
            return None
    device = next(model.vae.parameters()).device

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return encode_moments(model, pixels.to(device))

    journal.set_state("starting", message="encoding the pictures once")
    cache = LatentCache.build(
        dataset,
        plan_settings,
        encode,
        weights_identity(model.vae),
        folder=folder if mode == "disk" else None,
        variants=variants,
        crop_jitter=crop_jitter,
        background=background,
        num_workers=num_workers,
    )
    for problem in cache.problems:
        journal.warn(f"{problem.path}: {problem.cause} {problem.cure}")
    journal.set_state("starting", message=None)
    journal.tell("latents cached", mode=mode, variants=variants)
    return cache


def weights_identity(module: torch.nn.Module) -> str:
    """A hash of a module's weights and their format: two modules with the same one compute the same."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def build_text_cache(model: Model, clip_skip: int, *, trains_text: bool) -> TextCache | None:
    """Remember encoded captions where the text encoders are frozen."""
    if trains_text:
        return None
    return TextCache(lambda captions: encode_captions(model, captions, clip_skip))
