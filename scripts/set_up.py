"""The work of `colab_setup.sh`: put the kit into the right Python, once, and then start what was asked for.

Here: choosing between a virtual environment and the running kernel's Python, installing, and the stamp that makes a
second call cheap. Not here: what a host is (`everydream_kit.hosts`) and which packages the kit needs (`setup.cfg`).

It runs before anything is installed, so it imports the standard library and `everydream_kit.hosts` only. It asks the
target Python everything through short programs, because the target is often not the Python that runs this file.
"""

from __future__ import annotations

import configparser
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from everydream_kit.hosts import detect_host, find_kernel_python  # noqa: E402

TORCH_VERSION = "2.13.0"
"""Installed where there is no torch. Others work too: see the lower bound in setup.cfg."""
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""PyTorch's own index of builds without CUDA: 0.2 GB instead of several."""
STAMP_NAME = ".everydream-kit.json"
NEEDS_TORCH = ("accelerate", "peft", "bitsandbytes", "pytorch-optimizer")
"""Our requirements that require torch themselves, and would bring another one along."""
DISPENSABLE = {
    "bitsandbytes": "without it there are no 8-bit optimizers: use adamw (torch's own, fused) instead of adamw8bit"
}
"""What may be missing after set-up, with what to do without it."""
HOSTS_OWN = (
    *("torch", "torchvision", "torchaudio", "triton", "numpy"),
    *("ipywidgets", "widgetsnbextension", "jupyterlab-widgets", "ipykernel", "ipython", "traitlets", "tornado"),
    *("notebook", "jupyterlab", "jupyter-server", "jupyter-client", "google-colab"),
)
"""On a notebook host these are tuned to its driver and its front end: an upgrade breaks CUDA, or shows no widgets."""
COMMANDS = ("demo", "test", "check")
SHOWN_LINES = 25


class SetupError(Exception):
    """A step failed; the message is all that the person needs."""


@dataclass(frozen=True)
class Target:
    """The Python that gets the kit.

    Attributes:
        python: its executable.
        venv: folder of our own virtual environment; None means an existing Python, that of a kernel or a host.
        host: name of the host, as `everydream_kit.hosts` says it.
    """

    python: str
    venv: Path | None
    host: str


def choose_target(environ: dict[str, str], host: str, kernel: str | None, base: str = sys.executable) -> Target:
    """A named virtual environment first; then the kernel above us; then a host's own Python; else `.venv`."""
    if environ.get("EDK_VENV"):
        venv = Path(environ["EDK_VENV"]).absolute()
        return Target(str(venv / "bin" / "python"), venv, host)
    if kernel is not None:
        return Target(kernel, None, host)
    if host != "plain":
        return Target(base if environ.get("EDK_PYTHON") else find_python_with_torch(base), None, host)
    return Target(str(REPOSITORY / ".venv" / "bin" / "python"), REPOSITORY / ".venv", host)


def find_python_with_torch(base: str) -> str:
    """Images of GPU hosts carry several Pythons; the one that has torch is the one their notebooks run."""
    names = ["python3", "python", "python3.13", "python3.12", "python3.11", "python3.10"]
    for path in [base, *filter(None, map(shutil.which, names))]:
        program = (
            "import sys, importlib.util as u; sys.exit(sys.version_info < (3, 10) or u.find_spec('torch') is None)"
        )
        if subprocess.run([path, "-c", program], capture_output=True, cwd="/", check=False).returncode == 0:
            return path
    return base


def make_venv(venv: Path, base: str = sys.executable) -> None:
    """Make a virtual environment, or fix one whose Python has gone.

    Raises:
        SetupError: this Python cannot make one; the message says which system package is missing.
    """
    if works(str(venv / "bin" / "python"), "import pip"):
        return
    if venv.exists() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").is_file():
        raise SetupError(
            f"{venv} is there, and is not a virtual environment. Move it away, or set EDK_VENV to another folder."
        )
    if not works(base, "import venv, ensurepip"):
        package = "python{}.{}-venv".format(*sys.version_info)
        if can_use_apt():
            with Step(f"Installing {package} (this Python cannot make virtual environments without it)") as step:
                step.run(["apt-get", "update"])
                step.run(["apt-get", "install", "-y", "--no-install-recommends", package])
        else:
            raise SetupError(
                f"{base} cannot make virtual environments: its ensurepip module is missing.\n"
                f"On Debian and Ubuntu install it with: sudo apt-get install {package}\n"
                "Or name a complete Python: EDK_PYTHON=/path/to/python3 bash colab_setup.sh"
            )
    with Step(f"Making a virtual environment in {venv}") as step:
        step.run([base, "-m", "venv", "--clear", str(venv)])


def works(python: str, program: str) -> bool:
    """Whether a short program ends well in a Python, which may not exist at all."""
    try:
        return subprocess.run([python, "-c", program], capture_output=True, cwd="/", check=False).returncode == 0
    except OSError:
        return False


