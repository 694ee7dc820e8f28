"""A whole epoch, from image files on the disk to updated weights, next to the bare loop on ready tensors.

The bare loop has latents, captions, noise and timesteps ready and does forward, backward and fused AdamW; it is the
floor of the epoch with cached latents. For the epoch without the cache the floor encodes the images with the VAE in
every step as well. Each side runs one epoch of 96 images in turns.

    python benchmarks/epoch_throughput.py [--rounds 4]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from step_overhead import bare_steps, square_images

from everydream_kit.config import TrainConfig
from everydream_kit.data.records import StepBatches
from everydream_kit.demo import base_model_path
from everydream_kit.models.encoding import encode_moments
from everydream_kit.runs import RunFolder
from everydream_kit.training.control import StopSignal
from everydream_kit.training.journal import Journal
from everydream_kit.training.listeners import build_listeners
from everydream_kit.training.loop import train_loop
from everydream_kit.training.position import Position
from everydream_kit.training.ranks import Ranks
from everydream_kit.training.reports import ProgressBar
from everydream_kit.training.run import Run
from everydream_kit.training.run_builder import build_run


def make_run(folder: Path, resolution: int, cache: str) -> Run:
    images = folder / "pictures"
    if not images.is_dir():
        square_images(images, resolution)
        (images / "multiply.txt").write_text("3")
    config = TrainConfig(
        resume_ckpt=str(base_model_path()),
        data_root=str(images),
        resolution=resolution,
        batch_size=4,
        max_epochs=1,
        logdir=str(folder / cache),
        cache_latents=cache,
        cache_variants=1,
        num_workers=0 if cache == "memory" else 1,
        sample_steps=None,
        no_save_ckpt=True,
        ckpt_every_n_minutes=10_000.0,
        optimizer="adamw",
    )
    run_folder = RunFolder.create(folder / cache, "bench")
    return build_run(config, run_folder, Journal(run_folder), Ranks.find())


def our_epoch(run: Run) -> float:
    """One epoch through the trainer's loop and listeners; saving is measured elsewhere."""
    run.position = Position()
    stop = StopSignal()
    listeners = [entry for entry in build_listeners(run, stop) if not isinstance(entry, ProgressBar)]
    for listener in listeners:
        listener.on_start(run)
    started = time.perf_counter()
    train_loop(run, listeners, stop)
    return time.perf_counter() - started


def bare_epoch(run: Run, step: Callable[[StepBatches], None], ready: list[StepBatches], *, encodes: bool) -> float:
    started = time.perf_counter()
    for work in ready:
        if encodes:
            (batch,) = work.batches
            batch.moments = encode_moments(run.learner.model, batch.pixels)
        step(work)
    return time.perf_counter() - started


def collect(run: Run) -> list[StepBatches]:
    run.position = Position()
    ready = []
    for work in run.batches():
        ready.append(work)
        run.position = run.position.after(work)
    return ready


def measure(folder: Path, rounds: int, resolution: int) -> None:
    print(f"{'':28}{'epoch, s':>10}{'bare, s':>10}{'ratio':>8}")
    for cache, encodes in (("memory", False), ("off", True)):
        ours, bare = make_run(folder, resolution, cache), make_run(folder, resolution, cache)
        ready, step = collect(bare), bare_steps(bare)
        our_epoch(ours)
        times = [(our_epoch(ours), bare_epoch(bare, step, ready, encodes=encodes)) for _ in range(rounds)]
        ratio = statistics.median(a / b for a, b in times)
        medians = [statistics.median(column) for column in zip(*times, strict=True)]
        title = "cached latents" if cache == "memory" else "encoding every step"
        print(f"{title:28}{medians[0]:10.2f}{medians[1]:10.2f}{ratio:8.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--resolution", type=int, default=128)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), options.rounds, options.resolution)


if __name__ == "__main__":
    main()
