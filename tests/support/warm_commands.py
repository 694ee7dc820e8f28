"""Processes that run the kit's commands and have its imports done already: a fork server imports once, for all of them.

A kill then costs what the work costs that it interrupts, and not six seconds of imports each time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from functools import cache
from pathlib import Path
from typing import Any

PRELOADED = (
    "everydream_kit.cli",
    "everydream_kit.sessions",
    "everydream_kit.training.run_builder",
    "everydream_kit.training.listeners",
    "everydream_kit.preflight.planning",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.schedulers.scheduling_ddpm",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
)
"""What a training run imports."""


@cache
def server() -> Any:
    """The context of the fork server; it starts with the first process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _run(words: tuple[str, ...], errors: Path) -> None:
    """`everydream WORDS` in a session of its own, with its errors in a file."""
    os.setsid()
    with errors.open("wb") as file, open(os.devnull, "wb") as nowhere:
        os.dup2(file.fileno(), 2)
        os.dup2(nowhere.fileno(), 1)
    from everydream_kit.cli import main

    sys.exit(main(list(words)))


class Command:
    """One command in a process.

    Attributes:
        pid: of the process, which leads a group of its own.
        returncode: what the shell would see; negative for the number of the signal that ended it.
    """

    def __init__(self, *words: object, errors: Path) -> None:
        self.errors = errors
        self._process = server().Process(target=_run, args=(tuple(map(str, words)), errors))
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        """As `subprocess.Popen.poll`."""
        return self.returncode

    def kill(self) -> bool:
        """Kill it and its children. Returns whether it was there: the fork server reaps it the moment that it ends by itself."""
        if self.poll() is not None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
            return True
        return False

    def finish(self, timeout: float) -> str:
        """Wait for its end. Returns what it wrote to its errors."""
        self._process.join(timeout)
        assert self.returncode is not None, "the command does not end"
        return self.errors.read_text("utf-8", errors="replace") if self.errors.exists() else ""
