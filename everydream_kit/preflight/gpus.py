"""The GPUs that are known: memory, speed, and how much of the memory no tensor of ours can have.

The figures are in `gpus.json`, with where they come from; a GPU is added by a line there. A GPU that is here and not in
the list is known by its memory only: whether a run fits can then be said, and how long it takes cannot.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from everydream_kit.errors import ConfigError

GIB = 1024**3
_MAKERS_WORDS = re.compile(r"nvidia|geforce|tesla|rtx|quadro|graphics", re.IGNORECASE)


@dataclass(frozen=True)
class GpuSpec:
    """One kind of GPU.

    Attributes:
        name: as people say it.
        memory_bytes: all of it, as the driver reports it.
        fp32_tflops, fp16_tflops, bf16_tflops: dense peak in 10^12 operations a second; 0 where unknown or not there.
        bandwidth_bytes: peak memory bandwidth, bytes a second; 0 where unknown.
        link_bytes: peak of the link to the host in one direction, bytes a second; 0 where unknown.
        has_bf16: bfloat16 is fast on it (Ampere and later); else mixed precision means float16 and a gradient scaler.
        context_bytes: taken by the CUDA context and its libraries before the first tensor.
        fragmentation: share of the allocator's memory that is lost in gaps.
        hosts: where such GPUs are found.
        aliases: other names.
    """

    name: str
    memory_bytes: int
    fp32_tflops: float = 0.0
    fp16_tflops: float = 0.0
    bf16_tflops: float = 0.0
    bandwidth_bytes: float = 0.0
    link_bytes: float = 0.0
    has_bf16: bool = True
    context_bytes: int = 550_000_000
    fragmentation: float = 0.05
    hosts: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def half_tflops(self) -> float:
        """Peak of the half precision that mixed precision takes on it."""
        return self.bf16_tflops or self.fp16_tflops

    def describe(self) -> str:
        """One line for a list of GPUs."""
        half = "bf16" if self.has_bf16 else "fp16"
        speed = f", {half} {self.half_tflops:g} TFLOPS" if self.half_tflops else ""
        where = f"; {', '.join(self.hosts)}" if self.hosts else ""
        return f"{self.name}: {self.memory_bytes / GIB:.1f} GiB{speed}{where}"


@lru_cache(maxsize=1)
def known_gpus() -> tuple[GpuSpec, ...]:
    """Every GPU of `gpus.json`, smaller before larger."""
    text = (Path(__file__).parent / "gpus.json").read_text(encoding="utf-8")
    return tuple(_read_gpu_spec(entry) for entry in json.loads(text)["cards"])


def describe_gpus() -> str:
    """All of them in one line, with their memory."""
    return ", ".join(f"{gpu_spec.name} ({gpu_spec.memory_bytes / GIB:.0f} GiB)" for gpu_spec in known_gpus())


def find_gpu(name: str) -> GpuSpec:
    """The GPU that a person means, by name or alias; case, spaces and the maker's words do not matter.

    Raises:
        ConfigError: there is none; the message has the nearest name, and all of them.
    """
    wanted = _plain(name)
    names = {_plain(alias): gpu_spec for gpu_spec in known_gpus() for alias in (gpu_spec.name, *gpu_spec.aliases)}
    if wanted in names:
        return names[wanted]
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
    hint = f"did you mean {names[near[0]].name}? " if near else ""
    known = ", ".join(gpu_spec.name for gpu_spec in known_gpus())
    raise ConfigError(f"gpu: no GPU named {name!r} is known; {hint}Known are {known}.")


def this_gpu(device: int = 0) -> GpuSpec | None:
    """The GPU that is here, with the memory that it really has, or None without one.

    A GPU that is not in the list is described by its own name and memory, without speeds.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    return recognize(properties.name, properties.total_memory, has_bf16=properties.major >= 8)


def recognize(name: str, memory_bytes: int, *, has_bf16: bool = True) -> GpuSpec:
    """The GPU of this name in the driver's words, with the memory that was measured.

    Args:
        name: such as `Tesla T4` or `NVIDIA A100-SXM4-80GB`.
        memory_bytes: measured; it distinguishes GPUs of one name, too.
        has_bf16: for a GPU that is not in the list.
    """
    plain = _plain(name)
    found = [c for c in known_gpus() if plain in {_plain(n) for n in (c.name, *c.aliases)}]
    fitting = [c for c in found if abs(c.memory_bytes - memory_bytes) < 0.1 * c.memory_bytes]
    if fitting:
        return replace(fitting[0], memory_bytes=memory_bytes)
    return GpuSpec(name, memory_bytes, has_bf16=has_bf16)


def _plain(name: str) -> str:
    """Letters and digits only, without the maker's words; `12 GB` may be said or not where nothing else differs."""
    return re.sub(r"[^a-z0-9]", "", _MAKERS_WORDS.sub("", name).lower())


def _read_gpu_spec(entry: dict[str, Any]) -> GpuSpec:
    same = ("name", "fp32_tflops", "fp16_tflops", "bf16_tflops", "context_bytes", "fragmentation")
    return GpuSpec(
        **{name: entry[name] for name in same},
        memory_bytes=round(entry["memory_gib"] * GIB),
        bandwidth_bytes=entry["bandwidth_gb"] * 1e9,
        link_bytes=entry["link_gb"] * 1e9,
        has_bf16=entry["bf16_tflops"] > 0,
        hosts=tuple(entry["hosts"]),
        aliases=tuple(entry["aliases"]),
    )
