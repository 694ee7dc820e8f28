"""What of Windows can be seen without it: the kit asks for nothing that only POSIX has. See tests/support/as_on_windows.py."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

WINDOWS = Path(__file__).parents[1] / "support" / "as_on_windows.py"


def on_windows(program: str, folder: Path) -> str:
    """What a program prints whose kit sees Windows."""
    file = folder / "program.py"
    file.write_text(program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(WINDOWS), str(file)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


IMPORTS_AND_TRAINING = """
import importlib, json, pkgutil, sys
import everydream_kit
names = [found.name for found in pkgutil.walk_packages(everydream_kit.__path__, "everydream_kit.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
import everydream_kit.atomic, everydream_kit.models.spans
assert everydream_kit.atomic.os.name == "nt" and not everydream_kit.models.spans.CAN_READ_AT
print(len(names))

from everydream_kit.cli import main
from everydream_kit.runs import list_runs
settings = json.loads(SETTINGS)
common = [word for name, value in settings.items() for word in ("--" + name, str(value))]
for words in (["train", *common, "--max_steps", "2"], ["resume", "logs/jets-*", "--max_steps", "3"]):
    words = [str(list_runs("logs")[-1].folder) if "*" in word else word for word in words]
    assert main(words) == 0, words
(run,) = list_runs("logs")
print(run.status()["state"], run.status()["step"], len(run.samples()), *(one.folder.name for one in run.checkpoints()))
"""


def test_every_module_is_imported_and_a_run_is_trained_sampled_saved_and_resumed(
    tmp_path: Path, tiny_model_folder: Path, image_folder: Path
) -> None:
    settings = {"resume_ckpt": str(tiny_model_folder), "data_root": str(image_folder), "project_name": "jets"}
    settings |= {"resolution": 64, "batch_size": 4, "sample_steps": 2, "sample_num_inference_steps": 1}
    settings |= {"num_workers": 1, "save_every_n_steps": 1, "optimizer": "adamw"}
    program = IMPORTS_AND_TRAINING.replace("SETTINGS", repr(json.dumps(settings)))
    number, *_, state = on_windows(program, tmp_path).splitlines()
    assert int(number) > 150
    assert state.startswith("finished 3 ")


JOB = r"""
import os, signal, sys
from pathlib import Path
from everydream_kit.jobs.job import Job
from everydream_kit.jobs.process import exit_code, spawn, write_object
from everydream_kit.jobs.safe_python import safe_environment

path = r"C:\Users\me\kit;;D:\more"
assert safe_environment({"PYTHONPATH": path})["PYTHONPATH"] == r"C:\Users\me\kit;D:\more"
folder = Path("logs/jets-20261128-120000")
folder.mkdir(parents=True)
known = spawn([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], folder / "log", None, append=False)
write_object(folder / "job.json", {**known.to_json()})
while exit_code(known.to_json()) is None:
    pass
print(Job(folder).status()["message"])
"""


def test_a_process_that_was_killed_is_reported_where_there_is_no_sigkill(tmp_path: Path) -> None:
    assert "ended by signal 9" in on_windows(JOB, tmp_path)


UNPACK = """
from pathlib import Path
from everydream_kit.data.sources import unpack_archive
from everydream_kit.errors import DataError
from everydream_kit.panels.upload_area import safe_name

for archive in sorted(Path(".").glob("*.zip")):
    try:
        print(archive.name, sorted(path.name for path in unpack_archive(archive, Path("out")).rglob("*.png")))
    except DataError as problem:
        print("refused", problem)
print(*map(safe_name, ("CON.png", "sub/nul", "lpt1.tar.gz", "a./b .png", "console.png")))
"""
RESERVED = (
    "CON",
    "aux.txt",
    "sub/nul.png",
    "COM1.png",
    "a.png:stream",
    "dot./a.png",
    "space /a.png",
    "a?.png",
    "lpt¹.png",
)


def test_names_that_windows_reserves_are_refused_by_name_and_no_others(tmp_path: Path) -> None:
    for number, name in enumerate(RESERVED):
        with zipfile.ZipFile(tmp_path / f"{number}.zip", "w") as file:
            file.writestr(name, b"x")
    with zipfile.ZipFile(tmp_path / "plain.zip", "w") as file:
        for name in ("console.png", "com.png", "auxiliary/com10.png"):
            file.writestr(name, b"x")
    *refused, plain, uploaded = on_windows(UNPACK, tmp_path).splitlines()
    assert len(refused) == len(RESERVED)
    for name, line in zip(RESERVED, refused, strict=True):
        assert f"the entry {name!r} has a part that Windows does not allow" in line
    assert plain == "plain.zip ['com.png', 'com10.png', 'console.png']"
    assert uploaded == "_CON.png sub/_nul _lpt1.tar.gz a/b .png console.png"
