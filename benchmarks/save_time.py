"""Saving a checkpoint beside writing the same bytes with safetensors.

A checkpoint is a model folder in float32, optimizer state, hashes of every file, and everything on the disk before the rename.
The floor writes as many bytes into as many safetensors files and makes the disk confirm them. Both in turns; also printed is the
share of a save that training waits for, which is the copy to host memory.

    python benchmarks/save_time.py [--rounds 8]
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from step_overhead import make_run

from everydream_kit.training.checkpoints import write_checkpoint
from everydream_kit.training.run import Run


def make_bytes(source: Path) -> list[torch.Tensor]:
    """Tensors of the sizes of a checkpoint's files."""
    return [torch.empty(path.stat().st_size, dtype=torch.uint8) for path in source.rglob("*") if path.is_file()]


def write_floor(folder: Path, tensors: list[torch.Tensor]) -> None:
    folder.mkdir()
    for number, tensor in enumerate(tensors):
        path = folder / f"{number}.safetensors"
        save_file({"bytes": tensor}, path)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def save(run: Run, folder: Path) -> float:
    """Save as the saver does. Returns the seconds for which training would have waited."""
    started = time.perf_counter()
    snapshot = run.snapshot(copy=True)
    waited = time.perf_counter() - started
    write_checkpoint(
        folder,
        snapshot.write_model,
        tensors=snapshot.resume_tensors,
        state=snapshot.state,
        expected_bytes=snapshot.num_bytes,
    )
    return waited


def measure(folder: Path, rounds: int) -> None:
    run = make_run(folder, resolution=128, batch_size=4)
    for group in run.optimizer.param_groups:  # one step of zero gradients, so that the optimizer has its state
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()
    save(run, folder / "first")
    tensors = make_bytes(folder / "first")
    ours, floor, waited = [], [], []
    for number in range(rounds):
        started = time.perf_counter()
        waited.append(save(run, folder / f"ours{number}"))
        ours.append(time.perf_counter() - started)
        started = time.perf_counter()
        write_floor(folder / f"floor{number}", tensors)
        floor.append(time.perf_counter() - started)
        shutil.rmtree(folder / f"ours{number}")
        shutil.rmtree(folder / f"floor{number}")
    megabytes = sum(tensor.nbytes for tensor in tensors) / 1e6
    ratios = [a / b for a, b in zip(ours, floor, strict=True)]
    print(f"{megabytes:.0f} MB in {len(tensors)} files")
    print(f"{'writing the bytes, s':32}{statistics.median(floor):8.3f}")
    print(f"{'saving, s':32}{statistics.median(ours):8.3f}   ratio {statistics.median(ratios):.2f}")
    print(f"{'of that training waits, s':32}{statistics.median(waited):8.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), options.rounds)


if __name__ == "__main__":
    main()
