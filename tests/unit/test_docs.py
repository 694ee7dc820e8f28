"""The documentation keeps up: links lead somewhere, commands and settings exist, every page can be found."""

import argparse
import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import everydream_kit
from everydream_kit.cli import COMMANDS, main
from everydream_kit.config import RETIRED, TrainConfig

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
PAGES = sorted([REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *DOCS.glob("*.md")])
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
OTHERS_FLAGS = {"no-deps", "shm-size", "help", "host", "port", "logdir", "gpus", "bind_all", "force-reinstall", "fix"}
"""Flags of pip, docker, TensorBoard and our scripts that the pages mention next to ours."""


def name_of(path):
    return str(path.relative_to(REPOSITORY))


def anchors(page):
    """The names that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    broken = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target) if target else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(link)
    assert not broken


PLACE = re.compile(r"`([\w.]+)` in `(everydream_kit/[\w/]+\.py)`")
NUMBERS = {"one": 1, "two": 2}  # "three" is more than a usual change may take


def described_changes():
    """Each change of "Five changes": its title, the number of files that it claims, and its text on one line."""
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    section = page.partition("## Five changes")[2].partition("\n## ")[0]
    entries = re.findall(r"\*\*([^*]+): (\w+) files?\.\*\*(.*?)(?=\n\*\*|\Z)", section, re.DOTALL)
    return [(title, NUMBERS[number], " ".join(text.split())) for title, number, text in entries]


def has_symbol(path, dotted):
    """Whether a file defines a function, a class, a method, a field or a constant of this name."""
    body = ast.parse((REPOSITORY / path).read_text(encoding="utf-8")).body
    for name in dotted.split("."):
        found = [node for node in body if name in _names_of(node)]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True


def _names_of(node):
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return {getattr(node, "name", None), *(target.id for target in targets if isinstance(target, ast.Name))}


@pytest.mark.parametrize(("title", "number", "text"), described_changes(), ids=lambda value: str(value)[:30])
def test_a_described_change_names_places_that_exist_in_as_many_files_as_it_says(title, number, text):
    places = PLACE.findall(text)
    assert [f"{name} in {path}" for name, path in places if not has_symbol(path, name)] == []
    assert len({path for _, path in places}) == number
    assert not re.search(r"\.py:\d|lines? \d", text), "a line number is wrong after the next change; name the function"


def test_the_changes_of_every_usual_kind_are_described():
    kinds = " ".join(title for title, _, _ in described_changes())
    assert [kind for kind in ("optimizer option", "loss", "button", "checkpoint", "action") if kind not in kinds] == []


def test_every_page_can_be_found_from_the_index():
    """In one step or several: the index need not name what belongs to another page."""
    found, waiting = set(), [DOCS / "index.md"]
    while waiting:
        page = waiting.pop().resolve()
        if page in found or page.suffix != ".md" or not page.is_file():
            continue
        found.add(page)
        waiting += [page.parent / link.partition("#")[0] for link in LINK.findall(page.read_text(encoding="utf-8"))]
    assert sorted(name_of(page) for page in PAGES if page.resolve() not in found) == []


def commands_in(text):
    """The words after `everydream` in code, whether in a block or between backquotes."""
    return set(re.findall(r"(?:^ {4,}|`|bin/|&& |\$ )everydream ([a-z]+)", text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_that_is_shown_exists(page):
    assert commands_in(page.read_text(encoding="utf-8")) <= set(COMMANDS)


def test_the_readme_shows_the_two_commands_first():
    code = [line.strip() for line in README.splitlines() if line.startswith("    ")]
    assert code[:2] == ["bash colab_setup.sh demo", "bash colab_setup.sh test"]
    assert {"doctor", "prepare", "train", "resume", "sample", "export"} <= commands_in(README)


PROSE = [
    page
    for page in PAGES
    if page.name in ("README.md", "tweaking.md", "differences.md", "colab.md", "runpod.md", "hub.md", "models.md")
]


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_every_flag_that_is_shown_exists(page):
    flags = set(re.findall(r"(?<![\w-])--([a-zA-Z][\w-]*)", page.read_text(encoding="utf-8")))
    assert flags - set(TrainConfig.model_fields) - set(RETIRED) - OTHERS_FLAGS - flags_of_commands() == set()


def flags_of_commands():
    flags = {"dry_run"}  # of the steps of `tidy`, whose flags are their functions' arguments
    for command in COMMANDS.values():
        parser = argparse.ArgumentParser()
        command.add_flags(parser)
        flags |= {word.lstrip("-") for action in parser._actions for word in action.option_strings}
    return flags


def test_the_guide_covers_every_setting_of_the_old_one():
    """The settings of EveryDream 2's page on advanced tweaking."""
    old = (
        *(
            "resolution",
            "logdir",
            "save_ckpt_dir",
            "cond_dropout",
            "lr",
            "clip_skip",
            "lr_scheduler",
            "lr_warmup_steps",
        ),
        *("lr_decay_steps", "grad_accum", "gradient_checkpointing", "flip_p", "seed", "shuffle_tags", "log_step"),
        *("scale_lr", "write_schedule", "clip_grad_norm", "batch_size"),
    )
    guide = (DOCS / "tweaking.md").read_text(encoding="utf-8")
    assert [name for name in old if not re.search(rf"(--|`){name}\b", guide)] == []
    assert set(old) <= set(TrainConfig.model_fields)


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_the_readme_has_a_python_example():
    assert python_blocks(REPOSITORY / "README.md")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_in_the_pages_uses_public_names(page):
    public = {*everydream_kit.__all__, "__version__"}
    for block in python_blocks(page):
        used = {
            node.attr
            for node in ast.walk(ast.parse(block))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "edk"
        }
        assert used <= public


