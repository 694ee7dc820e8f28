"""What is installed, which device, how much memory and disk, what is missing and how to fix it.

Here: the checks, as records that every face can show. Nothing prints, nothing is changed, the network is not used, and
no check raises: a broken installation is just what this is asked about. Not here: whether a particular model fits into
memory, which depends on the settings of a run.

Every measurement enters through `Machine`, so that the verdicts can be tested for machines that we do not have.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from everydream_kit.disk_space import known_free_disk
from everydream_kit.gpu_support import describe_unsupported
from everydream_kit.hosts import Host, count_cores, detect_host, outlives_machine

Status = Literal["ok", "warning", "error"]

GIB = 1024**3
DISK_WANTED_BYTES = 20 * GIB
"""A full-size SD 1.x run with a few checkpoints (2 to 4 GB each), the base and the Hub's cache."""
DISK_NEEDED_BYTES = 2 * GIB
"""Below this not even one half-precision checkpoint of SD 1.x fits."""
MEMORY_WANTED_BYTES = 8 * GIB
"""Host memory: loading a full-size model passes through it."""
GPU_WANTED_BYTES = 10 * GIB
"""SD 1.x, UNet and text encoder, 512 px, batch 1, 8-bit AdamW, gradient checkpointing: estimated as 9.2 GiB."""
SHARED_MEMORY_WANTED_BYTES = GIB // 2
"""Loader processes hand batches over through /dev/shm; Docker gives 64 MB by default."""
COLAB_WIDGETS_MAJOR = 7
"""Colab's widget manager shows widgets of this major version only."""
SUBSTITUTES = {
    "bitsandbytes": "8-bit optimizers are missing; choose optimizer adamw, torch's own, which needs more memory",
    "pytorch_optimizer": "only torch's and bitsandbytes' optimizers can be chosen",
    "tensorboard": "runs keep events.jsonl and the panel's own chart, but no TensorBoard files",
    "anywidget": "panels have no live ticker and no drop zone; use job.watch() and put files on the disk yourself",
    "ipywidgets": "there are no panels; the command line and Python work",
    "imagehash": "prepare cannot find near-duplicates",
    "peft": "LoRA training and LoRA files are not available",
}
"""Requirements that the rest can do without, with what is lost."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what was looked at, in two or three words.
        status: `ok`, `warning` (something works less well) or `error` (training cannot work).
        text: what was found.
        cure: what to do; empty where nothing needs doing.
    """

    name: str
    status: Status
    text: str
    cure: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All checks, in the order in which they should be read."""

    checks: tuple[Check, ...]

    @property
    def status(self) -> Status:
        """The worst of all checks."""
        found = {check.status for check in self.checks}
        return "error" if "error" in found else "warning" if "warning" in found else "ok"

    @property
    def problems(self) -> tuple[Check, ...]:
        """Errors, then warnings."""
        return tuple(check for status in ("error", "warning") for check in self.checks if check.status == status)

    def __getitem__(self, name: str) -> Check:
        """The check of this name; KeyError if it was not made."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(name)

    def __str__(self) -> str:
        lines = ((f"{one.status:<8} {one.name}: {one.text}", f"{'':<8} {one.cure}") for one in self.checks)
        return "\n".join(line for pair in lines for line in pair if line.strip())


@dataclass(frozen=True)
class Device:
    """The device that training will use.

    Attributes:
        kind: `cuda`, `mps` or `cpu`.
        name: the maker's name for it.
        total_bytes, free_bytes: device memory; None for the CPU and Apple's shared memory.
        has_bf16: whether bfloat16 is fast on it.
        torch_cuda: the CUDA version that torch was built with, or None.
        unsupported: why this torch has no code for this GPU, and the fix; empty where it has.
    """

    kind: str
    name: str
    total_bytes: int | None = None
    free_bytes: int | None = None
    has_bf16: bool = False
    torch_cuda: str | None = None
    unsupported: str = ""


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _own_requirements() -> list[str] | None:
    """Requirement lines of the installed kit, without extras; None if the kit was not installed but copied."""
    try:
        lines = importlib.metadata.requires("everydream-kit") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return [line for line in lines if "extra ==" not in line]


