"""Modules in the working folder, such as an unpacked dataset's `yaml.py`, are not imported by the kit's processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from everydream_kit import jobs
from everydream_kit.jobs.safe_python import module_command, safe_environment

NAMES = ("yaml", "psutil", "torch", "pydantic", "PIL", "numpy", "argparse", "runpy", "json", "difflib", "wandb")


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder whose modules say that they ran."""
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("arguments", [["parameters"], ["--help"], ["runs"], ["push", "nowhere", "me/x", "--dry_run"]])
def test_the_command_imports_nothing_from_the_working_folder(dataset: Path, arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "everydream_kit", *arguments], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    assert not (dataset / "ran").exists()


@pytest.mark.parametrize("version", [(3, 10), (3, 11)])
def test_a_module_started_by_us_imports_nothing_from_the_working_folder(
    dataset: Path, version: tuple[int, int]
) -> None:
    """For 3.10, which has no -P, the folder is taken off by hand; that way works on every version."""
    command = module_command("everydream_kit", ["parameters"], version)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("# Parameters"), done.stderr
    assert not (dataset / "ran").exists()


def test_a_detached_job_and_its_children_import_nothing_from_the_working_folder(dataset: Path) -> None:
    settings = {"resume_ckpt": "nowhere", "data_root": "nothing", "logdir": str(dataset / "logs")}
    status = jobs.start(settings).watch()
    assert status["state"] == "failed"
    grandchild = [sys.executable, "-c", "import subprocess, sys; subprocess.run([sys.executable, '-m', 'yaml'])"]
    jobs.start(settings, command=grandchild).watch()
    assert not (dataset / "ran").exists()


@pytest.mark.parametrize(("path", "kept"), [(":/a", "/a"), ("/a::/b", "/a:/b"), ("", ""), ("/a", "/a")])
def test_empty_entries_of_the_module_path_mean_the_working_folder_and_are_dropped(path: str, kept: str) -> None:
    assert safe_environment({"PYTHONPATH": path}) == {"PYTHONPATH": kept, "PYTHONSAFEPATH": "1"}
    assert "PYTHONPATH" not in safe_environment({name: "" for name in os.environ if name != "PYTHONPATH"})