def test_settings_in_the_readmes_python_are_accepted():
    (call,) = re.findall(r"edk\.TrainConfig\(.*?\)", README, re.DOTALL)
    config = eval(call, {"edk": everydream_kit})
    assert config.resume_ckpt == "embedded"


@pytest.mark.parametrize("word", sorted(COMMANDS))
def test_help_answers(word, capsys):
    with pytest.raises(SystemExit) as ended:
        main([word, "--help"])
    assert ended.value.code == 0
    assert f"usage: everydream {word}" in capsys.readouterr().out


def test_help_answers_in_a_process_of_its_own():
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-m", "everydream_kit", "--help"], capture_output=True, text=True, check=False, env=environ
    )
    assert done.returncode == 0, done.stderr
    assert "usage: everydream" in done.stdout


def test_the_image_has_no_password_built_in_and_refuses_to_start_without_one(tmp_path):
    dockerfile = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    assert not re.search(r"^(ENV|ARG).*(PASSWORD|TOKEN)", dockerfile, re.MULTILINE)
    environ = {name: value for name, value in os.environ.items() if name != "JUPYTER_PASSWORD"}
    script = REPOSITORY / "scripts" / "start_pod.sh"
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == 1
    assert "Set JUPYTER_PASSWORD" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("password", ["x", " ", "        ", "1234567", " 1234567 ", "\n"])
def test_a_password_that_is_guessed_in_no_time_is_refused(tmp_path, password):
    environ = {**os.environ, "JUPYTER_PASSWORD": password, "EDK_WORKSPACE": str(tmp_path / "workspace")}
    script = REPOSITORY / "scripts" / "start_pod.sh"
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == 1
    assert "shorter than eight characters" in done.stderr
    assert not (tmp_path / "workspace").exists()


def test_what_the_image_copies_exists():
    dockerfile = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE) for word in line.split()]
    assert copied
    assert [word for word in copied if not (REPOSITORY / word).exists()] == []


def security_rows():
    page = (DOCS / "security.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return [row for row in rows[1:] if len(row) >= 4]


def test_the_table_of_inputs_and_the_tests_follow_each_other():
    """Every row but that of a person's own word names tests, and every file of hostile inputs has a row."""
    named = set()
    for name, *_, last in security_rows():
        tests = re.findall(r"`(tests/[\w/.]+)`", last)
        assert tests or name.startswith("flags"), f"{name}: no test"
        named |= set(tests)
    assert [path for path in sorted(named) if not (REPOSITORY / path).is_file()] == []
    hostile = {name_of(path) for path in (REPOSITORY / "tests").rglob("test_*.py") if "hostile" in path.name}
    assert hostile <= named


def test_every_setting_is_sorted_by_whether_it_may_come_from_elsewhere():
    from everydream_kit.config import TrainConfig
    from everydream_kit.foreign import ASKED, DECIDED_HERE, FOLLOWS, TRAVELS

    assert TRAVELS | ASKED.keys() | DECIDED_HERE == set(TrainConfig.model_fields)
    assert not TRAVELS & ASKED.keys()
    assert FOLLOWS.keys() <= TRAVELS
