"""Stage 1: the autoencoder, from scratch.

Two thirds of the time on 64 px crops, where most steps fit into an hour, then whole 128 px images, which is how it is
used (group norms see a whole image's statistics). Late in training, noise of 5 % of the latents' own spread is added
before decoding, so that the decoder forgives what a small U-Net leaves undone.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from embedded_base import architecture
from embedded_base.clock import Ema, Stage
from embedded_base.muon import Muon
from embedded_base.peers import Peers

CROP_PIXELS, CROP_BATCH = 64, 20
WHOLE_BATCH = 6
WHOLE_FROM = 0.62  # of the budget
NOISE_FROM, LATENT_NOISE = 0.5, 0.05
KL_WEIGHT = 1e-5  # of the mean over latent elements: keeps latents in a friendly range, no more
CHOSEN_SHARE = 0.6  # of each batch from the images the U-Net will learn from


def load_images(dataset: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, H, W, 3) as bytes, and the indices of the chosen subjects' 3d ones."""
    archive = np.load(dataset / "vae.npz")
    chosen = {f"{subject['code']} 3d" for subject in json.loads((dataset / "subjects.json").read_text("utf-8"))}
    indices = [index for index, name in enumerate(archive["names"]) if str(name) in chosen]
    return torch.from_numpy(archive["pictures"]), torch.tensor(indices)


def draw_batch(
    images: torch.Tensor, chosen: torch.Tensor, size: int, side: int, generator: torch.Generator
) -> torch.Tensor:
    """A batch in -1..1, (size, 3, side, side): crops, some with colors swapped or inverted, for color."""
    count = round(size * CHOSEN_SHARE)
    indices = torch.cat(
        [
            chosen[torch.randint(len(chosen), (count,), generator=generator)],
            torch.randint(len(images), (size - count,), generator=generator),
        ]
    )
    last = images.shape[1] - side
    batch = []
    for index in indices.tolist():
        top, left = torch.randint(last + 1, (2,), generator=generator).tolist()
        crop = images[index, top : top + side, left : left + side].permute(2, 0, 1).float() / 127.5 - 1
        chance = torch.rand((), generator=generator).item()
        if chance < 0.12:
            crop = crop[torch.randperm(3, generator=generator)]
        elif chance < 0.18:
            crop = -crop[torch.randperm(3, generator=generator)]
        if torch.rand((), generator=generator).item() < 0.5:
            crop = crop.flip(-1)
        batch.append(crop)
    return torch.stack(batch).contiguous(memory_format=torch.channels_last)


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 and L2, L1 of means over 8x8 and 2x2 tiles (color and tone first), and L1 of differences (edges)."""
    difference = output - target
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    tones = functional.avg_pool2d(difference, 8).abs().mean() + functional.avg_pool2d(difference, 2).abs().mean()
    return difference.abs().mean() + difference.square().mean() + 0.5 * tones + 0.5 * edges


def build_optimizers(vae: torch.nn.Module, peers: Peers) -> list[torch.optim.Optimizer]:
    """Muon for the inner convolutions and attention, AdamW for all else."""
    by_adam = ("conv_in", "conv_out", "quant_conv")
    matrices = [p for n, p in vae.named_parameters() if p.ndim >= 2 and not any(part in n for part in by_adam)]
    known = {id(p) for p in matrices}
    rest = [p for p in vae.parameters() if id(p) not in known]
    return [
        Muon(matrices, lr=0.02, peers=peers),
        torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.95), weight_decay=0, fused=True),
    ]


def train(dataset: Path, folder: Path, minutes: float, peers: Peers) -> None:
    """Train for `minutes`, continuing from the last checkpoint if there is one."""
    torch.manual_seed(1)
    vae = architecture.build_vae().to(memory_format=torch.channels_last)
    images, chosen = load_images(dataset)
    held = chosen[:: max(1, len(chosen) // 24)][:24]
    held_images = images[held].permute(0, 3, 1, 2).float() / 127.5 - 1

    optimizers = build_optimizers(vae, peers)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    ema = Ema(vae, 0.998)
    generator = torch.Generator().manual_seed(2 + peers.rank)

    stage = Stage(folder, "vae", minutes)
    if payload := stage.load():
        vae.load_state_dict(payload["model"])
        ema.weights = payload["ema"]
        for optimizer, state in zip(optimizers, payload["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        generator.manual_seed(2 + peers.rank + 2 * stage.step)

    def payload_now() -> dict:
        return {"model": vae.state_dict(), "ema": ema.weights, "optimizers": [o.state_dict() for o in optimizers]}

    seen = 0.0
    while stage.progress < 1:
        whole = stage.progress > WHOLE_FROM
        size, side = (WHOLE_BATCH, images.shape[1]) if whole else (CROP_BATCH, CROP_PIXELS)
        batch = draw_batch(images, chosen, size // peers.count, side, generator)
        factor = min(1.0, (stage.step + 1) / 50) * max(0.005, 1 - stage.progress)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
        posterior = vae.encode(batch).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        if stage.progress > NOISE_FROM:
            spread = posterior.mean.detach().std()
            latents = latents + LATENT_NOISE * spread * torch.randn(latents.shape, generator=generator)
        loss = (
            loss_of(vae.decode(latents).sample, batch) + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        )
        loss.backward()
        stage.progress = peers.average(vae.parameters(), stage.own_progress)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        stage.step += 1
        ema.update(vae, stage.step)
        seen = 0.98 * seen + 0.02 * loss.item() if seen else loss.item()
        if not peers.is_first:
            continue
        if stage.step % 100 == 0:
            stage.log(loss=round(seen, 5), lr=round(peaks[0] * factor, 5), std=round(posterior.mean.std().item(), 3))
        if stage.is_save_due():
            stage.save(payload_now())
            stage.log(psnr=round(psnr(ema, held_images), 2))
    if peers.is_first:
        stage.save(payload_now())
        stage.log(psnr=round(psnr(ema, held_images), 2))


@torch.no_grad()
def psnr(ema: Ema, images: torch.Tensor) -> float:
    """Decibels of the averaged weights' reconstruction of whole images (peak to peak 2)."""
    vae = architecture.build_vae()
    vae.load_state_dict(ema.weights)
    error = (vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1) - images).square().mean()
    return float(10 * torch.log10(4 / error))
