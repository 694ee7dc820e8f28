"""Builds a replica of a notebook host from its list of packages, sets the kit up on it, and runs what people run there.

    python scripts/check_host.py tests/hosts/colab-2026-08-19.txt --as colab
    python scripts/check_host.py LIST --as colab --keep FOLDER      keep the replica, and use it again next time

LIST is what `pip freeze` prints on the host. Of it the replica gets what the kit imports, and what the kit's libraries look
for by themselves (`LOOKED_FOR`), each in the version of the list, with everything that these require held to the list too.
torch comes from PyPI in the list's version, so its CUDA libraries may differ from the host's; nothing here has a GPU. What
cannot be installed is named.

Set-up runs as a notebook of that host runs it and must leave every version of the list as it was. Then follow `doctor`, full
training, LoRA, DoRA, textual inversion, export, the notebooks and, with the test suite's own files, the panels and the Hub.
The exit status is 0 if all of it worked.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
IMPORTED = (
    *("torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes", "pytorch_optimizer", "safetensors"),
    *(
        "huggingface_hub",
        "hf-xet",
        "pillow",
        "numpy",
        "pydantic",
        "PyYAML",
        "tqdm",
        "tensorboard",
        "ipywidgets",
        "anywidget",
    ),
    *("imagehash", "psutil", "filelock", "ipykernel", "ipython", "traitlets", "notebook", "nbclient", "nbformat"),
    *("matplotlib", "jupyter_client", "tornado", "pyzmq", "protobuf", "pytest", "setuptools"),
)
"""What the kit, its panels and its tests import."""
LOOKED_FOR = (
    *(
        "torchao",
        "torchvision",
        "torchaudio",
        "triton",
        "xformers",
        "flash-attn",
        "kernels",
        "hqq",
        "gptqmodel",
        "optimum",
    ),
    *(
        "tensorflow",
        "keras",
        "tf_keras",
        "jax",
        "jaxlib",
        "flax",
        "wandb",
        "datasets",
        "sentencepiece",
        "timm",
        "scipy",
    ),
    *(
        "scikit-learn",
        "pandas",
        "opencv-python-headless",
        "sentence-transformers",
        "google-auth",
        "ftfy",
        "onnxruntime",
    ),
)
"""What diffusers, transformers, peft, bitsandbytes, accelerate and TensorBoard look for by themselves."""
TEST_TOOLS = ("hypothesis", "pytest-timeout", "jinja2")
"""What the tests that run here need and a host may lack."""
NOT_HELD = re.compile(r"^(nvidia-|cuda-|triton\b)")
"""A replica's torch brings its own CUDA."""
VARIABLES = {
    "colab": {"COLAB_RELEASE_TAG": "replica", "COLAB_GPU": "0"},
    "kaggle": {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"},
    "plain": {},
}
"""By which each host is recognized, see `everydream_kit/hosts.py`."""
ONE_PROCESS = """
import glob, json, sys, time
from everydream_kit.cli import main
from everydream_kit.optional_packages import hide_unused
hide_unused()
for name, words in json.load(open(sys.argv[1])):
    began = time.monotonic()
    if main([max(glob.glob(word)) if "*" in word else word for word in words]):
        sys.exit(f"{name} failed")
    print(f"        {time.monotonic() - began:5.0f} s  {name}", flush=True)
"""
"""Runs commands as `everydream` would, one after the other."""
LINE = re.compile(r"^([A-Za-z0-9][\w.-]*)==([^+\s]+)(\+\S+)?$")


def main() -> int:
    """Build, set up, run; print a line for each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path, help="what pip freeze prints on the host")
    parser.add_argument(
        "--as", dest="host", choices=list(VARIABLES), default="colab", help="the host to be recognized as"
    )
    parser.add_argument("--python", help="the Python to use; by default the latest of 3.13 to 3.10 that is found")
    parser.add_argument(
        "--quick", action="store_true", help="most commands in one process; without the panels' tests and the notebooks"
    )
    parser.add_argument("--keep", type=Path, help="folder for the replica, which stays")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        replica = Replica(folder, read_list(options.list), options.host)
        replica.build(options.python or find_python())
        replica.set_up()
        replica.use(one_process=options.quick)
        replica.push(every_flag=not options.quick)
        if not options.quick:
            replica.use_notebooks()
        return replica.report()


def read_list(path: Path) -> dict[str, str]:
    """Package -> version, without local parts such as `+cu128`. Packages from addresses and files are passed over."""
    found = (LINE.match(line.strip()) for line in path.read_text(encoding="utf-8").splitlines())
    return {plain(match[1]): match[2] for match in found if match}


def plain(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def find_python() -> str:
    """The latest Python of 3.13 to 3.10 that starts: on PATH, or among pyenv's versions."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in ("3.13", "3.12", "3.11", "3.10"):
        names = [f"python{version}", *sorted(pyenv.glob(f"{version}.*/bin/python"))]
        for path in filter(None, map(shutil.which, names)):
            started = subprocess.run([path, "-c", "import venv, ensurepip"], capture_output=True, check=False)
            if started.returncode == 0:
                return path
    return sys.executable


class Replica:
    """An environment with a host's packages, and what happened in it."""

    def __init__(self, folder: Path, versions: Mapping[str, str], host: str) -> None:
        self.folder, self.versions, self.host = folder.absolute(), versions, host
        self.python = self.folder / "host" / "bin" / "python"
        self.work = self.folder / "work"
        self.failed: list[str] = []
        self.missing: list[str] = []

    def run(self, name: str, command: Sequence[object], *, tests: bool = False, **environ: str) -> str:
        """Run one step, print a line about it, and return what it printed.

        Args:
            name: for people.
            command: its words.
            tests: the step runs tests of the repository, which say themselves which host they play.
            **environ: further environment variables.
        """
        started = time.monotonic()
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("EDK_", "PYTEST_"))}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # else each process compiles the host's packages anew
        environment |= {} if tests else VARIABLES[self.host]
        # Two threads of a step wait for each other, spinning: next to other work a step took 58 s instead of 2 s.
        environment |= {"OMP_NUM_THREADS": "1"} | environ
        done = subprocess.run(
            [str(word) for word in command],
            cwd=REPOSITORY if tests else self.work,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        print(
            f"{'ok' if done.returncode == 0 else 'FAILED':<7} {time.monotonic() - started:>5.0f} s  {name}", flush=True
        )
        if done.returncode:
            self.failed.append(name)
            print("\n".join(f"        | {line}" for line in done.stdout.strip().splitlines()[-15:]), flush=True)
        return done.stdout

    def build(self, python: str) -> None:
        """Install the host's packages."""
        self.work.mkdir(parents=True, exist_ok=True)
        if self.python.is_file():
            return
        self.run("environment", [python, "-m", "venv", self.folder / "host"])
        constraints = self.folder / "constraints.txt"
        held = {name: version for name, version in self.versions.items() if not NOT_HELD.match(name)}
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in held.items()), encoding="utf-8")
        wanted = {plain(name) for name in (*IMPORTED, *LOOKED_FOR)} & set(held)
        install = [*self.installer(), "--constraint", constraints]
        lines = [f"{name}=={held[name]}" for name in sorted(wanted)]
        failures = len(self.failed)
        self.run(f"{len(lines)} packages of the list", [*install, *lines])
        if len(self.failed) > failures:  # one that cannot be had must not cost all others
            del self.failed[failures:]
            for line in lines:
                failures = len(self.failed)
                self.run(line, [*install, line])
                if len(self.failed) > failures:
                    self.missing.append(self.failed.pop())

    def installer(self) -> list[object]:
        """The first words of a command that installs into the replica: uv, which takes a quarter of pip's time, or pip."""
        pip = [self.python, "-m", "pip", "install", "--quiet", "--no-compile"]
        tool = self.folder / "tool"
        done = subprocess.run([*map(str, pip), "--target", str(tool), "uv"], capture_output=True, check=False)
        if done.returncode:
            return [*pip]
        return [tool / "bin" / "uv", "pip", "install", "--quiet", "--python", self.python]

    def set_up(self) -> None:
        """Run set-up as a notebook of the host does; nothing of the list may change."""
        before = self.installed()
        self.run("set-up", ["bash", REPOSITORY / "colab_setup.sh"], EDK_PYTHON=str(self.python))
        after = self.installed()
        changed = [f"{name} {before[name]} -> {after.get(name)}" for name in before if after.get(name) != before[name]]
        if changed:
            self.failed.append("set-up changed packages of the host: " + ", ".join(changed))
        added = sorted(set(after) - set(before))
        print(f"        set-up added {', '.join(added)}")

    def installed(self) -> dict[str, str]:
        """Package -> version of all that the replica has."""
        program = (
            "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
        )
        answer = subprocess.run(
            [self.python, "-c", program], capture_output=True, text=True, check=True, cwd=self.folder
        )
        return {plain(name): version for name, version in json.loads(answer.stdout).items()}

    def use(self, *, one_process: bool) -> None:
        """What people do there.

        Args:
            one_process: all but the LoRA in one process, which imports the host's packages once. The LoRA is what these
                packages have broken before, so it starts as people start it.
        """
        (self.work / "logs").mkdir(exist_ok=True)
        steps = self.steps()
        if one_process:
            self.run("LoRA", [self.python, "-m", "everydream_kit", *steps.pop("LoRA")])
            listed = self.folder / "steps.json"
            listed.write_text(json.dumps([[name, words] for name, words in steps.items()]), encoding="utf-8")
            shown = self.run("the other commands", [self.python, "-c", ONE_PROCESS, listed])
            print("\n".join(re.findall(r"^ {8} *\d+ s  .+$", shown, re.MULTILINE)), flush=True)
            return
        for name, words in steps.items():
            found = [max(map(str, self.work.glob(word))) if "*" in word else word for word in words]
            self.run(name, [self.python, "-m", "everydream_kit", *found])

    def steps(self) -> dict[str, list[str]]:
        """Name -> words of a command, in order. A word with a star is the latest of the files that it fits."""
        images = REPOSITORY / "everydream_kit" / "demo" / "images"
        sample = {"samples": [{"prompt": "a cat", "cfgs": [3]}], "num_inference_steps": 2}
        (self.work / "prompts.json").write_text(json.dumps(sample), encoding="utf-8")
        common = ["train", "--resume_ckpt", "embedded", "--data_root", str(images), "--max_steps", "2"]
        common += ["--resolution", "64", "--batch_size", "2", "--sample_steps", "2", "--sample_prompts", "prompts.json"]
        words = ["--training_kind", "textual_inversion", "--new_tokens", '{"<my-cat>": "cat"}']
        return {
            "doctor": ["doctor"],
            "full training": [*common, "--project_name", "full"],
            "LoRA": [*common, "--project_name", "lora", "--training_kind", "lora"],
            "DoRA": [*common, "--project_name", "dora", "--training_kind", "lora", "--lora_dora"],
            "textual inversion": [*common, "--project_name", "words", *words],
            "8-bit AdamW": [*common, "--project_name", "eight", "--optimizer", "adamw8bit"],
            "export of full": ["export", "logs/full-*", "full.safetensors"],
            "export of lora": ["export", "logs/lora-*", "lora.safetensors"],
        }

    def push(self, *, every_flag: bool) -> None:
        """Push against the stand-in for the Hub: from a shell, or with every flag."""
        self.run("test tools", [self.python, "-m", "pip", "install", "--quiet", "--no-compile", *TEST_TOOLS])
        chosen = [] if every_flag else ["-k", "from_a_shell"]
        tests = [*self.pytest(), "tests/integration/test_push_command.py", *chosen]
        self.run("push (against the stand-in)", tests, tests=True)

    def use_notebooks(self) -> None:
        """The panels with the host's ipywidgets, and every notebook from top to bottom."""
        panels = ["tests/unit/panels", "-m", "not background"]
        self.run("panels", [*self.pytest(), *panels], tests=True)
        self.run("notebooks", [*self.pytest(), "tests/notebooks"], tests=True)

    def pytest(self) -> list[object]:
        """The first words of a command that runs tests with the host's packages."""
        return [self.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-W", "ignore"]

    def report(self) -> int:
        """Say what could not be installed and what failed. Returns the exit status."""
        if self.missing:
            print(f"Not to be had here, so not in the replica: {', '.join(self.missing)}")
        print(f"{len(self.failed)} failed: {'; '.join(self.failed)}" if self.failed else "Everything worked.")
        return 1 if self.failed else 0


if __name__ == "__main__":
    sys.exit(main())
