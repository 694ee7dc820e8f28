"""The container image, as far as that goes without an engine: the linter, what a stage sees, the start script as a program."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jupyter_server.auth import passwd_check

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = ("colab_setup.sh", "scripts/start_pod.sh", "scripts/check", ".ci/run")
UNPINNED = "DL3008"
"""hadolint wants versions of Debian's packages; these go from the archive with each fix, and the base image is a release."""


def tool(name):
    """A linter next to this Python, or on PATH."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found, f"{name} is missing; it is in the test extra"
    return found


def test_the_dockerfile_passes_its_linter():
    words = [tool("hadolint"), "--ignore", UNPINNED, REPOSITORY / "Dockerfile"]
    linted = subprocess.run(words, capture_output=True, text=True, check=False)
    assert linted.returncode == 0, linted.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_shell_scripts_pass_their_linter(script):
    linted = subprocess.run([tool("shellcheck"), REPOSITORY / script], capture_output=True, text=True, check=False)
    assert linted.returncode == 0, linted.stdout


def test_set_up_works_with_the_few_files_that_the_images_first_stage_has(tmp_path):
    """A stage that installs the requirements copies only what they are made of, so that code changes do not repeat it."""
    lines = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copies = [line.split()[1:] for line in lines if line.startswith("COPY ")]
    first_stage = copies[: copies.index([".", "."])]
    for *names, target in first_stage:
        for name in names:
            source, folder = REPOSITORY / name, tmp_path / target
            folder = folder.parent if source.is_dir() else folder
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, folder / source.name) if source.is_dir() else shutil.copy(source, folder)
    program = "import runpy; runpy.run_path('scripts/set_up.py', run_name='imported')['lower_bounds']()"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": ""})


def wait_for_reports(file):
    """What both servers were given; TensorBoard's starts in the background."""
    for _ in range(600):
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if "tensorboard --logdir" in text and "jupyter lab" in text:
            return text
        time.sleep(0.1)
    raise AssertionError(f"one of the servers was not started: {text[:300]}")


@pytest.fixture
def pod(tmp_path):
    """Starts the image's program with stand-ins for the two servers; gives its result and what the servers were given."""
    commands = tmp_path / "bin"
    commands.mkdir()
    report = 'printf "%s\\n" "$0 $*" >> "$REPORT"; env >> "$REPORT"\n'
    programs = {"jupyter": report, "tensorboard": report, "python": f'exec {sys.executable} "$@"\n'}
    for name, program in programs.items():
        (commands / name).write_text(f"#!/bin/bash\n{program}", encoding="utf-8")
        (commands / name).chmod(0o755)
    report_file = tmp_path / "report"

    def start(**variables):
        environ = {**os.environ, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "REPORT": str(report_file)}
        environ |= {"EDK_WORKSPACE": str(tmp_path / "volume"), "TMPDIR": str(tmp_path), **variables}
        words = ["bash", REPOSITORY / "scripts" / "start_pod.sh"]
        done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False, timeout=60)
        return done, wait_for_reports(report_file) if done.returncode == 0 else ""

    return start


def test_a_pod_serves_jupyter_behind_the_password_and_hides_the_password(pod, tmp_path):
    done, report = pod(JUPYTER_PASSWORD="correct horse battery", JUPYTER_PORT="9000")
    assert done.returncode == 0, done.stderr
    (config,) = tmp_path.glob("tmp.*/jupyter_server_config.json")
    assert config.stat().st_mode & 0o077 == 0
    settings = json.loads(config.read_text(encoding="utf-8"))
    assert settings["ServerApp"]["port"] == 9000
    assert passwd_check(settings["PasswordIdentityProvider"]["hashed_password"], "correct horse battery")
    assert f"jupyter lab --config {config}" in report
    assert "correct horse" not in report + done.stdout + done.stderr


def test_a_pod_copies_the_notebooks_once(pod, tmp_path):
    pod(JUPYTER_PASSWORD="correct horse battery")
    notebook = tmp_path / "volume" / "notebooks" / "00_quickstart.ipynb"
    assert notebook.is_file()
    notebook.write_text("my work", encoding="utf-8")
    pod(JUPYTER_PASSWORD="correct horse battery")
    assert notebook.read_text(encoding="utf-8") == "my work"


def test_tensorboard_listens_on_the_machine_only(pod):
    _, report = pod(JUPYTER_PASSWORD="correct horse battery")
    assert "--host 127.0.0.1" in report
    assert "--bind_all" not in report


def test_tensorboard_is_open_on_request(pod):
    _, report = pod(JUPYTER_PASSWORD="correct horse battery", TENSORBOARD_PUBLIC="1")
    assert "--bind_all" in report


def test_the_check_without_an_engine_follows_the_dockerfile(tmp_path):
    """`scripts/check_image.py` takes minutes and the network for its RUN lines; here is the rest of it."""
    check_image = runpy.run_path(str(REPOSITORY / "scripts" / "check_image.py"))
    steps = list(check_image["instructions"]((REPOSITORY / "Dockerfile").read_text(encoding="utf-8")))
    root = check_image["Root"](tmp_path / "root", [])
    entries = [root.follow(word, rest) for word, rest in steps if word != "RUN"]
    assert [word for word, _ in steps if word == "RUN"] == ["RUN"] * 3
    assert entries[-1] == ["tini", "--", "bash", "/opt/everydream-kit/scripts/start_pod.sh"]
    assert root.environment["PATH"].startswith("/opt/everydream/bin:/usr/local/bin")
    kit = tmp_path / "root" / "opt" / "everydream-kit"
    for name in (
        "setup.cfg",
        "scripts/start_pod.sh",
        "everydream_kit/demo/features.safetensors",
        "notebooks/02_train.ipynb",
    ):
        assert (kit / name).is_file()
    assert not (kit / ".venv").exists()
    assert (tmp_path / "root" / "workspace").is_dir()