def _import_problem(name: str) -> str:
    """Why a module cannot be imported; empty if it can.

    Native packages raise whatever their loader meets, so OSError and RuntimeError are expected next to ImportError.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # bitsandbytes warns of optional kernels, as if something were wrong
    try:
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    finally:
        logging.disable(disabled)
    return ""


def _find_device() -> Device | None:
    """The device by torch's answer, or None if torch cannot be imported."""
    if _import_problem("torch"):
        return None
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        capability = torch.cuda.get_device_capability()
        return Device(
            "cuda",
            torch.cuda.get_device_name(),
            total,
            free,
            has_bf16=capability[0] >= 8,  # Ampere and later; older GPUs emulate it slowly
            torch_cuda=torch.version.cuda,
            unsupported=describe_unsupported(
                torch.cuda.get_device_name(), capability, torch.cuda.get_arch_list(), torch.__version__
            ),
        )
    if torch.backends.mps.is_available():
        return Device("mps", "Apple GPU", torch_cuda=None)
    return Device("cpu", platform.processor() or platform.machine(), torch_cuda=torch.version.cuda)


def _memory_bytes() -> tuple[int, int] | None:
    """(total, available) host memory, lowered to a container's limit; None if it cannot be known."""
    if _import_problem("psutil"):
        return None
    import psutil

    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    limit = _container_limit()
    if limit is not None and limit < total:
        total, available = limit, min(available, limit)
    return total, available


