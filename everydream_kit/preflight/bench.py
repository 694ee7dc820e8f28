"""What a training step takes on this machine, measured: a small fixed set of runs with random weights.

Each case makes a model of true size with random weights, saves it in a temporary folder, builds the run as training does, and
times steps of gray images. What was measured is kept next to the run folders, where plans find it, and ends in one line that can
be sent in. A case for which the memory or the disk does not suffice is named and passed over.

A CPU gets cases of its own, with the smallest model: a step of true size takes minutes there.

Not here: other times of a run, such as loading and saving; single settings (`probe`).
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everydream_kit.atomic import write_atomic
from everydream_kit.config import TrainConfig
from everydream_kit.disk_space import free_disk
from everydream_kit.preflight.step_time import BENCH_FILE, configuration, read_bench

if TYPE_CHECKING:
    from everydream_kit.preflight.gpus import GpuSpec

WARM_UP_STEPS, MEASURED_STEPS = 3, 12
GIB = 1024**3


@dataclass(frozen=True)
class BenchCase:
    """One run that is measured.

    Attributes:
        name: what people read.
        family: of the model, which gets random weights.
        settings: of the run, but for the base.
        disk_bytes: of the model's files.
        is_tiny: the smallest model of the family instead of the published size.
    """

    name: str
    family: str
    settings: dict[str, Any] = field(default_factory=dict)
    disk_bytes: int = 0
    is_tiny: bool = False


GPU_CASES = (
    BenchCase("SD 1.5, full, 512 px, batch 4", "sd1", {"batch_size": 4}, 3 * GIB),
    BenchCase("SD 1.5, full, 512 px, batch 4, CUDA graphs", "sd1", {"batch_size": 4, "cuda_graphs": "on"}, 3 * GIB),
    BenchCase("SD 1.5, LoRA, 512 px, batch 4", "sd1", {"training_kind": "lora", "batch_size": 4}, 3 * GIB),
    BenchCase(
        "SDXL, LoRA, 1024 px, batch 1, checkpointing",
        "sdxl",
        {"training_kind": "lora", "resolution": 1024, "batch_size": 1, "gradient_checkpointing": True},
        8 * GIB,
    ),
)
CPU_CASES = (
    BenchCase("tiny SD 1, full, 64 px, batch 4", "sd1", {"batch_size": 4, "resolution": 64}, is_tiny=True),
    BenchCase(
        "tiny SD 1, LoRA, 64 px, batch 4",
        "sd1",
        {"training_kind": "lora", "batch_size": 4, "resolution": 64},
        is_tiny=True,
    ),
)


@dataclass(frozen=True)
class BenchResult:
    """What was found about one case.

    Attributes:
        case: its name.
        seconds: of one optimizer step, the median; None where it was passed over.
        peak_bytes: the most memory that torch's allocator took from the GPU; None on a CPU.
        reason: why nothing was measured, else empty.
    """

    case: str
    seconds: float | None = None
    peak_bytes: int | None = None
    reason: str = ""


@dataclass(frozen=True)
class Bench:
    """A measured machine.

    Attributes:
        device: the GPU's or CPU's name.
        torch: its version.
        kit: this kit's version.
        results: one for each case.
    """

    device: str
    torch: str
    kit: str
    results: tuple[BenchResult, ...]

    @property
    def text(self) -> str:
        """A table, and the line to send in."""
        width = max(len(one.case) for one in self.results)
        rows = [f"  {one.case:<{width}}  {_figures(one)}" for one in self.results]
        return "\n".join([f"{self.device}, torch {self.torch}", *rows, "", "To send in: " + self.line])

    @property
    def line(self) -> str:
        """Everything in one line."""
        figures = [f"{one.case}: {_figures(one)}" for one in self.results if one.seconds is not None]
        return " | ".join([f"everydream-kit {self.kit}", self.device, f"torch {self.torch}", *figures])

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "line": self.line}


def bench(
    logdir: str | Path,
    *,
    cases: Sequence[BenchCase] | None = None,
    notify: Callable[[str], None] = lambda message: None,
) -> Bench:
    """Measure this machine.

    Args:
        logdir: folder of the run folders whose plans use the figures.
        cases: by default those of a GPU where there is one, else those of a CPU.
        notify: called with what is measured next.
    """
    from everydream_kit.preflight.gpus import this_gpu

    gpu_spec = this_gpu()
    chosen = cases if cases is not None else GPU_CASES if gpu_spec is not None else CPU_CASES
    results, entries = [], []
    for case in chosen:
        notify(case.name)
        result = measure(case)
        results.append(result)
        if result.seconds is not None and not case.is_tiny and gpu_spec is not None:
            entries.append(_entry(case, result, gpu_spec))
    if entries:
        _keep(Path(logdir), entries)
    device = gpu_spec.name if gpu_spec is not None else f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
    versions = metadata.version("torch"), metadata.version("everydream-kit")
    return Bench(device, *versions, tuple(results))


def measure(case: BenchCase) -> BenchResult:
    """Time the steps of one case, in a temporary folder."""
    from everydream_kit.preflight.probe import free_device_memory
    from everydream_kit.training.memory_measures import is_out_of_memory

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if free_disk(folder) < 2 * case.disk_bytes:
            return BenchResult(case.name, reason=f"passed over: {2 * case.disk_bytes / GIB:.0f} GiB of disk are needed")
        try:
            return _measure(case, folder)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            error.__traceback__ = None  # its frames would hold the tensors that must go
            return BenchResult(case.name, reason="passed over: out of memory")
        finally:
            free_device_memory()


def _measure(case: BenchCase, folder: Path) -> BenchResult:
    import torch

    from everydream_kit.data.buckets import largest_bucket
    from everydream_kit.models.model_saving import save_model
    from everydream_kit.models.random_models import build_model, build_tiny_model
    from everydream_kit.preflight.probe import build_on_gpu, free_device_memory, make_step
    from everydream_kit.preflight.rehearsal import make_batch

    has_gpu = torch.cuda.is_available()
    base = folder / "base"
    made = (
        build_tiny_model(case.family) if case.is_tiny else build_model(case.family, device="cuda" if has_gpu else "cpu")
    )
    for module in made.modules().values():
        module.half()
    save_model(made, base)
    del made
    free_device_memory()
    config = TrainConfig(resume_ckpt=str(base), data_root=str(folder), logdir=str(folder), **case.settings)
    run = build_on_gpu(config, folder / "run")
    assert isinstance(config.batch_size, int)
    channels = run.learner.model.family.latent_space.stored_channels
    batch = make_batch(largest_bucket(config.resolutions), config.batch_size, with_moments=True, channels=channels)
    times = []
    for _ in range(WARM_UP_STEPS + MEASURED_STEPS):
        started = time.perf_counter()
        make_step(run, batch)
        if has_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    peak = int(torch.cuda.max_memory_reserved()) if has_gpu else None
    return BenchResult(case.name, statistics.median(times[WARM_UP_STEPS:]), peak)


def _figures(result: BenchResult) -> str:
    if result.seconds is None:
        return result.reason
    memory = "" if result.peak_bytes is None else f", {result.peak_bytes / GIB:.1f} GiB"
    return f"{result.seconds:.3f} s a step{memory}"


def _entry(case: BenchCase, result: BenchResult, gpu_spec: GpuSpec) -> dict[str, Any]:
    """As `speeds.json` has them."""
    config = TrainConfig(resume_ckpt="base", **case.settings)
    known = configuration(config, gpu_spec, case.family)
    date = time.strftime("%Y-%m-%d")
    return {**known, "seconds": result.seconds, "by": "everydream bench", "source": f"this machine, {date}"}


def _keep(logdir: Path, entries: list[dict[str, Any]]) -> None:
    """New figures replace earlier ones of the same configuration."""
    path = logdir / BENCH_FILE
    same = [{name: value for name, value in one.items() if name not in {"seconds", "by", "source"}} for one in entries]
    others = [one for one in read_bench(logdir) if not any(known.items() <= one.items() for known in same)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({"measurements": [*others, *entries]}, indent=1))
