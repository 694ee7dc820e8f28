"""Stage 2: the U-Net and the text encoder, together, from scratch, on latents that are encoded once.

This is the kit's training objective (epsilon, min-SNR weights, empty prompts now and then, EMA) in a loop of its own,
for two reasons: Muon, which is not an optimizer for fine-tuning, and two processes of one thread each.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import torch
from make_emoji_dataset import DEMO_SUBJECTS
from PIL import Image
from torch.nn import functional

from embedded_base import architecture
from embedded_base.clock import Ema, Stage
from embedded_base.muon import Muon
from embedded_base.peers import Peers

BATCH = 40
SHAPES = ((128, 128), (144, 112), (112, 144), (160, 96), (96, 160))  # (width, height); the square one most often
SQUARE_SHARE = 0.96
EMPTY_SHARE = 0.1
DEMO_REPEATS = 3  # the demo's subjects come three times an epoch: they are what people see first
EVEN_FROM = 0.8  # of the budget: from then on every subject comes once
MIN_SNR_GAMMA = 5.0


def read_folder(folder: Path) -> list[tuple[Path, list[str]]]:
    """Images and their captions' parts: label, tags..., style."""
    return [
        (path, path.with_suffix(".txt").read_text("utf-8").strip().split(", "))
        for path in sorted(folder.glob("*.webp"))
    ]