def _container_limit(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory limit of the container in bytes, by cgroup v2 or v1; None without one."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (root / name).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None


def _has_nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").is_file() or shutil.which("nvidia-smi") is not None


@dataclass(frozen=True)
class Machine:
    """How each thing is measured. The defaults measure this machine; tests give other answers."""

    python: tuple[int, ...] = tuple(sys.version_info[:3])
    system: str = field(default_factory=platform.platform)
    cores: int = field(default_factory=count_cores)
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    requirements: Callable[[], list[str] | None] = _own_requirements
    version_of: Callable[[str], str | None] = _installed_version
    import_problem: Callable[[str], str] = _import_problem
    device: Callable[[], Device | None] = _find_device
    memory: Callable[[], tuple[int, int] | None] = _memory_bytes
    disk_free: Callable[[Path], int | None] = known_free_disk
    nvidia_driver: Callable[[], bool] = _has_nvidia_driver


def diagnose(folder: str | Path = ".", machine: Machine | None = None) -> Diagnosis:
    """Look at this machine and say what works, what does not, and what to do about it.

    Args:
        folder: where runs will be written; its disk is the one that is checked.
        machine: how to measure; by default this machine.
    """
    machine = machine or Machine()
    host = detect_host(machine.environ)
    folder = Path(folder)
    device = machine.device()
    checks = [
        _check_python(machine),
        Check("machine", "ok", f"{host.title}: {machine.system}, {_count(machine.cores, 'core')}"),
        _check_device(machine, device),
        _check_gpu_memory(device),
        _check_memory(machine),
        _check_shared_memory(machine, device),
        _check_disk(machine, folder),
        _check_storage(host, folder),
        *_check_packages(machine),
        _check_bitsandbytes(machine, device),
        _check_widgets(machine, host),
        _check_token(machine),
    ]
    return Diagnosis(tuple(check for check in checks if check is not None))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _gib(number: int) -> str:
    return f"{number / GIB:.1f} GiB"


def _check_python(machine: Machine) -> Check:
    text = ".".join(map(str, machine.python))
    if machine.python[:2] < (3, 10):
        return Check("Python", "error", text, "The kit needs Python 3.10 or later: run bash colab_setup.sh with one.")
    if machine.python[:2] > (3, 13):
        return Check(
            "Python", "warning", text, "The kit is tested with 3.10 to 3.13. If something fails, use one of those."
        )
    return Check("Python", "ok", text)


def _check_device(machine: Machine, device: Device | None) -> Check:
    name = "device"
    if device is None:
        problem = machine.import_problem("torch") or "it gave no device"
        return Check(name, "error", f"torch does not work here: {problem}", "Run: bash colab_setup.sh")
    if device.unsupported:
        problem, _, cure = device.unsupported.partition(". Install ")
        return Check(name, "error", f"{problem}.", f"Install {cure}")
    if device.kind == "cuda":
        precision = "bf16" if device.has_bf16 else "fp16 with a gradient scaler (this GPU only imitates bf16, slowly)"
        return Check(name, "ok", f"{device.name}, CUDA {device.torch_cuda}, mixed precision in {precision}")
    if device.kind == "mps":
        cure = "Training on it is untested; a rented NVIDIA GPU is the tried way for full-size models."
        return Check(name, "warning", device.name, cure)
    found = f"CPU ({device.name}), {_count(machine.cores, 'core')}"
    if machine.nvidia_driver():
        cure = (
            "Choose a torch build that fits this driver (https://pytorch.org/get-started/locally)."
            if device.torch_cuda
            else "This torch was built without CUDA. In a new environment: EDK_TORCH=cuda bash colab_setup.sh"
        )
        return Check(name, "warning", f"{found}; there is an NVIDIA driver, but torch cannot use a GPU", cure)
    cure = (
        "Fine for the demo and for small models. Full-size models need a GPU; on Colab: Runtime > Change runtime type."
    )
    return Check(name, "warning", found, cure)


def _check_gpu_memory(device: Device | None) -> Check | None:
    if device is None or device.total_bytes is None or device.free_bytes is None:
        return None
    text = f"{_gib(device.free_bytes)} free of {_gib(device.total_bytes)}"
    if device.total_bytes < GPU_WANTED_BYTES:
        cure = "Full fine-tuning of SD 1.x needs about 10 GiB: use gradient_checkpointing at batch_size 1, or a smaller model."
        return Check("GPU memory", "warning", text, cure)
    if device.free_bytes < device.total_bytes / 2:
        return Check(
            "GPU memory", "warning", text, "Something else uses the GPU: close other notebooks and stop other runs."
        )
    return Check("GPU memory", "ok", text)


def _check_memory(machine: Machine) -> Check | None:
    memory = machine.memory()
    if memory is None:
        return None
    total, available = memory
    text = f"{_gib(available)} available of {_gib(total)}"
    if available < MEMORY_WANTED_BYTES:
        cure = "Full-size models may not load. Close what you do not need, or take a machine with 8 GiB or more."
        return Check("memory", "warning", text, cure)
    return Check("memory", "ok", text)


def _check_shared_memory(machine: Machine, device: Device | None) -> Check | None:
    folder = Path("/dev/shm")
    free = machine.disk_free(folder) if platform.system() == "Linux" and device is not None else None
    if free is None:
        return None
    if free < SHARED_MEMORY_WANTED_BYTES:
        cure = "Loader processes may fail: start the container with --shm-size=2g, or train with num_workers 0."
        return Check("shared memory", "warning", f"{free / 1024**2:.0f} MiB free in {folder}", cure)
    return Check("shared memory", "ok", f"{_gib(free)} free")


def _check_disk(machine: Machine, folder: Path) -> Check | None:
    free = machine.disk_free(folder)
    if free is None:
        return None
    text = f"{_gib(free)} free for {folder.absolute()}"
    cure = "Free some, write runs elsewhere with logdir, or keep fewer checkpoints with keep_last_n."
    if free < DISK_NEEDED_BYTES:
        return Check("disk", "error", text, cure)
    if free < DISK_WANTED_BYTES:
        return Check("disk", "warning", f"{text}; a checkpoint of SD 1.x takes 2 to 4 GiB, of SDXL 7 to 13", cure)
    return Check("disk", "ok", text)


def _check_storage(host: Host, folder: Path) -> Check | None:
    if not host.is_rented:
        return None
    if outlives_machine(host, folder):
        return Check("storage", "ok", f"{folder.absolute()} outlives this machine")
    cure = (
        "Mount Google Drive and work there, push to the Hub, or download your results before the session ends."
        if host.name == "colab"
        else "Work in /workspace, on a volume, or push to the Hub before you give the machine back."
    )
    return Check("storage", "warning", f"{folder.absolute()} is lost with this machine", cure)


def _check_packages(machine: Machine) -> list[Check]:
    """One line if everything is there and new enough, else one check for each package that is not."""
    lines = machine.requirements()
    if lines is None:
        return [Check("packages", "error", "the kit itself is not installed here", "Run: bash colab_setup.sh")]
    if machine.version_of("packaging") is None:
        return [
            Check(
                "packages", "error", "hardly anything is installed (packaging is missing)", "Run: bash colab_setup.sh"
            )
        ]
    from packaging.requirements import Requirement

    problems, found = [], []
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        name, version = requirement.name, machine.version_of(requirement.name)
        if name == "bitsandbytes":
            continue  # has a check of its own
        status: Status = "warning" if name in SUBSTITUTES else "error"
        lost = f" ({SUBSTITUTES[name]})" if name in SUBSTITUTES else ""
        if version is None:
            problems.append(Check(name, status, f"not installed{lost}", "Run: bash colab_setup.sh"))
        elif not requirement.specifier.contains(version, prereleases=True):
            wanted = f"{version}, and the kit needs {requirement.specifier}"
            problems.append(Check(name, status, wanted + lost, "Run: bash colab_setup.sh"))
        else:
            found.append((name, version))
    shown = ("torch", "diffusers", "transformers", "accelerate", "peft", "huggingface_hub")
    versions = ", ".join(f"{name} {version}" for name, version in found if name.replace("-", "_") in shown)
    return [Check("packages", "ok", f"{len(found)} of {len(found) + len(problems)} in place: {versions}"), *problems]


def _check_bitsandbytes(machine: Machine, device: Device | None) -> Check:
    """Imported for real where there is a GPU: it is often installed and cannot find its CUDA library.

    Elsewhere its optimizers are slower than torch's, and importing it, with torch's compiler, takes three seconds.
    """
    name = "bitsandbytes"
    version = machine.version_of(name)
    if version is None:
        return Check(name, "warning", f"not installed: {SUBSTITUTES[name]}", "Run: bash colab_setup.sh")
    if device is not None and device.kind != "cuda" and not machine.nvidia_driver():
        return Check(name, "ok", f"{version}, for machines with a GPU")
    problem = machine.import_problem(name)
    if problem:
        cure = "Reinstall it: pip install --force-reinstall --no-deps bitsandbytes"
        return Check(name, "warning", f"{version} cannot be imported ({problem}): {SUBSTITUTES[name]}", cure)
    return Check(name, "ok", version)


def _check_widgets(machine: Machine, host: Host) -> Check | None:
    version = machine.version_of("ipywidgets")
    if version is None or host.name != "colab":
        return None
    if int(version.split(".")[0]) != COLAB_WIDGETS_MAJOR:
        cure = 'Go back to Colab\'s own: pip install "ipywidgets==7.7.1", then restart the runtime.'
        return Check("widgets", "warning", f"ipywidgets {version}; Colab shows version 7 only", cure)
    return Check("widgets", "ok", f"ipywidgets {version}, as Colab requires")


def _check_token(machine: Machine) -> Check:
    """Whether a Hub token is there; its value is not read further and never shown."""
    name = "Hugging Face"
    there = bool(machine.environ.get("HF_TOKEN"))
    if not there and not machine.import_problem("huggingface_hub"):
        from huggingface_hub import get_token

        there = get_token() is not None
    if there:
        return Check(name, "ok", "a token is there: models can be pushed")
    return Check(name, "ok", "not logged in, which only gated models and pushing need (hf auth login)")
