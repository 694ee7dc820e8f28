"""How long a step takes, and where each number comes from: measured here, measured by somebody and published, or computed.

The order is that of trust: a run on the same GPU with the same settings; what `everydream bench` measured here; a published
figure that matches in every point (`speeds.json`, with its source); else a computed one. The forward and backward passes take
as long as the slower of two: the GPU with its arithmetic and memory, or the host with launching the kernels. A small batch on a
fast GPU waits for the host, which is why one launch's cost is measured on the machine (`host_speed`). The update follows;
bitsandbytes waits for the GPU there.

The formula meets every figure of `speeds.json` to within a fifth, each host's launch cost being fitted to its own figures.
They come from four GPUs, so a computed time is right to about a third where the host's launch cost was not measured.

Not here: what else a run spends time on (`planning`).
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from everydream_kit.config import facts
from everydream_kit.preflight.gpus import GpuSpec, recognize
from everydream_kit.runs import RunFolder, list_runs
from everydream_kit.strict_json import read_small_object

if TYPE_CHECKING:
    from everydream_kit.config import TrainConfig
    from everydream_kit.preflight.memory_records import MemoryEstimate

Basis = Literal["measured here", "published", "computed"]

PEAK_SHARE = 0.31
"""Of a GPU's peak that matrix products and convolutions reach."""
FLOPS_PER_BYTE = 190.0
"""Operations of a step in half precision for each byte that it moves; half as many in float32. With FlashAttention, from
Ampere on: a batch of 16 on an H100 (docs/gpu.md)."""
OLD_FLOPS_PER_BYTE = 26.0
"""The same for older GPUs, which have no FlashAttention: fitted to a T4's figures."""
BYTES_PER_PARAMETER = 50.0
"""Moved in one optimizer step for each trained parameter: the update itself, casting, unscaling, zeroing."""
LAUNCH_SECONDS = 50e-6
"""Of the host for one kernel, where it was not measured: 30 to 100 microseconds were seen on four hosts."""
LINK_SHARE = 0.75
"""Of the peak of the link between host and GPU that copies from pinned memory reach: 12 of 16 GB/s and 25 of 32 are seen."""
LINK_BYTES = 32e9
"""Peak of that link where it is not known, bytes a second: PCIe 4.0 with 16 lanes."""
CPU_SHARE = 0.35
"""Of the speed of a large matrix product that a training step reaches on a CPU (tiny SD 1.x at 128 px, two cores)."""

SCALED = ("batch_size", "grad_accum")
"""Settings that affect the speed and may differ between two runs: their images per second are compared."""
FULL_SIZE_PARAMETERS = {"sd1": 1_066_000_000, "sd2": 1_290_000_000, "sdxl": 3_470_000_000}
"""UNet, VAE and text encoders together. Published figures are about these; smaller models of a family are other models."""
RUNS_LOOKED_AT = 20
BENCH_FILE = Path(".edk_cache") / "preflight" / "bench.json"
"""What `everydream bench` measured, next to the run folders."""


@dataclass(frozen=True)
class StepSeconds:
    """The time of one optimizer step.

    Attributes:
        seconds: of one step, all micro-batches together.
        basis: where the figure is from.
        source: in words: the run, who published it and where, or how it was computed.
    """

    seconds: float
    basis: Basis
    source: str


def estimate_step(
    config: TrainConfig,
    gpu_spec: GpuSpec | None,
    estimate: MemoryEstimate | None,
    *,
    cpu_flops: float | None = None,
    launch_seconds: float | None = None,
) -> StepSeconds | None:
    """The best that is known about a step's time, or None where nothing is.

    Args:
        config: settings with a number as batch size.
        gpu_spec: that will train; None for a CPU.
        estimate: the step's work; without it nothing can be computed.
        cpu_flops: operations a second of this CPU; measured if it is needed and not given.
        launch_seconds: of the GPU's host for one kernel, where it was measured.
    """
    found = measured_here(config, gpu_spec)
    if found is None and gpu_spec is not None and estimate is not None:
        found = (
            benchmarked(config, gpu_spec, estimate.num_parameters)
            or published(config, gpu_spec, estimate.num_parameters)
            or compute(config, gpu_spec, estimate, launch_seconds)
        )
    if found is None and gpu_spec is None and estimate is not None:
        rate = cpu_flops or measure_cpu()
        source = (
            f"{estimate.step_flops / 1e9:,.0f} billion operations at {CPU_SHARE:.0%} of a matrix product's speed here"
        )
        found = StepSeconds(estimate.step_flops / (rate * CPU_SHARE), "computed", source)
    return found


