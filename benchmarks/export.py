"""Export of a full-size SD 1.5 next to writing the same bytes with safetensors: seconds, processor seconds and peak
memory, interleaved.

    python benchmarks/export.py [--family sd1] [--rounds 3] [--precision fp16]

Random weights of the true shapes are written once as a diffusers folder (float32) in a temporary folder. Then, in
turn and each in a process of its own: `export_checkpoint`, and `safetensors.torch.save_file` of the very tensors of
that export, loaded beforehand; both synced to disk. Peak memory is above what is there before either begins; Linux
only. Needs 12 GB of disk and 6 GB of memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PEAK = """
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**20

def reset_peak():  # to what is in memory now
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return peak()
"""
EXPORT = (
    PEAK
    + """
import sys, time
from everydream_kit.export.single_file_export import export_checkpoint
from everydream_kit.models.loading import open_model
open_model(sys.argv[1])  # imports, and the headers
before = reset_peak()
start, worked = time.perf_counter(), time.process_time()
export_checkpoint(sys.argv[1], sys.argv[2], sys.argv[3])
print(time.perf_counter() - start, time.process_time() - worked, peak() - before)
"""
)
WRITE = (
    PEAK
    + """
import os, sys, time
from safetensors.torch import load_file, save_file
before = reset_peak()
tensors = {name: tensor.clone() for name, tensor in load_file(sys.argv[1]).items()}
start, worked = time.perf_counter(), time.process_time()
save_file(tensors, sys.argv[2])
with open(sys.argv[2], "rb+") as file:
    os.fsync(file.fileno())
print(time.perf_counter() - start, time.process_time() - worked, peak() - before)
"""
)


def measure(script: str, *arguments: str) -> tuple[float, float, float]:
    """Seconds, seconds of all processors, and GiB of peak memory above what the imports took."""
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    seconds, worked, memory = map(float, done.stdout.split()[-3:])
    return seconds, worked, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", default="sd1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="fp16")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run(Path(name), options.family, options.rounds, options.precision)


def run(root: Path, family: str, rounds: int, precision: str) -> None:
    from everydream_kit.models.model_saving import save_model
    from everydream_kit.models.random_models import build_model

    save_model(build_model(family), root / "model")
    compare(root, family, rounds, precision)


def compare(root: Path, family: str, rounds: int, precision: str) -> None:
    """Measure in turn, with the model in the folder `model`, and print a table."""
    source, exported, written = str(root / "model"), str(root / "a.safetensors"), str(root / "b.safetensors")
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(measure(EXPORT, source, exported, precision))
        theirs.append(measure(WRITE, exported, written))
        os.remove(written)
    size = os.path.getsize(exported) / 2**30
    print(f"{family}, {precision}, file of {size:.2f} GiB, {rounds} rounds, median (range)")
    print(f"{'':24}{'seconds':>22}{'processor':>12}{'peak GiB':>12}")
    for label, rows in (("export_checkpoint", ours), ("safetensors save_file", theirs)):
        seconds = [row[0] for row in rows]
        spread = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} - {max(seconds):.2f})"
        worked = statistics.median(row[1] for row in rows)
        print(f"{label:24}{spread:>22}{worked:>12.2f}{max(row[2] for row in rows):>12.2f}")
    ratios = [one[0] / other[0] for one, other in zip(ours, theirs, strict=True)]
    print(f"ratio of each round: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")


if __name__ == "__main__":
    main()
