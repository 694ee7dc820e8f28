"""The README's commands, one after the other as a stranger types them, on a small model and for a few steps."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_runs import TOKEN
from hub_stand_in import HubStandIn, use_as_hub
from rehearsals import square_images

import everydream_kit as edk
from everydream_kit.cli import main

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
RUN_ELSEWHERE = {
    "bash colab_setup.sh demo": "tests/unit/test_setup_script.py, and CI's wheel test runs what it starts",
    "bash colab_setup.sh test": "CI is this command",
    ".venv/bin/jupyter lab notebooks": "tests/browser and tests/notebooks",
}
SMALLER = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "embedded",  # no network here, and minutes less
    "--max_epochs 40": "--max_epochs 1 --resolution 64 --batch_size 2 --sample_steps none",
    "--prompt": "--num_inference_steps 1 --prompt",
}
"""What is put in the place of a command's words."""


def shown_commands() -> list[str]:
    """What a shell would run of the indented blocks: continued lines in one, without comments."""
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL).replace("\\\n", "")
    indented = re.findall(r"^ {4}(\S.*)$", prose, re.MULTILINE)
    return [re.sub(r"\s+#.*$", "", line) for line in indented if not line.startswith("#")]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    with HubStandIn(tmp_path / "hub") as server:
        server.add_user(TOKEN, "me")
        use_as_hub(monkeypatch, server)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def as_here(line: str) -> str:
    """A command with this test's base, its few steps, and the names of the run that it has made by then."""
    for words, smaller in SMALLER.items():
        line = line.replace(words, smaller)
    made = sorted(Path("logs").glob("jets-*"))
    if made:
        checkpoint = next((made[-1] / "ckpts").glob("*jets-*"))
        line = re.sub(r"jets-ep\d+-gs\d+", checkpoint.name, line)
        line = re.sub(r"logs/jets-\d+-\d+", f"logs/{made[-1].name}", line)
    return line


def test_the_readmes_commands_work_in_their_order(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    square_images(workspace / "input", 4)
    monkeypatch.chdir(workspace)
    done = []
    for line in shown_commands():
        if line in RUN_ELSEWHERE:
            continue
        name, *words = shlex.split(as_here(line).removeprefix("everydream "))
        status = main([name, *words])
        shown = capsys.readouterr()
        # nothing is left to resume after a run that ended, which is said as one error
        assert status == 0 or (name == "resume" and "nothing left" in shown.err), f"{line}\n{shown.out}\n{shown.err}"
        done.append(name)
    assert done == ["doctor", "prepare", "plan", "train", "resume", "sample", "export", "push"]
    assert Path("jets.safetensors").is_file()
    assert hub.files("me/jets")


def test_the_readmes_python_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    square_images(tmp_path / "input", 4)
    monkeypatch.chdir(tmp_path)
    shorter = block.replace("resolution=128, max_epochs=10", "resolution=64, max_epochs=1, sample_steps=None")
    assert shorter != block
    exec(compile(shorter, "README.md", "exec"), {"edk": edk})
    assert Path("jets.safetensors").is_file()