def measured_here(config: TrainConfig, gpu_spec: GpuSpec | None) -> StepSeconds | None:
    """From the latest run in `logdir` on the same GPU with the same settings; other batch sizes are scaled by images."""
    names = [name for name, one in facts().items() if "speed" in one.affects and name not in SCALED]
    fields, values = type(config).model_fields, config.model_dump(mode="json")
    wanted = {name: values[name] for name in names}
    for run in reversed(list_runs(config.logdir)[-RUNS_LOOKED_AT:]):
        settings, environment = run.settings(), run.environment()
        theirs = {name: settings.get(name, fields[name].default) for name in names}
        if theirs != wanted or not _same_device(environment, gpu_spec):
            continue
        images_per_second = _images_per_second(run)
        if images_per_second:
            assert isinstance(config.batch_size, int)
            return StepSeconds(
                config.batch_size * config.grad_accum / images_per_second, "measured here", f"run {run.name}"
            )
    return None


def published(config: TrainConfig, gpu_spec: GpuSpec, num_parameters: int) -> StepSeconds | None:
    """A published figure for just this: GPU, model, resolution, batch, precision, optimizer, what is trained."""
    wanted = configuration(config, gpu_spec, _model_of(num_parameters))
    for entry in published_speeds():
        if not entry.get("superseded") and wanted.items() <= {**dict.fromkeys(wanted), **entry}.items():
            return StepSeconds(entry["seconds"], "published", f"{entry['by']} ({entry['source']})")
    return None


def benchmarked(config: TrainConfig, gpu_spec: GpuSpec, num_parameters: int) -> StepSeconds | None:
    """What `everydream bench` measured on this machine for just this, as `published` compares."""
    wanted = configuration(config, gpu_spec, _model_of(num_parameters))
    for entry in read_bench(Path(config.logdir)):
        seconds = entry.get("seconds")
        if isinstance(seconds, float) and seconds > 0 and wanted.items() <= {**dict.fromkeys(wanted), **entry}.items():
            return StepSeconds(seconds, "measured here", f"everydream bench ({entry.get('source')})")
    return None


def read_bench(logdir: Path) -> list[dict[str, Any]]:
    """The figures of `everydream bench` that are kept next to the run folders; none where there are none."""
    entries = read_small_object(logdir / BENCH_FILE).get("measurements")
    return [one for one in entries if isinstance(one, dict)] if isinstance(entries, list) else []


def configuration(config: TrainConfig, gpu_spec: GpuSpec, model: str | None) -> dict[str, Any]:
    """The points in which two figures must agree to be about the same, as `speeds.json` names them."""
    mixed, lora = config.amp and not config.disable_amp, config.training_kind == "lora"
    recomputes_some = config.gradient_checkpointing and config.checkpointing_share < 1
    return {
        "card": gpu_spec.name,
        "model": model,
        "kind": config.training_kind,
        "resolution": config.resolutions[0] if len(config.resolutions) == 1 else None,
        "batch_size": config.batch_size,
        "grad_accum": config.grad_accum,
        "precision": "fp32" if not mixed else half_precision(config, gpu_spec),
        "gradient_checkpointing": config.gradient_checkpointing,
        "checkpointing_share": config.checkpointing_share if recomputes_some else None,
        "cuda_graphs": True if config.cuda_graphs == "on" else None,  # older entries do not say it
        "optimizer": config.optimizer or "adamw8bit",
        "trains_text": config.lora_text_encoder if lora else not config.disable_textenc_training,
        "lora_rank": config.lora_rank if lora else None,
        "latents_cached": config.cache_latents != "off",
        **({"blocks_to_swap": config.blocks_to_swap} if config.blocks_to_swap else {}),
    }