def ask(python: str, program: str) -> Any:
    """What a short program prints, read as JSON.

    Raises:
        SetupError: the program failed.
    """
    answer = subprocess.run([python, "-c", program], capture_output=True, text=True, cwd="/", check=False)
    if answer.returncode:
        raise SetupError(f"{python} does not answer:\n{last_lines(answer.stderr)}")
    return json.loads(answer.stdout.splitlines()[-1])  # some hosts print greetings first


WHERE = """
import importlib.util as u, json, os, sys, sysconfig
kit = u.find_spec("everydream_kit")
print(json.dumps({
    "prefix": sys.prefix,
    "owned": sys.prefix != sys.base_prefix,
    "managed": os.path.exists(os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")),
    "modules": [name for name in ("torch", "diffusers", "transformers", "accelerate") if u.find_spec(name)],
    "kit": kit and kit.origin,
}))
"""

VERSIONS = """
import importlib.metadata as m, json, re
print(json.dumps({re.sub("[-_.]+", "-", d.name).lower(): d.version for d in m.distributions() if d.name}))
"""

TORCH = """
import json, torch
print(json.dumps(torch.__version__))
"""


class Step:
    """A named piece of set-up: says its name, keeps its output, and on failure shows the end of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.output = ""

    def __enter__(self) -> Step:
        print(f"  {self.name} …", flush=True)
        self.started = time.monotonic()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        seconds = time.monotonic() - self.started
        if error is None and seconds >= 1:
            print(f"    done in {seconds:.0f} s", flush=True)

    def run(self, command: Sequence[str], *, may_fail: bool = False) -> bool:
        """Run a command and keep what it says.

        Raises:
            SetupError: it failed, and may not.
        """
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            self.output, status = done.stdout, done.returncode
        except OSError as error:
            self.output, status = str(error), 127
        if status and not may_fail:
            raise SetupError(
                f"Set-up stopped at this step: {self.name}\n"
                f"The command was: {' '.join(command)}\n"
                f"It ended with status {status} and said at last:\n{last_lines(self.output)}"
            )
        return status == 0


def last_lines(text: str) -> str:
    return "\n".join(f"    | {line}" for line in text.strip().splitlines()[-SHOWN_LINES:])


def install(target: Target, extras: Sequence[str]) -> None:
    """Install the kit and what it needs, leaving the torch that is there.

    Raises:
        SetupError: a step failed, or torch is not what it was before.
    """
    python = target.python
    torch_before = find_torch(target)
    if torch_before is None:
        install_torch(target)
        torch_before = ask(python, TORCH)
    versions = ask(python, VERSIONS)
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(pins(target, versions)) + "\n", encoding="utf-8")
        pip = [python, "-m", "pip", "install", "--constraint", str(constraints)]
        whole = f"{REPOSITORY}[{','.join(extras)}]" if extras else str(REPOSITORY)
        done = False
        if "torch" in versions:  # without its own metadata pip does not see it, and would bring a second one
            with Step("Installing EveryDream Kit and what it needs (two or three minutes)") as step:
                done = step.run([*pip, "--editable", whole], may_fail=True)
        if not done:
            install_around_torch(pip, extras)
    torch_after = ask(python, TORCH)
    if torch_after != torch_before:
        raise SetupError(
            f"torch was {torch_before} and is now {torch_after}, though it was to stay. Put it back with\n"
            f"    {python} -m pip install --no-deps torch=={torch_before}\n"
            "or start a fresh session, and please report this with the output above."
        )


def compile_bytecode(python: str, folder: Path) -> None:
    """What pip does for packages that it copies, and not for ours, which stays where it is.

    Many images switch Python's bytecode files off; each start of the kit would then compile it again, half a second. A folder
    that must not be written to only keeps that half second.
    """
    subprocess.run([python, "-m", "compileall", "-q", str(folder)], capture_output=True, check=False)


def find_torch(target: Target) -> str | None:
    """Version of the torch that is there, or None.

    Raises:
        SetupError: it is there and does not work, or is too old, in a Python that is not ours to change.
    """
    if not works(target.python, "import sys, importlib.util as u; sys.exit(u.find_spec('torch') is None)"):
        return None
    try:
        version = str(ask(target.python, TORCH))
    except SetupError as error:
        if target.venv is not None:
            return None  # half an installation of our own: do it again
        raise SetupError(
            f"{target.python} has a torch that cannot be imported, and set-up does not replace the host's torch.\n"
            f"Start a fresh session, or choose another image. {error}"
        ) from None
    oldest = lower_bounds().get("torch", "0")
    if target.venv is None and as_numbers(version) < as_numbers(oldest):
        raise SetupError(
            f"torch {version} is older than {oldest}, which the kit needs, and set-up does not replace the host's "
            "torch. Choose a newer image, or use a virtual environment: EDK_VENV=.venv bash colab_setup.sh"
        )
    return version


def install_torch(target: Target) -> None:
    """Install the pinned torch, without CUDA where there is no NVIDIA GPU to use it."""
    command = [target.python, "-m", "pip", "install", f"torch=={TORCH_VERSION}"]
    build = os.environ.get("EDK_TORCH") or ("cuda" if has_nvidia() else "cpu")
    with Step(f"Installing torch {TORCH_VERSION} ({build}; a few minutes at most)") as step:
        smaller = platform.system() == "Linux" and build == "cpu" and is_reachable(f"{TORCH_CPU_INDEX}/torch/")
        if not (smaller and step.run([*command, "--index-url", TORCH_CPU_INDEX], may_fail=True)):
            step.run(command)


def install_around_torch(pip: Sequence[str], extras: Sequence[str]) -> None:
    """The second way, where the resolver would touch torch or one package cannot be had.

    What does not need torch is resolved as usual; what does goes in without its own requirements, which are all
    ours too.
    """
    wanted = requirements(extras)
    torchless = [line for line in wanted if requirement_name(line) not in ("torch", *NEEDS_TORCH)]
    with Step("Installing the packages that do not need torch") as step:
        step.run([*pip, *torchless])
    for line in wanted:
        name = requirement_name(line)
        if name not in NEEDS_TORCH:
            continue
        with Step(f"Installing {name} next to the torch that is there") as step:
            if not step.run([*pip, "--no-deps", line], may_fail=name in DISPENSABLE):
                print(f"    {name} could not be installed; {DISPENSABLE[name]}. Pip said:\n{last_lines(step.output)}")
    with Step("Installing EveryDream Kit") as step:
        step.run([*pip, "--no-deps", "--editable", str(REPOSITORY)])


def pins(target: Target, versions: dict[str, str]) -> list[str]:
    """Constraint lines: torch always stays; in a host's Python so does what its notebooks run on.

    A package older than the kit's lower bound is skipped, and pip upgrades it; torch that old was refused before.
    """
    held = HOSTS_OWN if target.venv is None else ("torch",)
    bounds = lower_bounds()
    lines = []
    for name in held:
        version = versions.get(name)
        if version is not None and as_numbers(version) >= as_numbers(bounds.get(name, "0")):
            lines.append(f"{name}=={version}")
    return lines


def install_browser() -> None:
    """Chromium for the browser tests, where that takes no more than asking."""
    if any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        return
    if not can_use_apt():
        print("  No Chromium here, and no right to install it: the browser tests will be skipped.")
        return
    with Step("Installing Chromium for the browser tests") as step:
        environ = ["env", "DEBIAN_FRONTEND=noninteractive"]
        done = step.run([*environ, "apt-get", "update"], may_fail=True) and step.run(
            [*environ, "apt-get", "install", "-y", "--no-install-recommends", "chromium"], may_fail=True
        )
        if not done:
            print(f"    Chromium could not be installed: the browser tests will be skipped.\n{last_lines(step.output)}")


def requirements(extras: Sequence[str]) -> list[str]:
    """Requirement lines of setup.cfg, with those of the extras."""
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    blocks = [config["options"]["install_requires"], *(config["options.extras_require"][extra] for extra in extras)]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in dict.fromkeys(lines) if line and not line.startswith("#")]


def lower_bounds() -> dict[str, str]:
    """Lowest versions that the kit works with, by normalized name."""
    return {requirement_name(line): line.partition(">=")[2] for line in requirements(()) if ">=" in line}


def requirement_name(line: str) -> str:
    """Normalized name in a requirement line, as pip compares names."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s<>=!~;\[]", line, maxsplit=1)[0]).lower()


