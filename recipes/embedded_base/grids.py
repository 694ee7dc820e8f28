"""Looking at it: grids of reconstructions and of fixed prompts with fixed seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

_SUBJECTS = """
red apple, banana, strawberry, carrot, hamburger, pizza, ice cream, mushroom, cactus, sunflower, penguin, elephant,
cat face, fish, octopus, butterfly, snail, ghost, robot, snowman, automobile, rocket, guitar, umbrella
"""
PROMPTS = tuple(name.strip() for name in _SUBJECTS.split(","))
_MORE_SUBJECTS = """
lion, owl, frog, turtle, shark, crab, honeybee, panda, fox, rose, palm tree, Christmas tree, pineapple, cherries, lemon,
doughnut, birthday cake, house, fire engine, airplane, violin, trophy, rainbow, skull
"""
MORE_PROMPTS = tuple(name.strip() for name in _MORE_SUBJECTS.split(","))  # none of the demo's
STEPS, GUIDANCE = 30, 4.0


def draw_grid(rows: Sequence[Sequence[Image.Image]], labels: Sequence[str] | None, columns: int) -> Image.Image:
    """Cells in reading order; each cell stacks the images of one item (one from each of `rows`), label below."""
    side = rows[0][0].width
    label_height = 14 if labels else 0
    cell = side * len(rows) + label_height
    count = len(rows[0])
    grid = Image.new("RGB", (columns * (side + 4), -(-count // columns) * (cell + 4)), "white")
    pen = ImageDraw.Draw(grid)
    for index in range(count):
        left, top = index % columns * (side + 4) + 2, index // columns * (cell + 4) + 2
        for row_number, row in enumerate(rows):
            grid.paste(row[index], (left, top + row_number * side))
        if labels:
            pen.text((left + 2, top + side * len(rows) + 1), labels[index], fill="black")
    return grid


def to_image(pixels: torch.Tensor) -> Image.Image:
    array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array)


@torch.no_grad()
def reconstructions(vae: torch.nn.Module, paths: Sequence[Path], side: int = 128) -> Image.Image:
    """Originals above what the autoencoder makes of them."""
    originals = [Image.open(path).convert("RGB").resize((side, side), Image.Resampling.LANCZOS) for path in paths]
    made = []
    for original in originals:
        pixels = torch.from_numpy(np.asarray(original).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        made.append(to_image(vae.decode(vae.encode(pixels).latent_dist.mean).sample[0]))
    return draw_grid([originals, made], None, columns=12)


def samples(
    folder: Path, prompts: Sequence[str], seed: int = 0, size: tuple[int, int] = (128, 128)
) -> list[Image.Image]:
    """One image a prompt from a diffusers folder; prompt number i starts from the noise of seed + i."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        list(prompts),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        width=size[0],
        height=size[1],
        generator=[torch.Generator().manual_seed(seed + number) for number in range(len(prompts))],
    ).images


def curves(logs: dict[str, Path]) -> Image.Image:
    """Loss over minutes of every stage's log, and the autoencoder's PSNR, as one image."""
    import io
    import json

    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), dpi=90, layout="constrained")
    for number, (name, path) in enumerate(logs.items()):
        lines: list[dict] = []
        for text in path.read_text("utf-8").splitlines():
            line = json.loads(text)
            # a stage that continued from a checkpoint did some steps again: the first time does not count
            lines = [kept for kept in lines if kept["minutes"] < line["minutes"]] + [line]
        axes = figure.add_subplot(1, len(logs), number + 1)
        losses = [(line["minutes"], line["loss"]) for line in lines if "loss" in line]
        axes.semilogy(*zip(*losses, strict=True), color="tab:blue")
        axes.set(title=name, xlabel="minutes", ylabel="loss")
        if levels := [(line["minutes"], line["psnr"]) for line in lines if "psnr" in line]:
            right = axes.twinx()
            right.plot(*zip(*levels, strict=True), color="tab:orange", marker=".")
            right.set_ylabel("PSNR, dB (orange)")
    file = io.BytesIO()
    figure.savefig(file)
    return Image.open(file)
