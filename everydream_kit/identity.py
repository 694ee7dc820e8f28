"""Which process is which: host, boot, process id and start ticks together.

A process id is used again, and a wall-clock start time moves with the clock. What does not move on Linux is the boot id
(and the name space that process ids belong to) and the start in clock ticks since boot, from `/proc/<pid>/stat` (proc(5),
field 22). Elsewhere the system keeps the start time as it was recorded, and that is used.

Where one of these cannot be read, the identity is not sure. A process without a sure identity is never signalled.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """A process, known again for certain.

    Attributes:
        place: digest of host, boot and name space of process ids; empty where that is not known.
        pid: process id there.
        started: clock ticks since boot (Linux) or the recorded start time; empty where that is not known.
    """

    place: str
    pid: int
    started: str

    @property
    def is_sure(self) -> bool:
        return bool(self.place and self.started)

    def to_json(self) -> dict[str, Any]:
        """As a record for `job.json` and `status.json`; the host's name is for people."""
        return {"pid": self.pid, "host": platform.node(), "place": self.place, "started": self.started}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Process | None:
        """The process of a record, or None where it names none. Records of older versions are never sure."""
        pid, place, started = record.get("pid"), record.get("place"), record.get("started")
        if not isinstance(pid, int) or isinstance(pid, bool) or not 0 < pid < 1 << 31:
            return None
        return cls(place if isinstance(place, str) else "", pid, started if isinstance(started, str) else "")


def this_process() -> Process:
    """The process that asks; after a fork the child's own."""
    return _identify_self(os.getpid())


def identify(pid: int) -> Process:
    """A living process on this machine by its id; not sure if it has ended already."""
    return Process(place_here(), pid, start_of(pid, even_zombie=True) or "")


def is_running(process: Process) -> bool | None:
    """Whether it is there: True, False, or None where that cannot be known from here.

    A zombie has ended.
    """
    if not process.is_sure or process.place != place_here():
        return None
    return start_of(process.pid) == process.started


@lru_cache(maxsize=2)
def _identify_self(pid: int) -> Process:
    return identify(pid)


def place_here() -> str:
    """Digest of this host, its boot, and the name space in which process ids count; empty where it is not sure."""
    return _place(sys.platform)


@lru_cache(maxsize=2)
def _place(system: str) -> str:
    parts = [platform.node()]
    if system == "linux":
        try:
            boot = (PROC / "sys/kernel/random/boot_id").read_text("ascii").strip()
            parts += [boot, os.readlink(PROC / "self/ns/pid")]
        except OSError:  # a sandbox that hides them
            return ""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def start_of(pid: int, *, even_zombie: bool = False) -> str | None:
    """When a process started, in a form that no clock change moves; None where there is none, or it is a zombie."""
    if sys.platform == "linux":
        return _start_ticks(pid, even_zombie)
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) and not even_zombie:
            return None
        return repr(process.create_time()).replace(".", "_")
    except psutil.Error:
        return None


def _start_ticks(pid: int, even_zombie: bool) -> str | None:
    try:
        text = (PROC / str(pid) / "stat").read_text("utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    if len(fields) < 20 or (fields[0] in ("Z", "X", "x") and not even_zombie):
        return None
    return fields[19]  # field 22 counted from 1, of which two stand before the bracket