def load_vae(folder: Path) -> torch.nn.Module:
    """The averaged weights of stage 1."""
    vae = architecture.build_vae()
    vae.load_state_dict(torch.load(folder / "vae.pt", weights_only=True)["payload"]["ema"])
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_all(images: list[Path], vae: torch.nn.Module, cache: Path) -> dict[tuple[int, int], torch.Tensor]:
    """Mean latents of every image on a canvas of every shape, {(width, height): (N, 4, height/8, width/8)}.

    Kept in the file `cache`; delete it when the autoencoder has changed.
    """
    names = [path.name for path in images]
    if cache.is_file():
        kept = torch.load(cache, weights_only=True)
        if set(names) <= set(kept["names"]):
            indices = [kept["names"].index(name) for name in names]
            return {shape: values[indices] for shape, values in kept["latents"].items()}
    latents = {}
    for width, height in SHAPES:
        side = min(width, height)
        encoded = []
        for path in images:
            image = Image.open(path).convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
            grid = Image.new("RGB", (width, height), "white")
            grid.paste(image, ((width - side) // 2, (height - side) // 2))
            pixels = torch.from_numpy(np.asarray(grid).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
            encoded.append(vae.encode(pixels).latent_dist.mean)
        latents[width, height] = torch.cat(encoded)
    if os.environ.get("RANK", "0") == "0":
        torch.save({"names": names, "latents": latents}, cache)
    return latents


def vary(parts: list[str], chance: random.Random) -> str:
    """One of the ways to say a caption: mostly the label and the style, now and then tags, an article, or nothing."""
    label, tags, style = parts[0], parts[1:-1], parts[-1]
    draw = chance.random()
    if draw < EMPTY_SHARE:
        return ""
    if draw < 0.65:
        return f"{label}, {style}"
    if draw < 0.75:
        return f"a {label}, {style}"
    if draw < 0.95:
        return ", ".join([label, *chance.sample(tags, chance.randint(0, len(tags))), style])
    return label


def snr_weights(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Min-SNR weights for epsilon, (1000,): Hang et al. 2023, equation 6 divided by the SNR."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=MIN_SNR_GAMMA) / snr


def build_optimizers(unet: torch.nn.Module, text_encoder: torch.nn.Module, peers: Peers) -> list[torch.optim.Optimizer]:
    """Muon for the inner matrices; AdamW for embeddings, norms, biases, and the first and last convolutions."""
    by_adam = ("conv_in", "conv_out", "embedding", "time_emb")
    named = [*unet.named_parameters(), *text_encoder.named_parameters()]
    matrices = [p for n, p in named if p.ndim >= 2 and not any(part in n for part in by_adam)]
    known = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in known]
    return [
        Muon(matrices, lr=0.015, peers=peers),
        torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.98), weight_decay=0, fused=True),
    ]


class Batches:
    """Endless batches of latents, token ids and timesteps, different in every process."""

    def __init__(
        self,
        captions: list[list[str]],
        latents: dict[tuple[int, int], torch.Tensor],
        chances: torch.Tensor,
        seed: int,
    ) -> None:
        self.captions, self.latents = captions, latents
        self.cumulated = (chances / chances.sum()).cumsum(dim=0)
        self.generator = torch.Generator().manual_seed(seed)
        self.chance = random.Random(seed)
        self.order: list[int] = []

    def draw(self, size: int, demo_repeats: int) -> tuple[torch.Tensor, list[str], torch.Tensor, torch.Tensor]:
        """Latents and noise (size, 4, h, w), captions, and timesteps (size,)."""
        while len(self.order) < size:
            pool = [
                index
                for index, parts in enumerate(self.captions)
                for _ in range(demo_repeats if parts[0] in DEMO_SUBJECTS else 1)
            ]
            self.order += [pool[i] for i in torch.randperm(len(pool), generator=self.generator).tolist()]
        indices, self.order = self.order[:size], self.order[size:]
        shape = SHAPES[0] if self.chance.random() < SQUARE_SHARE else self.chance.choice(SHAPES[1:])
        batch = self.latents[shape][indices]
        # One timestep out of each of `size` equally likely slices: the expectation of independent draws, less noise.
        slices = (torch.arange(size) + torch.rand(size, generator=self.generator)) / size
        timesteps = torch.searchsorted(self.cumulated, slices).clamp(max=999)
        noise = torch.randn(batch.shape, generator=self.generator)
        return batch, [vary(self.captions[index], self.chance) for index in indices], timesteps, noise


def train(dataset: Path, folder: Path, tokenizer_folder: Path, minutes: float, peers: Peers) -> None:
    """Train for `minutes`, continuing from the last checkpoint if there is one."""
    from diffusers import DDPMScheduler
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    captions = read_folder(dataset)
    latents = encode_all([path for path, _ in captions], load_vae(folder), folder / "latents.pt")
    torch.manual_seed(3)
    unet = architecture.build_unet().to(memory_format=torch.channels_last)
    text_encoder = architecture.build_text_encoder(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    both = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    optimizers = build_optimizers(unet, text_encoder, peers)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    ema = Ema(both, 0.998)
    scheduler = DDPMScheduler(**architecture.NOISE)
    # Timesteps that min-SNR weighs little are drawn less often, and count for more when they are: the same objective,
    # but a third of the images is no longer spent on nearly clean latents.
    chances = snr_weights(scheduler.alphas_cumprod) + 0.2
    weights = snr_weights(scheduler.alphas_cumprod) / chances * chances.mean()

    stage = Stage(folder, "unet", minutes)
    payload = stage.load()
    scaling_factor = payload["scaling_factor"] if payload else 1 / float(latents[128, 128].std())
    if payload:
        both.load_state_dict(payload["model"])
        ema.weights = payload["ema"]
        for optimizer, state in zip(optimizers, payload["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    latents = {
        shape: (values * scaling_factor).to(memory_format=torch.channels_last) for shape, values in latents.items()
    }
    batches = Batches([parts for _, parts in captions], latents, chances, seed=1000 + peers.rank + 2 * stage.step)

    def payload_now() -> dict:
        return {
            "model": both.state_dict(),
            "ema": ema.weights,
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "scaling_factor": scaling_factor,
        }

    size = BATCH // peers.count
    seen = 0.0
    while stage.progress < 1:
        batch, texts, timesteps, noise = batches.draw(size, DEMO_REPEATS if stage.progress < EVEN_FROM else 1)
        tokens = tokenizer(
            texts, padding="max_length", truncation=True, max_length=architecture.MAX_TOKENS, return_tensors="pt"
        ).input_ids
        noisy = scheduler.add_noise(batch, noise, timesteps)

        factor = min(1.0, (stage.step + 1) / 100) * max(0.005, 1 - stage.progress)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
        predicted = unet(noisy, timesteps, text_encoder(tokens)[0]).sample
        errors = functional.mse_loss(predicted, noise, reduction="none").mean(dim=(1, 2, 3))
        (errors * weights[timesteps]).mean().backward()
        stage.progress = peers.average(both.parameters(), stage.own_progress)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        stage.step += 1
        ema.update(both, stage.step)
        seen = 0.98 * (seen or errors.mean().item()) + 0.02 * errors.mean().item()
        if peers.is_first and stage.step % 50 == 0:
            stage.log(loss=round(seen, 5), lr=round(peaks[0] * factor, 5))
        if peers.is_first and stage.is_save_due():
            stage.save(payload_now())
    if peers.is_first:
        stage.save(payload_now())


def load_trained(folder: Path, tokenizer_folder: Path) -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    """VAE (with its measured scaling factor), U-Net and text encoder from the stages' checkpoints, averaged weights."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    payload = torch.load(folder / "unet.pt", weights_only=True)["payload"]
    unet = architecture.build_unet()
    text_encoder = architecture.build_text_encoder(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).load_state_dict(payload["ema"])
    vae = load_vae(folder)
    vae.register_to_config(scaling_factor=payload["scaling_factor"])
    return vae, unet, text_encoder
