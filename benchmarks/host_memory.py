"""Host memory of a run on a model of true size, and how soon its first step comes.

    python benchmarks/host_memory.py                                    # SDXL LoRA, bfloat16 base, from a float16 file
    python benchmarks/host_memory.py --family sd1 --kind full --frozen auto --optimizer adamw8bit
    python benchmarks/host_memory.py --layout folder --stored fp32

The weights are random and written tensor by tensor, which takes the memory of one tensor. A process of its own then trains
one step at a low resolution on the CPU and saves. What counts is its highest resident memory (VmHWM of /proc/self/status),
next to the bytes of the model in its final format. The file stays in the system's cache: this is the start from a warm disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from everydream_kit.config import TrainConfig
from everydream_kit.export.single_file_export import export_files, precision_dtype
from everydream_kit.models.family import ModelFiles
from everydream_kit.models.model_saving import files_of, write_folder
from everydream_kit.models.random_models import build_model
from everydream_kit.models.tensors import LazyTensor
from everydream_kit.preflight.skeleton import build_skeleton, read_architecture
from everydream_kit.training.base_model import choose_formats, precision_of

CHILD = """
import re, sys
from everydream_kit.cli import main
code = main(sys.argv[1:])
status = open("/proc/self/status").read()
print("VmHWM", re.search(r"VmHWM:\\s+(\\d+)", status)[1], flush=True)
sys.exit(code)
"""


def main() -> None:
    """Write the model, train one step, print the table's row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="sdxl")
    parser.add_argument("--kind", default="lora", choices=["lora", "full"])
    parser.add_argument("--frozen", default="bfloat16", choices=["auto", "float32", "float16", "bfloat16"])
    parser.add_argument("--layout", default="file", choices=["file", "ckpt", "folder"])
    parser.add_argument("--stored", default="fp16", choices=["fp16", "bf16", "fp32"])
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--optimizer", default="adamw")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = write_base(Path(folder), asked.family, asked.layout, asked.stored)
        settings = {
            "resume_ckpt": str(base),
            "data_root": str(write_image(Path(folder), asked.resolution)),
            "training_kind": asked.kind,
            "frozen_dtype": asked.frozen,
            "resolution": asked.resolution,
            "optimizer": asked.optimizer,
            "batch_size": 1,
            "max_steps": 1,
            "log_step": 1,
            "gradient_checkpointing": True,
            "num_workers": 0,
            "logdir": str(Path(folder) / "logs"),
        }
        file = Path(folder) / "train.json"
        file.write_text(json.dumps(settings), encoding="utf-8")
        final = final_bytes(TrainConfig(**settings), base)
        peak, seconds = train(file, Path(folder) / "logs")
    print(
        f"{asked.family} {asked.kind}, frozen {asked.frozen}, {asked.layout} in {asked.stored}: "
        f"model {final / 1e9:.2f} GB, VmHWM {peak / 1e9:.2f} GB ({peak / final:.2f} times), "
        f"first step done {seconds:.1f} s after the command"
    )


def write_base(folder: Path, family: str, layout: str, stored: str) -> Path:
    """Write random weights in the family's published shapes."""
    files: ModelFiles = files_of(build_model(family, device="meta"))
    tensors = {
        name: {key: _random(key, tensor, precision_dtype(stored)) for key, tensor in part.items()}
        for name, part in files.tensors.items()
    }
    shipped: dict[str, None] = {slot.tokenizer_folder: None for slot in files.family.text_encoders}
    files = dataclasses.replace(files, tensors=tensors, tokenizers=shipped)
    if layout == "folder":
        write_folder(files, folder / "base")
        return folder / "base"
    suffix = "ckpt" if layout == "ckpt" else "safetensors"
    return export_files(files, folder / f"base.{suffix}", stored)


def _random(name: str, tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """Small numbers; ones for the weights of norms."""

    def read() -> torch.Tensor:
        if len(tensor.shape) == 1:
            return torch.full(tensor.shape, float(name.endswith("weight")), dtype=dtype)
        numbers = (torch.randn(2**16) * 0.02).to(dtype)  # the same over and over: nobody looks at what is learned
        count = math.prod(tensor.shape)
        return numbers.repeat(-(-count // len(numbers)))[:count].reshape(tensor.shape)

    return LazyTensor(tensor.shape, dtype, read)


def write_image(folder: Path, side: int) -> Path:
    """One gray image with a caption in its name."""
    images = folder / "images"
    images.mkdir()
    Image.new("RGB", (side, side), "gray").save(images / "a gray square.png")
    return images


def final_bytes(config: TrainConfig, base: Path) -> int:
    """Bytes of the model in the formats that it is trained in."""
    skeleton = build_skeleton(read_architecture(base), choose_formats(config, precision_of(config, "cpu")))
    return sum(p.nbytes for module in skeleton.modules().values() for p in module.parameters())


def train(config: Path, logs: Path) -> tuple[int, float]:
    """Bytes of the highest resident memory, and seconds from the command to the end of the first step."""
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, "train", "--config", str(config), "--sample_steps", "none"],
        capture_output=True,
        text=True,
        check=False,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("VmHWM")]
    if done.returncode or not found:
        raise SystemExit(f"The run failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    events = [json.loads(line) for path in logs.glob("*/events.jsonl") for line in path.read_text("utf-8").splitlines()]
    first = next(event for event in events if event.get("kind") == "loss")
    return int(found[-1].split()[1]) * 1024, first["time"] - began


if __name__ == "__main__":
    main()
