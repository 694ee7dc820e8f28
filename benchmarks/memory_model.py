"""Estimated against measured peak memory, on the CPU: a fresh process for each configuration, within 10 % wanted.

    python benchmarks/memory_model.py                 every case, as a table
    python benchmarks/memory_model.py --only lora     cases whose name holds a word

The model is an SD 1.x of a third of the usual width (about 100 M weights), so that the interpreter's own memory does
not matter. What is measured is the process's resident memory at its highest (VmHWM, reset by /proc/self/clear_refs
before the phase) less what was resident before the model was built, after everything was imported and a tiny model had
trained, sampled and encoded. glibc gives freed memory back at once (MALLOC_ settings below). Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WIDTHS: dict[str, Any] = {
    "denoiser": {"block_out_channels": [96, 192, 384, 384], "cross_attention_dim": 256},
    "vae": {"block_out_channels": [32, 64, 128, 128], "layers_per_block": 1},
    "text_encoders": [
        {
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_attention_heads": 4,
            "num_hidden_layers": 6,
            "projection_dim": 256,
        }
    ],
}
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_ARENA_MAX": "1",
}
BASE: dict[str, Any] = {"resolution": 256, "batch_size": 2, "optimizer": "adamw"}
CASES: dict[str, dict[str, Any]] = {
    "adamw, batch 2": {},
    "batch 4": {"batch_size": 4},
    "batch 8": {"batch_size": 8},
    "384 px": {"resolution": 384},
    "384 px, checkpointing": {"resolution": 384, "gradient_checkpointing": True},
    "batch 8, checkpointing": {"batch_size": 8, "gradient_checkpointing": True},
    "bf16 autocast, batch 4": {"batch_size": 4, "amp_dtype": "bf16"},
    "bf16 autocast, checkpointing": {"batch_size": 4, "amp_dtype": "bf16", "gradient_checkpointing": True},
    "bf16 weights, batch 4": {"batch_size": 4, "weight_dtype": "bfloat16"},
    "sgd": {"optimizer": "sgd", "lr": 1e-4},
    "lion": {"optimizer": "lion"},
    "adafactor": {"optimizer": "adafactor"},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "fused backward": {"fused_backward": True},
    "ema": {"ema_decay_rate": 0.99},
    "lora, batch 4": {"training_kind": "lora", "lora_rank": 16, "batch_size": 4},
    "lora, text too, bf16": {"training_kind": "lora", "lora_rank": 64, "lora_text_encoder": True, "amp_dtype": "bf16"},
    "unet only, sliced attention": {"disable_textenc_training": True, "attn_type": "slice", "batch_size": 4},
    "accumulation, pixels": {"grad_accum": 2, "cache_latents": "off"},
    "sampling": {"phase": "sampling", "optimizer": "sgd"},
    "latents for the disk": {"phase": "latent caching", "resolution": 384, "cache_latents": "disk"},
    "latents in memory": {"phase": "latent caching", "resolution": 384, "optimizer": "sgd"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name holds one of these, separated by |")
    parser.add_argument("--measure", help="one case, as JSON: what the parent starts")
    parser.add_argument("--trace", action="store_true", help="print the phase's bytes by category")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(json.loads(arguments.measure))))
        return
    print(f"{'case':40} {'estimated':>9} {'measured':>9} {'ratio':>7}   seconds")
    ratios = []
    for name, changes in CASES.items():
        if not any(word in name for word in arguments.only.split("|")):
            continue
        started = time.monotonic()
        estimated, by_category = estimate(dict(changes))
        measured = run_child(changes)
        ratios.append(estimated / measured)
        mark = "" if abs(ratios[-1] - 1) <= 0.1 else "   <- more than 10 %"
        mib = [f"{number / 2**20:6.0f} M" for number in (estimated, measured)]
        print(
            f"{name:40} {mib[0]:>9} {mib[1]:>9} {ratios[-1]:7.3f}   {time.monotonic() - started:.0f}{mark}", flush=True
        )
        if arguments.trace:
            print("   ", {key: f"{value / 2**20:.0f} M" for key, value in by_category.items()})
    inside = sum(abs(ratio - 1) <= 0.1 for ratio in ratios)
    print(f"{inside} of {len(ratios)} within 10 %; from {min(ratios):.3f} to {max(ratios):.3f}")


def run_child(changes: dict[str, Any]) -> int:
    """Measure one case in a process of its own."""
    environment = {**os.environ, **MALLOC, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--measure", json.dumps(changes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{changes}: {done.stderr[-3000:]}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def config_of(changes: dict[str, Any], folder: str) -> Any:
    from everydream_kit.config import TrainConfig

    changes.pop("phase", None)
    return TrainConfig(resume_ckpt="none", logdir=folder, **{"sample_steps": 10, **BASE, **changes})


def estimate(changes: dict[str, Any]) -> tuple[int, dict[str, int]]:
    """What the pre-flight says about a case."""
    from everydream_kit.preflight.memory_estimate import estimate_memory
    from everydream_kit.preflight.skeleton import shipped_architecture

    phase = changes.get("phase", "training step")
    with tempfile.TemporaryDirectory() as folder:
        estimate = estimate_memory(
            config_of(changes, folder), device="cpu", architecture=shipped_architecture("sd1", **WIDTHS)
        )
    found = next(one for one in estimate.phases if one.name == phase)
    return found.peak_bytes, found.by_category


def measure(changes: dict[str, Any]) -> int:
    """Peak resident bytes of the case's phase, in this process."""
    import torch

    from everydream_kit.models.random_models import build_model, build_tiny_model

    torch.set_num_threads(1)
    phase = changes.get("phase", "training step")
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(changes, folder)
        go_through(build_tiny_model("sd1"), config.replace(resolution=64, batch_size=1), Path(folder), phase)
        before = resident_after_cleaning()
        model = build_model("sd1", **WIDTHS)
        peak = go_through(model, config, Path(folder), phase)
    return peak - before


