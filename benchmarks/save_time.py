"""Saving a checkpoint next to writing the same bytes with safetensors.

A checkpoint is a model folder in float32, optimizer state, hashes of every file, and everything confirmed by the disk
before the rename. The floor writes as many bytes into as many safetensors files and makes the disk confirm each. Three
things in turns: the floor; a save at once, as at the end of a run; a save in the background, which first copies
everything to host memory. That copy is what training waits for; the rest happens while it continues.

    python benchmarks/save_time.py [--rounds 8] [--large]
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from step_overhead import make_run

from everydream_kit.models.model_saving import save_model
from everydream_kit.models.random_models import build_model
from everydream_kit.training.checkpoints import write_checkpoint
from everydream_kit.training.run import Run
from everydream_kit.training.run_snapshot import Snapshots


def large_base(folder: Path) -> Path:
    """A model of random weights whose checkpoint takes about a gigabyte."""
    text = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": 6}
    unet = {"block_out_channels": [96, 192, 384, 384], "attention_head_dim": 8, "cross_attention_dim": 256}
    vae = {"block_out_channels": [32, 64, 64, 64]}
    save_model(build_model("sd1", denoiser=unet, vae=vae, text_encoders=[{**text, "projection_dim": 256}]), folder)
    return folder


def make_bytes(source: Path) -> list[torch.Tensor]:
    """Tensors of the sizes of a checkpoint's files."""
    return [torch.zeros(path.stat().st_size, dtype=torch.uint8) for path in source.rglob("*") if path.is_file()]


def write_floor(folder: Path, tensors: list[torch.Tensor]) -> None:
    folder.mkdir()
    for number, tensor in enumerate(tensors):
        path = folder / f"{number}.safetensors"
        save_file({"bytes": tensor}, path)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def save(run: Run, folder: Path, *, copy: bool) -> float:
    """Save as the saver does. Returns the seconds of the copy."""
    started = time.perf_counter()
    snapshot = Snapshots(run).take(copy=copy)
    copied = time.perf_counter() - started
    write_checkpoint(
        folder,
        snapshot.write_model,
        tensors=snapshot.resume_tensors,
        state=snapshot.state,
        expected_bytes=snapshot.num_bytes,
    )
    return copied


def timed(folder: Path, work: Callable[[Path], object]) -> float:
    """Seconds of one piece of work; what it wrote is removed, and the disk is idle before the next."""
    started = time.perf_counter()
    work(folder)
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    os.sync()
    return seconds


def measure(folder: Path, rounds: int, base: Path | None) -> None:
    run = make_run(folder, resolution=128, batch_size=4, base=base)
    for group in run.learner.optimizer.param_groups:  # one step of zero gradients, so that the optimizer has its state
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    run.learner.optimizer.step()
    run.learner.optimizer.zero_grad(set_to_none=True)
    save(run, folder / "first", copy=False)
    tensors = make_bytes(folder / "first")
    copies: list[float] = []
    floor, at_once, background = [], [], []
    for _ in range(rounds):
        floor.append(timed(folder / "floor", lambda path: write_floor(path, tensors)))
        at_once.append(timed(folder / "at once", lambda path: save(run, path, copy=False)))
        background.append(timed(folder / "background", lambda path: copies.append(save(run, path, copy=True))))
    print(f"{sum(tensor.nbytes for tensor in tensors) / 1e6:.0f} MB in {len(tensors)} files, {rounds} rounds")
    print(f"{'writing the bytes, s':32}{statistics.median(floor):8.3f}")
    for name, seconds in (("saving at once, s", at_once), ("saving in the background, s", background)):
        ratios = [a / b for a, b in zip(seconds, floor, strict=True)]
        print(f"{name:32}{statistics.median(seconds):8.3f}   ratio {statistics.median(ratios):.2f}")
    print(f"{'of that training waits, s':32}{statistics.median(copies):8.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--large", action="store_true", help="about a gigabyte instead of 80 MB")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measure(folder, options.rounds, large_base(folder / "base") if options.large else None)


if __name__ == "__main__":
    main()
