"""Which machine this is: a notebook host, a rented pod or a plain one, and what that means for paths, secrets and
addresses.

Here: recognizing the host, its folder that outlives the machine, and everything of `google.colab` that the kit uses
(Drive, secrets), in the small `GoogleColab`, so that tests put a double in its place. Not here:
what is installed and whether it is enough (`doctor`), and where projects lie inside the storage folder (`actions.project`).

Only the standard library is imported: `colab_setup.sh` asks this module before anything is installed. A host is
recognized from the variables that it sets, not from its paths, because a folder named /workspace or /content proves
nothing (SageMaker Studio Lab sets none, and is known by the home folder that all its users share). None of this was run
on these hosts themselves; it follows their documentation, or the variables that their own client libraries ask for.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from everydream_kit.errors import HostError

HostName = Literal["colab", "kaggle", "runpod", "vast", "lightning", "paperspace", "studiolab", "plain"]

PROJECTS_FOLDER = "everydream"
"""Folder for projects inside a host's storage, so that a shared Drive or volume stays tidy."""

_HOSTS: dict[HostName, tuple[str, tuple[str, ...], str, str]] = {
    "colab": (
        "Google Colab",
        ("COLAB_RELEASE_TAG", "COLAB_GPU", "COLAB_BACKEND_VERSION"),
        "content",
        "content/drive/MyDrive",
    ),
    # A network volume and a pod volume are both mounted at /workspace; the container disk is everything else.
    "runpod": ("RunPod", ("RUNPOD_POD_ID",), "tmp", "workspace"),
    "vast": ("Vast.ai", ("VAST_CONTAINERLABEL", "VAST_TCP_PORT_22"), "tmp", "workspace"),
    # What kagglehub (env.py), Lightning's litdata (streaming/client.py) and Paperspace's own notebooks ask for.
    "kaggle": ("Kaggle", ("KAGGLE_KERNEL_RUN_TYPE",), "kaggle/temp", "kaggle/working"),
    "lightning": ("Lightning Studio", ("LIGHTNING_CLOUD_SPACE_ID",), "tmp", "teamspace/studios/this_studio"),
    "paperspace": ("Paperspace", ("PAPERSPACE_NOTEBOOK_REPO_ID",), "tmp", "storage"),
}
"""Host -> (name for people, variables that it sets, its fast disk, its folder that outlives the machine)."""
_ADDRESSES: dict[HostName, tuple[str, ...]] = {"runpod": ("RUNPOD_POD_ID",), "vast": ("VAST_CONTAINERLABEL",)}
_STUDIO_LAB_HOME = "/home/studio-lab-user"  # SageMaker Studio Lab sets no variable of its own; every user has this home


@dataclass(frozen=True, slots=True)
class Host:
    """A recognized machine.

    Attributes:
        name: short name; `plain` is any machine that is none of the others.
        title: name for people.
        local: fast disk that is lost with the machine, for caches and unpacked datasets. None: no special place.
        storage: folder that outlives the machine, whether it is mounted yet or not. None: every folder does.
        address: name of this machine in the host's own addresses (RunPod's pod id), or None.
    """

    name: HostName
    title: str
    local: Path | None = None
    storage: Path | None = None
    address: str | None = None

    @property
    def is_rented(self) -> bool:
        """Whether the machine is rented: it goes away, and is paid for until then."""
        return self.name != "plain"


class GoogleColab:
    """What the kit uses of `google.colab`. Its methods work only inside a Colab kernel; tests give a double."""

    def mount_drive(self, mountpoint: Path) -> None:
        """Ask for permission in the browser and mount Google Drive.

        Raises:
            HostError: not on Colab, or permission was not given.
        """
        drive = self._module("drive")
        try:
            drive.mount(str(mountpoint))
        except (ValueError, self._module("errors").Error) as error:  # what drive.mount raises, by its source
            raise HostError(
                f"Google Drive was not mounted at {mountpoint}: {error}. Run the cell again and allow the access, or "
                "continue without Drive: then download your results before the session ends."
            ) from error

    def read_secret(self, name: str) -> str | None:
        """Value from Colab's Secrets panel, or None if it is not there or not shared with this notebook.

        Raises:
            HostError: not on Colab.
        """
        userdata = self._module("userdata")
        try:
            return str(userdata.get(name)) or None
        except (userdata.NotebookAccessError, self._module("errors").Error):  # SecretNotFoundError is one of these
            return None

    @staticmethod
    def _module(name: str) -> Any:
        try:
            return importlib.import_module(f"google.colab.{name}")
        except ImportError as error:
            raise HostError(
                f"google.colab.{name} cannot be imported here, so this is not a Colab kernel. Run it in a Colab notebook."
            ) from error