def as_numbers(version: str) -> tuple[int, ...]:
    """The release part of a version as numbers: 2.11.0+cu128 is (2, 11, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[+a-zA-Z]", version, maxsplit=1)[0]))


def has_nvidia() -> bool:
    """Whether the NVIDIA driver sees a GPU."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True, check=False).returncode == 0


def is_reachable(address: str) -> bool:
    """Whether an address answers soon. Pip itself would wait for minutes behind a closed firewall."""
    try:
        with urllib.request.urlopen(address, timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:  # URLError and timeouts are OSErrors
        return False


def can_use_apt() -> bool:
    return shutil.which("apt-get") is not None and hasattr(os, "geteuid") and os.geteuid() == 0


def fingerprint() -> str:
    """Changes when the requirements, this script or the place of the repository change."""
    digest = hashlib.sha256(str(REPOSITORY).encode())
    for name in ("setup.cfg", "pyproject.toml", "scripts/set_up.py"):
        digest.update((REPOSITORY / name).read_bytes())
    return digest.hexdigest()


def stamp_path(prefix: str) -> Path:
    """Inside the environment, so that it goes when that goes; in the home folder if we may not write there."""
    if os.access(prefix, os.W_OK):
        return Path(prefix) / STAMP_NAME
    name = hashlib.sha256(prefix.encode()).hexdigest()[:16]
    return Path.home() / ".cache" / "everydream-kit" / f"{name}.json"


def read_stamp(prefix: str) -> set[str] | None:
    """Extras that the last set-up of this state installed, or None if there was none."""
    try:
        stamp = json.loads(stamp_path(prefix).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return set(stamp["extras"]) if stamp.get("fingerprint") == fingerprint() else None


def write_stamp(prefix: str, extras: Sequence[str]) -> None:
    """Remember that this state is installed, with these extras."""
    path = stamp_path(prefix)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"fingerprint": fingerprint(), "extras": sorted(extras)}), encoding="utf-8")


