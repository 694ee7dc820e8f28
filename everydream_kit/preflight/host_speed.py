"""Seconds that this machine's host needs to launch one kernel of a training step, measured next to its GPU.

The step of a tiny UNet does hardly any arithmetic, so what it takes is Python, dispatch and launching: the host's share of a real
step, which has the same kinds of operations. Its time over its number of launches is the figure that `step_time` multiplies.
A process of its own measures it (`python -m everydream_kit.preflight.host_speed`), because a CUDA context takes half a GiB of the
GPU until its process ends; the figure is kept on disk for each GPU and torch.

Not here: how many launches a step has (`rehearsal` counts them).
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everydream_kit.atomic import write_atomic
from everydream_kit.strict_json import read_small_object

if TYPE_CHECKING:
    from everydream_kit.preflight.gpus import GpuSpec

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 3
MEASURED_STEPS = 7
TIMEOUT_SECONDS = 120
"""For the whole process: 10 to 20 s of imports and kernel loading are usual."""
FASTEST, SLOWEST = 1e-7, 1e-2
"""Seconds a launch outside of which a kept figure is taken as damaged."""


def launch_seconds_here(gpu_spec: GpuSpec, folder: Path) -> float | None:
    """Seconds a launch on this machine, measured or kept; None where this machine does not have that GPU.

    Args:
        gpu_spec: GPU that the plan is for.
        folder: where figures are kept.
    """
    from everydream_kit.preflight.gpus import this_gpu

    here = this_gpu()
    if here is None or here.name != gpu_spec.name:
        return None
    kept = folder / "host_speed.json"
    key = f"{gpu_spec.name}, {os.cpu_count()} cores, torch {metadata.version('torch')}"
    figures = read_small_object(kept)
    seconds = figures.get(key)
    if isinstance(seconds, float) and FASTEST < seconds < SLOWEST:
        return seconds
    seconds = _ask_process("cuda")
    if seconds is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, json.dumps({**figures, key: seconds}, indent=1))
    return seconds


def measure_launch_seconds(device_type: str) -> float:
    """Time the forward and backward pass of a tiny UNet; the median of a few, over its number of launches.

    Args:
        device_type: "cuda" or "cpu" (where the little arithmetic counts, too).
    """
    import torch

    from everydream_kit.models.random_models import build_tiny_model
    from everydream_kit.preflight.tracker import LaunchCounter

    unet: Any = build_tiny_model("sd1").unet.to(device_type).train()
    latents = torch.randn(1, 4, 8, 8, device=device_type)
    timesteps = torch.zeros(1, dtype=torch.long, device=device_type)
    text = torch.randn(1, 77, unet.config.cross_attention_dim, device=device_type)

    def step() -> float:
        started = time.perf_counter()
        with torch.autocast(device_type, torch.float16 if device_type == "cuda" else torch.bfloat16):
            prediction = unet(latents, timesteps, encoder_hidden_states=text).sample
        prediction.float().square().mean().backward()
        unet.zero_grad(set_to_none=True)
        if device_type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    for _ in range(WARM_UP_STEPS):
        step()
    with LaunchCounter() as counter:
        step()
    return float(statistics.median([step() for _ in range(MEASURED_STEPS)]) / counter.launches.total())


def _ask_process(device_type: str) -> float | None:
    """Measure in a process that gives its memory back; None, with a warning, where it cannot."""
    command = [
        sys.executable,
        *(["-P"] if sys.version_info >= (3, 11) else []),
        "-m",
        "everydream_kit.preflight.host_speed",
        device_type,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True)
        return float(done.stdout.split()[-1])
    except (subprocess.SubprocessError, OSError, ValueError, IndexError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = lines[-1] if lines else error
        logger.warning("This machine's launch cost was not measured, so the plan assumes the usual one (%s).", reason)
        return None


if __name__ == "__main__":
    sys.stdout.write(f"{measure_launch_seconds(sys.argv[1])}\n")
