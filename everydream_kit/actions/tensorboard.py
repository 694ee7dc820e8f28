"""TensorBoard next to the panel: started and ended by a button, reached by a link. The panel's own chart needs none of
it."""

from __future__ import annotations

import html
import socket
from pathlib import Path

from everydream_kit import jobs
from everydream_kit.hosts import Host, detect_host, port_address

PORT = 6006
"""TensorBoard's own; the one that people open on a pod."""


class TensorBoard:
    """A TensorBoard for a folder of runs, in a process of its own. Found again by its folder.

    Attributes:
        folder: where its log and its process's record are.
    """

    def __init__(self, logdir: Path, folder: Path, host: Host | None = None) -> None:
        self.folder = folder
        self._logdir = logdir
        self._host = host or detect_host()

    @property
    def is_running(self) -> bool:
        return jobs.Job(self.folder).is_alive()

    def start(self) -> None:
        """Start it, on its usual port or another free one. Pods reach it through the host's proxy only if it binds to all.

        Raises:
            JobError: it could not be started.
        """
        port = find_port(PORT)
        reach = ["--bind_all"] if self._host.name in ("runpod", "vast") else ["--host", "127.0.0.1"]
        arguments = ["--logdir", str(self._logdir), "--port", str(port), *reach]
        jobs.start_module(self.folder, "tensorboard.main", arguments)
        (self.folder / "port").write_text(str(port), "utf-8")

    def stop(self) -> None:
        """End it."""
        if self.is_running:
            jobs.Job(self.folder).kill()

    def words(self) -> str:
        """How to reach it, as HTML."""
        if self._host.name == "colab":
            return (
                '<div class="edk-hint">On Colab, run <code>%load_ext tensorboard</code> and '
                f"<code>%tensorboard --logdir {html.escape(str(self._logdir))}</code> in a cell.</div>"
            )
        if not self.is_running:
            return '<div class="edk-hint">The same curves, and more, in TensorBoard.</div>'
        port = int((self.folder / "port").read_text("utf-8"))
        address = html.escape(port_address(self._host, port), quote=True)
        return f'<div class="edk-hint"><a href="{address}" target="_blank" rel="noopener">Open {address}</a></div>'


def find_port(wanted: int) -> int:
    """The wanted port of the loopback address if it is free, else any other."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise AssertionError("unreachable: port 0 is always free")