def detect_host(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Host:
    """Recognize the machine from the variables that its host sets.

    Args:
        environ: environment variables.
        root: what the host's paths start from; another folder only in tests.
    """
    for name, (title, variables, local, storage) in _HOSTS.items():
        if any(variable in environ for variable in variables):
            address = next((environ[variable] for variable in _ADDRESSES.get(name, ()) if variable in environ), None)
            return Host(name, title, root / local, root / storage / PROJECTS_FOLDER, address)
    if environ.get("HOME", "").rstrip("/") == _STUDIO_LAB_HOME:
        home = root / _STUDIO_LAB_HOME.lstrip("/")
        return Host("studiolab", "SageMaker Studio Lab", local=root / "tmp", storage=home / PROJECTS_FOLDER)
    return Host("plain", "this machine")


def count_cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def drive_mountpoint(host: Host) -> Path:
    """Where Colab mounts Google Drive.

    Raises:
        HostError: the host is not Colab.
    """
    if host.name != "colab" or host.local is None:
        raise HostError(f"{host.title} has no Google Drive to mount. Leave mount_drive off here.")
    return host.local / "drive"


def prepare_storage(
    host: Host, fallback: Path, *, mount_drive: bool = False, bridge: GoogleColab | None = None
) -> Path:
    """Find or make the folder in which projects should live, and return it.

    On Colab that is a folder on Drive if Drive is (or is now) mounted, else one on the machine's own disk, which is
    lost with the session. On RunPod and Vast it lies on /workspace. On a plain machine it is `fallback`.

    Args:
        host: the machine.
        fallback: folder for a plain machine, and for a pod without a volume.
        mount_drive: on Colab, mount Google Drive first (it asks in the browser).
        bridge: what to mount with; by default Colab's own.

    Raises:
        HostError: Drive was wanted and could not be mounted.
    """
    folder = fallback
    if host.name == "colab":
        mountpoint = drive_mountpoint(host)
        if mount_drive and not (mountpoint / "MyDrive").is_dir():
            (bridge or GoogleColab()).mount_drive(mountpoint)
        on_drive = (mountpoint / "MyDrive").is_dir()
        folder = (mountpoint / "MyDrive" if on_drive else mountpoint.parent) / PROJECTS_FOLDER
    elif host.storage is not None and host.storage.parent.is_dir():
        folder = host.storage
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def outlives_machine(host: Host, folder: Path) -> bool:
    """Whether what is written into a folder is still there after the machine was given back.

    On RunPod and Vast this is true of /workspace after a stop; deleting the pod deletes a pod volume too, and only a
    network volume stays (see `docs/runpod.md`).
    """
    if not host.is_rented:
        return True
    if host.storage is None:
        return False
    return folder.absolute().is_relative_to(host.storage.parent)


def find_secret(
    name: str, host: Host, *, environ: Mapping[str, str] = os.environ, bridge: GoogleColab | None = None
) -> str | None:
    """A secret such as HF_TOKEN: from the environment, else from Colab's Secrets panel; None if it is nowhere.

    The value is returned and never logged or stored.
    """
    if environ.get(name):
        return environ[name]
    if host.name != "colab":
        return None
    return (bridge or GoogleColab()).read_secret(name)


def port_address(host: Host, port: int) -> str:
    """Address under which a browser reaches a port of this machine.

    RunPod proxies the ports that the pod exposes; Vast maps them to others, which its own page shows; on a plain
    machine it is the loopback address.
    """
    if host.name == "runpod" and host.address:
        return f"https://{host.address}-{port}.proxy.runpod.net"
    return f"http://127.0.0.1:{port}"


def find_kernel_python(pid: int, proc: Path = Path("/proc")) -> str | None:
    """The Python of the notebook kernel that a process runs under, or None.

    `!bash colab_setup.sh` in a notebook must install into the Python of that notebook's kernel, which need not be the
    first one on PATH. It is an ancestor of the shell, and says `ipykernel` in its command line.

    Args:
        pid: process to start from.
        proc: the kernel's process files; where there are none (macOS), the answer is None.
    """
    for _ in range(32):  # deeper trees do not occur; a pid can be reused while we walk
        try:
            words = (proc / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
            stat = (proc / str(pid) / "stat").read_text(errors="replace")
        except OSError:
            return None
        if any("ipykernel" in word or "colab_kernel_launcher" in word for word in words[1:]):
            return words[0] if os.access(words[0], os.X_OK) else None
        pid = int(stat.rpartition(")")[2].split()[1])  # the name before it may hold spaces and brackets
        if pid <= 1:
            return None
    return None
