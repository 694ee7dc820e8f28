"""Six short runs whose results are recorded, so that a change of the code's shape can show that it changes no result.

`python tests/support/recorded_runs.py` performs them with the code as it is and prints what they give; the test
compares with `tests/integration/recorded_runs.json`. Record again only when a result is meant to change, and say why in
the commit.

Exact on every machine: how many losses there are, the names of checkpoints, files, tensors and samples, dtypes, shapes
and sizes. Exact where the processor and the libraries are those of the record (`machine`): the bits of losses, of all
tensors and of the samples' pixels. Elsewhere kernels add in another order, so numbers are compared within the
tolerances below.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

LOSS_TOLERANCE = 1e-5
"""Relative. Between SSE and AVX-512 kernels of one processor losses differ by 4e-7, weights by 1e-6, blocks by 0.3."""
WEIGHT_TOLERANCE = 1e-5
"""Of statistics of a file's weights, relative to their root mean square."""
PIXEL_TOLERANCE = 1.0
"""Of the mean of a sample's 8 x 8 blocks, in steps of 255."""

COMMON = {
    "resolution": 64,
    "batch_size": 4,
    "max_steps": 3,
    "max_epochs": 4,
    "lr": 1e-4,
    "seed": 7,
    "log_step": 1,
    "num_workers": 0,
    "cache_variants": 1,
    "cond_dropout": 0.2,
    "flip_p": 0.5,
    "shuffle_tags": True,
    "sample_steps": 2,
    "optimizer": "adamw",
    "no_save_ckpt": True,
    "save_full_precision": True,
    "project_name": "recorded",
}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("sd1", {"lr_scheduler": "cosine", "save_every_n_steps": 2}),
    "lora": ("sd1", {"training_kind": "lora", "lora_rank": 4, "lora_text_encoder": True, "lora_dropout": 0.1}),
    "textual inversion": (
        "sd1",
        {"training_kind": "textual_inversion", "new_tokens": {"<zkx>": "red square"}, "cond_dropout": 0.0},
    ),
    "accumulation": (
        "sd2",
        {"grad_accum": 2, "batch_size": 2, "clip_grad_norm": 0.5, "min_snr_gamma": 5.0, "cache_latents": "off"},
    ),
    "sdxl": ("sdxl", {"timestep_sampling": "stratified", "pyramid_noise_discount": 0.2}),
    "validation and EMA": (
        "sd1",
        {
            "ema_decay_rate": 0.9,
            "ema_update_interval": 1,
            "ema_sample_ema_model": True,
            "ema_sample_nonema_model": True,
            "validation_config": {
                "auto_split_proportion": 0.25,
                "every_n_epochs": 0.5,
                "stabilize_training_loss": True,
                "stabilize_split_proportion": 0.25,
            },
        },
    ),
}
"""Family and settings of each."""


def machine() -> str:
    """What decides the last bits: the processor and the libraries that compute, decode and sample."""
    import torch

    words = [torch.backends.cpu.get_cpu_capability()]
    words += [f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "peft", "numpy", "pillow")]
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    wanted = ("vendor_id", "cpu family", "model\t", "stepping", "cache size", "flags")
    words += sorted({line for line in lines if line.startswith(wanted)})
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


def make_images(folder: Path) -> Path:
    """Twelve images of two aspect ratios with tags next to them."""
    from PIL import Image

    folder.mkdir()
    for number in range(12):
        height, width = [(96, 96), (96, 144)][number % 2]
        rows, columns = np.mgrid[:height, :width]
        pixels = np.stack([rows * 2, columns, (rows * columns + 40 * number) % 256], axis=-1) % 256
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"a <zkx> red square, flat, plain, number {number}", encoding="utf-8")
    return folder


def perform(name: str, folder: Path) -> dict[str, Any]:
    """Do one of the runs below an empty folder, on one thread, and describe what it wrote."""
    import torch
    from tiny_models import tiny_folder

    from everydream_kit.config import TrainConfig
    from everydream_kit.sessions import train

    family, extra = RUNS[name]
    prompts = folder / "prompts.json"
    samples = [{"prompt": "a red square, <zkx>", "seed": 3, "size": [64, 64]}]
    prompts.write_text(json.dumps({"num_inference_steps": 3, "cfgs": [4.0], "samples": samples}), encoding="utf-8")
    places = {
        "resume_ckpt": str(tiny_folder(family)),
        "data_root": str(make_images(folder / "images")),
        "sample_prompts": str(prompts),
        "logdir": str(folder / "logs"),
    }
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run = train(TrainConfig(**{**COMMON, **extra, **places}))
    finally:
        torch.set_num_threads(num_threads)
    return describe(run.folder)


def describe(folder: Path) -> dict[str, Any]:
    """What a run folder holds, read from the files alone."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text("utf-8").splitlines()]
    checkpoints = sorted(path for path in (folder / "ckpts").iterdir() if path.is_dir() and not path.is_symlink())
    return {
        "losses": [event["loss"] for event in events if event["kind"] == "loss"],
        "validation": [event["loss"] for event in events if event["kind"] == "validation"],
        "checkpoints": {path.name: _describe_checkpoint(path) for path in checkpoints},
        "samples": {path.name: _describe_image(path) for path in sorted((folder / "samples").glob("*.jpg"))},
    }


def _describe_checkpoint(folder: Path) -> dict[str, Any]:
    paths = sorted(path for path in folder.rglob("*.safetensors") if "resume" not in path.parts)
    return {path.relative_to(folder).as_posix(): _describe_tensors(path) for path in paths}


def _describe_tensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    names, values, bits = hashlib.sha256(), [], hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        names.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        values.append(tensor.double().flatten().numpy())
        bits.update(tensor.contiguous().numpy().tobytes())
    together = np.concatenate(values)
    # The weighted sum sees what mean and root mean square do not: values that changed places.
    weighted = np.cos(np.arange(together.size, dtype=np.float64)) @ together / math.sqrt(together.size)
    statistics = [float(together.mean()), float(np.sqrt((together**2).mean())), float(weighted)]
    return {"names": names.hexdigest(), "statistics": statistics, "bits": bits.hexdigest()}


def _describe_image(path: Path) -> dict[str, Any]:
    from PIL import Image

    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    height, width = (side // 8 * 8 for side in pixels.shape[:2])
    blocks = pixels[:height, :width].reshape(height // 8, 8, width // 8, 8, 3).mean(axis=(1, 3, 4))
    return {
        "size": list(pixels.shape),
        "blocks": np.round(blocks, 1).flatten().tolist(),
        "bits": hashlib.sha256(pixels.tobytes()).hexdigest(),
    }


def main() -> None:
    """Print the results of all runs."""
    record: dict[str, Any] = {"machine": machine()}
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            record[name] = perform(name, Path(folder))
    lines = json.dumps(record, indent=1)
    print(re.sub(r"\n\s+(-?\d)|(?<=\d)\n\s+(?=\])", r" \1", lines))  # numbers of a list on one line


if __name__ == "__main__":
    main()