def _model_of(num_parameters: int) -> str | None:
    """Name of the family of that full size."""
    return next((m for m, n in FULL_SIZE_PARAMETERS.items() if abs(num_parameters - n) < 0.06 * n), None)


def compute(
    config: TrainConfig, gpu_spec: GpuSpec, estimate: MemoryEstimate, launch_seconds: float | None = None
) -> StepSeconds | None:
    """The slower of GPU and host for the passes, and the update; None for a GPU whose speed is not known.

    Args:
        launch_seconds: of the host for one kernel; by default `LAUNCH_SECONDS`.
    """
    if not gpu_spec.bandwidth_bytes:
        return None
    mixed = config.amp and not config.disable_amp
    launch = LAUNCH_SECONDS if launch_seconds is None else launch_seconds
    gpu, host = work_seconds(gpu_spec, estimate.step_flops, mixed=mixed), estimate.pass_launches * launch
    update = estimate.num_trained_parameters * BYTES_PER_PARAMETER / gpu_spec.bandwidth_bytes
    update += estimate.update_launches * launch
    copies = estimate.copied_bytes / ((gpu_spec.link_bytes or LINK_BYTES) * LINK_SHARE)
    precision = half_precision(config, gpu_spec) if mixed else "fp32"
    measured = "measured" if launch_seconds is not None else "assumed"
    source = (
        f"the GPU needs {gpu:.2g} s for {estimate.step_flops / 1e12:.1f} teraflops in {precision}, the host {host:.2g} s for "
        f"{estimate.pass_launches:,} kernels at {launch * 1e6:.0f} \u00b5s ({measured}){_in_words(estimate, copies)}; the slower "
        f"counts, and the update's {update:.2g} s"
    )
    return StepSeconds(max(gpu, host, copies) + update, "computed", source)


def _in_words(estimate: MemoryEstimate, copies: float) -> str:
    """The time of bringing blocks from host memory, where any wait there."""
    if not estimate.copied_bytes:
        return ""
    return f", the link {copies:.2g} s for {estimate.copied_bytes / 2**30:.1f} GiB of swapped blocks"


def work_seconds(gpu_spec: GpuSpec, flops: float, *, mixed: bool = True) -> float:
    """Seconds that the GPU needs for so many operations of such a model."""
    peak = gpu_spec.half_tflops if mixed else gpu_spec.fp32_tflops
    flops_per_byte = FLOPS_PER_BYTE if gpu_spec.has_bf16 else OLD_FLOPS_PER_BYTE
    bytes_moved = flops / flops_per_byte * (1 if mixed else 2)
    return flops / (peak * 1e12 * PEAK_SHARE) + bytes_moved / gpu_spec.bandwidth_bytes


def half_precision(config: TrainConfig, gpu_spec: GpuSpec) -> str:
    """The format that mixed precision means here: `bf16` or `fp16`."""
    return config.amp_dtype if config.amp_dtype != "auto" else "bf16" if gpu_spec.has_bf16 else "fp16"


@lru_cache(maxsize=1)
def published_speeds() -> tuple[dict[str, Any], ...]:
    """The entries of `speeds.json`."""
    text = (Path(__file__).parent / "speeds.json").read_text(encoding="utf-8")
    return tuple(json.loads(text)["measurements"])


@lru_cache(maxsize=1)
def measure_cpu(size: int = 768, repeats: int = 4) -> float:
    """Operations a second of a square float32 matrix product on this CPU, the best of a few; under a tenth of a second each."""
    import torch

    left = torch.ones(size, size)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _same_device(facts: dict[str, Any], gpu_spec: GpuSpec | None) -> bool:
    """Whether a run's `environment.json` names this GPU, or a CPU where there is none."""
    device = str(facts.get("device", ""))
    if gpu_spec is None:
        return device.startswith("cpu")
    return device == gpu_spec.name or recognize(device, gpu_spec.memory_bytes).name == gpu_spec.name


def _images_per_second(run: RunFolder) -> float | None:
    """Median over a run's log points but the first, which pays for warming up; its status where it has logged one only."""
    points = [event.get("images_per_second") for event in run.events("loss")]
    known = [speed for speed in points[1:] or points if speed]
    if known:
        return statistics.median(known)
    speed = run.status().get("images_per_second")
    return float(speed) if speed else None