def go_through(model: Any, config: Any, folder: Path, phase: str) -> int:
    """Two optimizer steps and then the phase; the peak of the second step, or of the phase."""
    import torch

    from everydream_kit.data.buckets import largest_bucket
    from everydream_kit.models.encoding import encode_moments
    from everydream_kit.models.sampling import SamplePrompt, sample_images
    from everydream_kit.preflight.memory_estimate import estimate_latent_mode
    from everydream_kit.preflight.rehearsal import CACHED_TOGETHER

    bucket = largest_bucket(config.resolutions)
    latents = estimate_latent_mode(config)
    crops = torch.zeros(CACHED_TOGETHER.get(latents, 0), 3, bucket[1], bucket[0], dtype=torch.uint8)
    if phase == "latent caching" and latents == "disk":
        resident_after_cleaning()
        encode_moments(model, crops)
        return status("VmHWM")
    if config.weight_dtype == "bfloat16":
        for module in (model.unet, *model.text_encoders):
            module.to(torch.bfloat16)
    run, batch = build(model, config, folder, bucket)
    train_step(run, batch)
    resident_after_cleaning()
    if phase == "sampling":
        side = max(config.resolutions)
        sample_images(
            model, [SamplePrompt("a cat", width=side, height=side, cfgs=(7.0, 6.0, 5.0, 4.0))], num_inference_steps=2
        )
    elif phase == "latent caching":
        encode_moments(model, crops)
    else:
        train_step(run, batch)
    return status("VmHWM")


def build(model: Any, config: Any, folder: Path, bucket: tuple[int, int]) -> tuple[Any, Any]:
    """A run around the model, and its batch."""
    import torch

    from everydream_kit.preflight.rehearsal import make_batch, stand_in_dataset
    from everydream_kit.runs import RunFolder
    from everydream_kit.training.journal import Journal
    from everydream_kit.training.ranks import Ranks
    from everydream_kit.training.run_builder import assemble_run

    run = assemble_run(
        config.replace(cache_latents="off"),
        RunFolder(folder),
        Journal(RunFolder(folder), writes=False),
        Ranks(0, 1, torch.device("cpu")),
        model=model,
        dataset=stand_in_dataset(config, bucket),
        seed=1,
    )
    return run, make_batch(bucket, config.batch_size, with_moments=config.cache_latents != "off")


def train_step(run: Any, batch: Any) -> None:
    """One optimizer step as the loop makes it."""
    from everydream_kit.data.records import StepBatches

    num = run.config.grad_accum
    work = StepBatches(0, 0, 1, num * len(batch.paths), num * len(batch.paths), [batch] * num)
    run.learner.set_learning_rates(0)
    for _ in range(num):
        run.learner.backward(batch, work, 0)
    run.learner.update_weights(0)
    if run.learner.ema is not None:
        run.learner.ema.update(1)


def resident_after_cleaning() -> int:
    """Give back what is free, begin a new high-water mark, and say what is resident."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
