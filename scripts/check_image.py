"""Goes through the Dockerfile without a container engine: in a Debian root that debootstrap makes, as root, on Linux.

    python scripts/check_image.py --python PREFIX
    python scripts/check_image.py --python PREFIX --keep FOLDER --pass PIP_CERT --copy /etc/ssl/certs/ca-certificates.crt

Every COPY, ENV and WORKDIR is followed, every RUN runs in the root, and the entry point is started and must answer: JupyterLab
with its login page, TensorBoard on this machine only. What an engine does differently is not tried: its layers, the base image
itself (`--python` stands in for its Python), users, limits and GPUs. Needs 12 GB of disk and the network.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

REPOSITORY = Path(__file__).resolve().parents[1]
LIBRARIES = ("ca-certificates", "netbase", "tzdata", "libssl3", "libffi8", "libsqlite3-0", "libbz2-1.0", "liblzma5")
"""What python:3.12-slim has next to Debian's smallest system, and a Python from elsewhere needs."""
PORT = 18888
START_SECONDS = 180
PLAIN_PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
"""What the base image sets."""


def main() -> int:
    """Make the root, follow the Dockerfile, start the entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="prefix of a Python of the base image's version")
    parser.add_argument("--keep", type=Path, help="folder for the root, which stays and is used again")
    parser.add_argument("--pass", dest="passed", action="append", default=[], help="a variable of this machine")
    parser.add_argument(
        "--copy", type=Path, action="append", default=[], help="a file of this machine, to the same place"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Root(options.keep or Path(temporary) / "root", options.passed)
        root.make(options.python, options.copy)
        entry = None
        for word, rest in instructions((REPOSITORY / "Dockerfile").read_text(encoding="utf-8")):
            entry = root.follow(word, rest) or entry
        assert entry, "the Dockerfile has no ENTRYPOINT"
        root.start(entry)
    print("Everything worked.")
    return 0


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """The Dockerfile's instructions, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            yield word, " ".join(rest.split())


class Root:
    """A system in a folder, and where the Dockerfile has come to.

    Args:
        folder: of the root.
        passed: names of variables of this machine that its commands see.
    """

    def __init__(self, folder: Path, passed: list[str]) -> None:
        self.folder = folder.absolute()
        self.environment = {"PATH": PLAIN_PATH, "HOME": "/root", **{name: os.environ[name] for name in passed}}
        self.work = PurePosixPath("/")

    def make(self, python: Path, copies: list[Path]) -> None:
        """Debian with a Python in /usr/local, as the base image has it."""
        if not (self.folder / "usr/local/bin/python3").exists():
            words = ["debootstrap", "--variant=minbase", f"--include={','.join(LIBRARIES)}", "bookworm", self.folder]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
            shutil.copytree(python, self.folder / "usr/local", symlinks=True, dirs_exist_ok=True)
        for file in [Path("/etc/resolv.conf"), *copies]:
            target = self.folder / file.relative_to("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
        self.run("ldconfig && python3 --version")

    def follow(self, word: str, rest: str) -> list[str] | None:
        """Carry out one instruction. Returns the words of an entry point."""
        began = time.monotonic()
        if word == "RUN":
            self.run(rest)
        elif word == "ENV":
            for name, value in (part.split("=", 1) for part in shlex.split(rest)):
                self.environment[name] = re.sub(r"\$(\w+)", lambda found: self.environment[found[1]], value)
        elif word == "WORKDIR":
            self.work = self.work / rest
            self.inside(self.work).mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            *names, target = rest.split()
            self.copy(names, self.inside(self.work / target))
        elif word == "VOLUME":
            self.inside(PurePosixPath(rest)).mkdir(parents=True, exist_ok=True)
        elif word not in {"FROM", "EXPOSE", "ENTRYPOINT"}:
            sys.exit(f"{word} is an instruction that scripts/check_image.py does not know.")
        print(f"ok {time.monotonic() - began:6.0f} s  {word} {rest[:100]}", flush=True)
        return list(json.loads(rest)) if word == "ENTRYPOINT" else None

    def inside(self, path: PurePosixPath) -> Path:
        """A path of the root as this machine sees it."""
        return self.folder / path.relative_to("/")

    def copy(self, names: list[str], target: Path) -> None:
        """Copy files of the repository; of a folder what is under version control, which `.dockerignore` lets through."""
        listed = subprocess.run(
            ["git", "ls-files", "-z", *names], cwd=REPOSITORY, check=True, capture_output=True, text=True
        ).stdout
        for name in filter(None, listed.split("\0")):
            given = max((one for one in names if one in {".", name} or name.startswith(f"{one}/")), key=len)
            is_folder = (REPOSITORY / given).is_dir()
            path = target / (Path(name).relative_to(given) if is_folder else Path(name).name)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, path)

    def words(self, command: str) -> list[str]:
        """A command in the root, with processes and mounts of its own, which end with it."""
        mounts = f"mount --rbind /dev {shlex.quote(str(self.folder))}/dev"
        enter = f"exec chroot {shlex.quote(str(self.folder))} /bin/sh -c {shlex.quote(f'cd {self.work} && {command}')}"
        mounted = f"--mount-proc={self.folder}/proc"
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child", mounted, "sh", "-c", f"{mounts} && {enter}"]

    def run(self, command: str) -> None:
        """Run a command as RUN does. What it prints is shown where it fails."""
        done = subprocess.run(
            self.words(command),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"FAILED ({done.returncode}): {command}\n{done.stdout[-4000:]}")

    def start(self, entry: list[str]) -> None:
        """Start the entry point; JupyterLab must show its login page, and TensorBoard answer."""
        secret = {"JUPYTER_PASSWORD": "correct horse battery", "JUPYTER_PORT": str(PORT)}
        log = self.folder / "start.log"
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                self.words(shlex.join(entry)),
                env=self.environment | secret,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        try:
            for name, address in {
                "JupyterLab": f"http://127.0.0.1:{PORT}/login",
                "TensorBoard": "http://127.0.0.1:6006/data/environment",
            }.items():
                shown = wait_for(address, process, log)
                print(f"ok          {name} answers with {len(shown):,} bytes", flush=True)
            refused = status_of(f"http://127.0.0.1:{PORT}/api/contents")
            assert refused == 403, f"without the password JupyterLab answers {refused}"
            print("ok          without the password JupyterLab answers 403", flush=True)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> bytes:
    """What a server answers, once it does."""
    last: OSError | None = None
    for _ in range(START_SECONDS):
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                return bytes(answer.read())
        except OSError as problem:
            last = problem
        if process.poll() is not None:
            break
        time.sleep(1)
    sys.exit(f"FAILED: {address} does not answer ({last}).\n{log.read_text(encoding='utf-8')[-4000:]}")


def status_of(address: str) -> int:
    """The status of an answer, errors included."""
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


if __name__ == "__main__":
    sys.exit(main())
