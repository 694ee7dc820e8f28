"""The kit as Windows shows Python to it: `os.name` is "nt", and what only POSIX has is missing.

Run as a program it imports the kit so and then runs the file that it is given:

    python tests/support/as_on_windows.py FILE [ARGUMENT ...]

The kit's modules, and no others, see this `os`, `sys` and `signal`. The rest of Python stays as it is, so a test sees
whether the kit asks for what Windows lacks, not whether Windows' own file system would agree.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.abc
import importlib.machinery
import os
import runpy
import signal
import sys
import types
from collections.abc import Sequence
from typing import Any

POSIX_MODULES = frozenset({"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"})
MISSING = {
    "os": (
        *(
            "fork",
            "forkpty",
            "getpgid",
            "getpgrp",
            "getsid",
            "killpg",
            "setpgid",
            "setsid",
            "getuid",
            "geteuid",
            "getgid",
        ),
        *(
            "getegid",
            "chown",
            "fchmod",
            "lchown",
            "chroot",
            "uname",
            "statvfs",
            "fstatvfs",
            "fdatasync",
            "pread",
            "preadv",
        ),
        *("pwrite", "pwritev", "mkfifo", "mknod", "nice", "openpty", "sched_getaffinity", "sync", "sysconf", "wait"),
        *("O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK", "O_SYNC", "WNOHANG", "register_at_fork", "confstr"),
    ),
    "sys": ("getdlopenflags", "abiflags"),
    "signal": (
        *("SIGHUP", "SIGKILL", "SIGQUIT", "SIGSTOP", "SIGCONT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGPIPE", "SIGCHLD"),
        *("SIGTSTP", "SIGWINCH", "pthread_sigmask", "sigwait", "setitimer", "alarm", "pause"),
    ),
}
CHANGED: dict[str, dict[str, Any]] = {"os": {"name": "nt"}, "sys": {"platform": "win32"}, "signal": {}}


class View(types.ModuleType):
    """A standard module with some names changed and some missing; what is set goes to the module itself."""

    def __init__(self, real: types.ModuleType) -> None:
        super().__init__(real.__name__)
        object.__setattr__(self, "_real", real)

    def __getattribute__(self, name: str) -> Any:
        real = object.__getattribute__(self, "_real")
        key = real.__name__
        if name in CHANGED[key]:
            return CHANGED[key][name]
        if name in MISSING[key]:
            raise AttributeError(f"module {key!r} has no attribute {name!r} on Windows")
        return getattr(real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(object.__getattribute__(self, "_real"), name, value)


VIEWS = {module.__name__: View(module) for module in (os, sys, signal)}


def import_there(
    name: str, globals: Any = None, locals: Any = None, fromlist: Sequence[str] = (), level: int = 0
) -> types.ModuleType:
    """`import` as a module of the kit sees it."""
    if level == 0 and name.partition(".")[0] in POSIX_MODULES:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    if level == 0 and name in VIEWS:
        return VIEWS[name]
    return builtins.__import__(name, globals, locals, fromlist, level)


class Loader(importlib.machinery.SourceFileLoader):
    """Gives a module its own `import`."""

    def exec_module(self, module: types.ModuleType) -> None:
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": import_there}
        super().exec_module(module)


class Finder(importlib.abc.MetaPathFinder):
    """Finds the kit's modules for `Loader`."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] != "everydream_kit":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """From here on, the kit's modules are imported so."""
    assert not any(name.partition(".")[0] == "everydream_kit" for name in sys.modules)
    sys.meta_path.insert(0, Finder())


if __name__ == "__main__":
    install()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