def wanted_extras(command: str, target: Target) -> list[str]:
    """Our own environment can open the notebooks; a host has its own Jupyter already."""
    extras = ["notebook"] if target.venv is not None else []
    return [*extras, "test"] if command in ("test", "check") else extras


def set_up(target: Target, extras: Sequence[str]) -> None:
    """Bring the target to the wanted state; cheap if it is there already."""
    if target.venv is not None:
        make_venv(target.venv)
    state = ask(target.python, WHERE)
    done = read_stamp(state["prefix"])
    is_ours = state["kit"] is not None and Path(state["kit"]).resolve().parent == REPOSITORY / "everydream_kit"
    if done is not None and done >= set(extras) and len(state["modules"]) == 4 and is_ours:
        return
    print(f"Setting up EveryDream Kit in {state['prefix']}", flush=True)
    if target.venv is None:
        check_may_install(target, state)
    install(target, extras)
    compile_bytecode(target.python, REPOSITORY / "everydream_kit")
    write_stamp(state["prefix"], sorted({*extras, *(done or ())}))
    print("EveryDream Kit is set up.", flush=True)


def check_may_install(target: Target, state: dict[str, Any]) -> None:
    """A host's own Python is ours to add to; a person's system Python is not."""
    if not works(target.python, "import pip") and not works(target.python, "import ensurepip; ensurepip.bootstrap()"):
        raise SetupError(f"{target.python} has no pip. Install it with: {target.python} -m ensurepip")
    if not state["managed"] or state["owned"]:
        return
    if target.host == "plain":
        raise SetupError(
            f"This notebook runs on {target.python}, which belongs to the operating system. Close it, and open it from "
            "the kit's own environment:\n"
            f"    bash {REPOSITORY / 'colab_setup.sh'}\n    {REPOSITORY / '.venv/bin/jupyter'} lab"
        )
    os.environ["PIP_BREAK_SYSTEM_PACKAGES"] = "1"  # the image is thrown away, so there is no system to break


def command_line(target: Target, command: str, rest: Sequence[str]) -> list[str]:
    """What to start once everything is there."""
    if command == "demo":
        return [target.python, "-m", "everydream_kit", "demo", *rest]
    if command == "check":
        return ["bash", str(REPOSITORY / "scripts" / "check"), *rest]
    selection = ["-m", "not slow and not full_size", "--durations=15"]
    return [target.python, "-m", "pytest", f"--rootdir={REPOSITORY}", *selection, *side_by_side(), *rest]


def side_by_side() -> list[str]:
    """Words for pytest to run files of tests next to each other, in the order of their names: the long ones come first.

    One process more than there are cores: tests of browsers and of commands wait for other processes a third of their time.
    """
    num_cores = os.cpu_count() or 1
    return ["-n", str(min(4, num_cores + 1)), "--dist", "loadfile", "--no-loadscope-reorder"] if num_cores > 1 else []


def main(arguments: Sequence[str]) -> int:
    """Set up, then become the program that was asked for. Returns an exit status if there is none, or set-up failed."""
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command and command not in COMMANDS:
        print(f"{command}: unknown word. Use: bash colab_setup.sh [{'|'.join(COMMANDS)}]", file=sys.stderr)
        return 2
    host = detect_host()
    target = choose_target(dict(os.environ), host.name, find_kernel_python(os.getppid()))
    try:
        set_up(target, wanted_extras(command, target))
        if command == "test":
            install_browser()
    except SetupError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    if not command:
        print(f"Python: {target.python}\nTry: {target.python} -m everydream_kit doctor")
        return 0
    if command in ("test", "check"):
        os.chdir(REPOSITORY)
        os.environ["EDK_PYTHON"] = target.python
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models gain nothing from threads that fight for the cores
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each process compiles anew what no set-up has compiled
    sys.stdout.flush()
    words = command_line(target, command, rest)
    os.execvp(words[0], words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
