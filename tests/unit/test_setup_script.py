"""The set-up script, against Pythons that only pretend: what it asks pip for, what it leaves alone, how it stops.

The pretended Python answers the script's short programs from a JSON file and writes down every call of pip. That
the real pip does what it is asked is shown by the CI, whose first act is the real script in a clean environment.
"""

import importlib.util
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "colab_setup.sh"

spec = importlib.util.spec_from_file_location("set_up", REPOSITORY / "scripts" / "set_up.py")
set_up = importlib.util.module_from_spec(spec)
sys.modules["set_up"] = set_up  # dataclasses look their module up
spec.loader.exec_module(set_up)

PRETENDER = """#!{python}
import json, pathlib, sys
place = pathlib.Path({place!r})
state = json.loads(place.read_text())
words = sys.argv[1:]
if words[:3] == ["-m", "pip", "install"]:
    constraints = pathlib.Path(words[words.index("--constraint") + 1]).read_text() if "--constraint" in words else ""
    state["pip"].append({{"words": words[3:], "constraints": constraints.split()}})
    place_of = dict(word.split("==") for word in words if word.startswith("torch=="))
    failing = [name for name in state["failing"] if any(name in word for word in words)]
    if place_of and not failing:
        state["torch"] = place_of["torch"] + "+cpu"
        state["versions"]["torch"] = state["torch"]
    if state["sneaks_in"] and not failing:
        state["torch"] = state["sneaks_in"]
    if "--editable" in words and not failing:
        state["kit"] = state["repository"] + "/everydream_kit/__init__.py"
    place.write_text(json.dumps(state))
    print("line 1 of many\\n" * 40 + "ERROR: No matching distribution found for " + ", ".join(failing))
    sys.exit(bool(failing))
if words[:2] == ["-m", "compileall"]:
    place.write_text(json.dumps({{**state, "compiled": [*state["compiled"], words[-1]]}}))
    sys.exit(0)
program = words[1]
if "json.dumps({{\\n    \\"prefix\\"" in program:
    modules = ["torch"] if state["torch"] else []
    modules += ["diffusers", "transformers", "accelerate"] if state["kit"] else []
    print("a greeting of the host")
    print(json.dumps({{**state, "modules": modules}}))
elif "metadata" in program:
    print(json.dumps(state["versions"]))
elif "import json, torch" in program:
    if state["broken"]:
        sys.exit("ImportError: libcudart.so: cannot open shared object file")
    print(json.dumps(state["torch"]))
elif "find_spec('torch')" in program:
    sys.exit(state["torch"] is None)
"""


class Pretended:
    """A Python that is not one. `state` is what it says of itself; `pip` what was asked of it."""

    def __init__(self, folder):
        self.place = folder / "state.json"
        self.prefix = folder / "prefix"
        self.prefix.mkdir()
        self.python = folder / "python3"
        self.python.write_text(PRETENDER.format(python=sys.executable, place=str(self.place)))
        self.python.chmod(self.python.stat().st_mode | stat.S_IEXEC)
        self.set(
            **{
                "prefix": str(self.prefix),
                "owned": False,
                "managed": False,
                "kit": None,
                "repository": str(REPOSITORY),
            },
            **{
                "torch": None,
                "broken": False,
                "versions": {},
                "failing": [],
                "sneaks_in": None,
                "pip": [],
                "compiled": [],
            },
        )

    def set(self, **changes):
        state = json.loads(self.place.read_text()) if self.place.exists() else {}
        self.place.write_text(json.dumps({**state, **changes}))

    @property
    def pip(self):
        return json.loads(self.place.read_text())["pip"]

    def target(self, host="colab"):
        return set_up.Target(str(self.python), None, host)


COLAB = {
    "torch": "2.11.0+cu128",
    "versions": {"torch": "2.11.0+cu128", "numpy": "2.1.3", "ipywidgets": "7.7.1", "pillow": "11.3.0"},
}


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PIP_BREAK_SYSTEM_PACKAGES", raising=False)
    monkeypatch.setattr(set_up, "is_reachable", lambda address: False)
    monkeypatch.setattr(set_up, "has_nvidia", lambda: False)
    return Pretended(tmp_path)


def asked_for_torch(call):
    return any(word.startswith("torch") for word in call["words"])


def test_a_hosts_torch_numpy_and_widgets_are_pinned_to_what_is_there(pretended):
    pretended.set(**COLAB)
    set_up.set_up(pretended.target(), [])
    (call,) = pretended.pip
    assert call["constraints"] == ["torch==2.11.0+cu128", "numpy==2.1.3", "ipywidgets==7.7.1"]
    assert not asked_for_torch(call)
    assert call["words"][-1] == str(REPOSITORY)


def test_a_package_older_than_the_kit_needs_is_not_pinned(pretended):
    pretended.set(torch="2.8.0", versions={"torch": "2.8.0", "numpy": "1.26.4"})
    set_up.set_up(pretended.target("runpod"), [])
    assert pretended.pip[0]["constraints"] == ["torch==2.8.0"]


def test_without_torch_the_pinned_one_comes_first(pretended):
    set_up.set_up(pretended.target("runpod"), [])
    first, second = pretended.pip
    assert first["words"] == ["torch==2.13.0"]
    assert second["constraints"] == ["torch==2.13.0+cpu"]


@pytest.mark.parametrize(
    ("build", "reachable", "calls"), [("", True, 1), ("", False, 0), ("cuda", True, 0), ("cpu", True, 1)]
)
def test_the_small_build_is_taken_where_there_is_no_gpu_and_it_can_be_had(
    pretended, monkeypatch, build, reachable, calls
):
    monkeypatch.setenv("EDK_TORCH", build)
    monkeypatch.setattr(set_up, "is_reachable", lambda address: reachable)
    monkeypatch.setattr(set_up.platform, "system", lambda: "Linux")
    set_up.set_up(pretended.target("runpod"), [])
    assert sum(set_up.TORCH_CPU_INDEX in call["words"] for call in pretended.pip) == calls


def test_a_second_call_asks_pip_for_nothing(pretended):
    pretended.set(**COLAB)
    set_up.set_up(pretended.target(), ["test"])
    before = len(pretended.pip)
    set_up.set_up(pretended.target(), ["test"])
    set_up.set_up(pretended.target(), [])  # less than what is there
    assert len(pretended.pip) == before


def test_the_kit_is_compiled_once_where_python_is_reported_not_to(pretended, tmp_path, monkeypatch):
    pretended.set(**COLAB)
    for _ in range(2):
        set_up.set_up(pretended.target(), [])
    assert json.loads(pretended.place.read_text())["compiled"] == [str(REPOSITORY / "everydream_kit")]
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "one.py").write_text("x = 1")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    set_up.compile_bytecode(sys.executable, tmp_path / "package")
    assert list((tmp_path / "package").rglob("one.*.pyc"))


def test_another_extra_or_another_state_of_the_requirements_sets_up_again(pretended, monkeypatch):
    pretended.set(**COLAB)
    set_up.set_up(pretended.target(), [])
    set_up.set_up(pretended.target(), ["test"])
    assert pretended.pip[-1]["words"][-1] == f"{REPOSITORY}[test]"
    before = len(pretended.pip)
    monkeypatch.setattr(set_up, "fingerprint", lambda: "other requirements")
    set_up.set_up(pretended.target(), [])
    assert len(pretended.pip) > before


def test_a_package_that_was_removed_since_is_noticed(pretended):
    pretended.set(**COLAB)
    set_up.set_up(pretended.target(), [])
    before = len(pretended.pip)
    pretended.set(kit=None)
    set_up.set_up(pretended.target(), [])
    assert len(pretended.pip) > before


def test_a_kit_of_another_copy_of_the_repository_is_replaced_by_this_one(pretended):
    pretended.set(**COLAB)
    set_up.set_up(pretended.target(), [])
    before = len(pretended.pip)
    pretended.set(kit="/elsewhere/everydream_kit/__init__.py")
    set_up.set_up(pretended.target(), [])
    assert len(pretended.pip) > before


def test_a_torch_that_pip_does_not_know_is_worked_around(pretended):
    pretended.set(torch="2.9.0a0+vendor", versions={})
    set_up.set_up(pretended.target("runpod"), [])
    assert pretended.pip
    assert not any(map(asked_for_torch, pretended.pip))
    needing_torch = [call["words"][-1] for call in pretended.pip if "--no-deps" in call["words"]]
    assert [set_up.requirement_name(word) for word in needing_torch[:-1]] == list(set_up.NEEDS_TORCH)


def test_a_missing_bitsandbytes_is_a_warning_with_the_substitute(pretended, capsys):
    pretended.set(**COLAB, failing=["bitsandbytes", str(REPOSITORY) + "["])
    set_up.set_up(pretended.target(), ["test"])
    output = capsys.readouterr().out
    assert "bitsandbytes could not be installed" in output
    assert "use adamw" in output
    assert set_up.read_stamp(str(pretended.prefix)) == {"test"}


def test_a_failing_step_stops_with_its_name_and_the_last_lines(pretended):
    pretended.set(failing=["torch"])
    with pytest.raises(set_up.SetupError) as error:
        set_up.set_up(pretended.target("runpod"), [])
    message = str(error.value)
    assert message.startswith("Set-up stopped at this step: Installing torch 2.13.0")
    assert message.endswith("| ERROR: No matching distribution found for torch")
    assert message.count("line 1 of many") == set_up.SHOWN_LINES - 1
    assert set_up.read_stamp(str(pretended.prefix)) is None


def test_a_torch_that_was_replaced_all_the_same_is_an_error(pretended):
    pretended.set(**COLAB, sneaks_in="2.14.0")
    with pytest.raises(set_up.SetupError, match=r"torch was 2\.11\.0\+cu128 and is now 2\.14\.0"):
        set_up.set_up(pretended.target(), [])


def test_a_hosts_torch_that_is_too_old_is_not_replaced(pretended):
    pretended.set(torch="2.1.0", versions={"torch": "2.1.0"})
    with pytest.raises(set_up.SetupError, match=r"torch 2\.1\.0 is older than 2\.6"):
        set_up.set_up(pretended.target("vast"), [])
    assert pretended.pip == []


def test_a_hosts_torch_that_is_broken_is_not_replaced(pretended):
    pretended.set(**COLAB, broken=True)
    with pytest.raises(set_up.SetupError, match=r"(?s)cannot be imported.*libcudart"):
        set_up.set_up(pretended.target(), [])
    assert pretended.pip == []


def test_a_systems_own_python_is_left_alone_and_a_hosts_is_not(pretended):
    pretended.set(**COLAB, managed=True)
    with pytest.raises(set_up.SetupError, match="belongs to the operating system"):
        set_up.set_up(pretended.target("plain"), [])
    assert pretended.pip == []
    set_up.set_up(pretended.target("runpod"), [])
    assert os.environ.pop("PIP_BREAK_SYSTEM_PACKAGES") == "1"


@pytest.mark.parametrize(
    ("environ", "host", "kernel", "python", "venv"),
    [
        ({}, "plain", None, REPOSITORY / ".venv/bin/python", REPOSITORY / ".venv"),
        ({"EDK_VENV": "/tmp/v"}, "colab", "/usr/bin/python3", Path("/tmp/v/bin/python"), Path("/tmp/v")),
        ({}, "colab", "/usr/bin/python3", Path("/usr/bin/python3"), None),
        ({}, "plain", "/opt/lab/bin/python", Path("/opt/lab/bin/python"), None),
        ({"EDK_PYTHON": "/opt/p"}, "runpod", None, Path("/base/python"), None),
    ],
)
def test_the_kit_goes_where_the_notebook_will_look_for_it(environ, host, kernel, python, venv):
    target = set_up.choose_target(environ, host, kernel, base="/base/python")
    assert (Path(target.python), target.venv) == (python, venv)


def test_a_host_installs_into_the_python_that_has_torch(pretended, monkeypatch):
    monkeypatch.setattr(set_up.shutil, "which", lambda name: str(pretended.python) if name == "python3.11" else None)
    pretended.set(torch="2.11.0")
    assert set_up.choose_target({}, "vast", None, base="/bin/false").python == str(pretended.python)
    pretended.set(torch=None)
    assert set_up.choose_target({}, "vast", None, base="/bin/false").python == "/bin/false"


def test_a_python_that_cannot_make_environments_names_the_missing_package(tmp_path, monkeypatch):
    monkeypatch.setattr(set_up, "can_use_apt", lambda: False)
    with pytest.raises(set_up.SetupError, match=r"ensurepip module is missing(?s:.*)apt-get install python3\.\d+-venv"):
        set_up.make_venv(tmp_path / "venv", base="/bin/false")


def test_a_folder_that_is_no_environment_is_not_cleared(tmp_path):
    (tmp_path / "my-images").mkdir()
    (tmp_path / "my-images" / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(set_up.SetupError, match="is not a virtual environment"):
        set_up.make_venv(tmp_path / "my-images")
    assert (tmp_path / "my-images" / "holiday.jpg").exists()


def test_every_extra_and_lower_bound_is_read_from_setup_cfg():
    assert "pytest>=8" in set_up.requirements(["test"])
    assert not [line for line in set_up.requirements(["notebook", "test"]) if "#" in line]
    assert set_up.lower_bounds()["torch"] == "2.6"
    assert set(set_up.NEEDS_TORCH) <= set(set_up.lower_bounds())


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.11.0+cu128", (2, 11, 0)), ("2.9.0a0+git1", (2, 9, 0)), ("7.7.1", (7, 7, 1)), ("8", (8,))],
)
def test_versions_are_compared_as_numbers(version, numbers):
    assert set_up.as_numbers(version) == numbers


@pytest.mark.parametrize("command", ["test", "check"])
def test_tests_and_checks_keep_what_python_compiles(pretended, monkeypatch, command):
    pretended.set(**COLAB)
    for name in ("PYTHONDONTWRITEBYTECODE", "OMP_NUM_THREADS", "EDK_PYTHON"):  # what it changes comes back
        monkeypatch.setenv(name, "1")
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(set_up, "choose_target", lambda *_: pretended.target())
    monkeypatch.setattr(set_up, "install_browser", lambda: None)
    started = []
    monkeypatch.setattr(set_up.os, "execvp", lambda *_: started.append(set(os.environ)))
    set_up.main([command])
    assert [("PYTHONDONTWRITEBYTECODE" in names, "EDK_PYTHON" in names) for names in started] == [(False, True)]


def test_the_test_command_runs_what_the_ci_runs():
    words = set_up.command_line(set_up.Target("python", None, "plain"), "test", ["-k", "doctor"])
    assert words[:3] == ["python", "-m", "pytest"]
    assert "not slow and not full_size" in words
    assert words[-2:] == ["-k", "doctor"]


def run_script(path, *words, **environ):
    """The real bash on the real script, with a PATH of our own."""
    return subprocess.run(
        [shutil.which("bash"), str(SCRIPT), *words],
        env={"PATH": str(path), "HOME": str(path), **environ},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def bare_path(tmp_path):
    """A machine with next to nothing: the one tool that the script calls, and no Python."""
    (tmp_path / "dirname").symlink_to(shutil.which("dirname"))
    return tmp_path


def add_python(path, name, version):
    """A `python` that says which version it is, and which name it was started by."""
    (path / name).write_text(
        "#!/bin/sh\n"
        f'case "$1" in --version) echo "Python {version[0]}.{version[1]}";;\n'
        f"-c) exec {sys.executable} -c 'import sys; sys.version_info = {version}; exec(sys.argv[1])' \"$2\";;\n"
        f'*) echo started {name} "$@";;\nesac\n'
    )
    (path / name).chmod(0o755)


def test_without_any_python_the_script_says_what_it_needs(bare_path):
    done = run_script(bare_path)
    assert done.returncode == 1
    assert "needs a 64-bit Python 3.10, 3.11, 3.12 or 3.13" in done.stderr
    assert "apt-get install" in done.stderr


def test_a_python_that_is_too_old_is_named_and_not_used(bare_path):
    add_python(bare_path, "python3", (3, 8))
    done = run_script(bare_path)
    assert done.returncode == 1
    assert "python3 is Python 3.8" in done.stderr


def test_a_newer_python_under_its_full_name_is_found(bare_path):
    add_python(bare_path, "python3", (3, 8))
    add_python(bare_path, "python3.12", (3, 12))
    done = run_script(bare_path, "demo", "more")
    assert done.returncode == 0
    assert done.stdout.split() == ["started", "python3.12", str(REPOSITORY / "scripts/set_up.py"), "demo", "more"]


def test_the_first_python_wins_where_it_fits(bare_path):
    add_python(bare_path, "python3", (3, 10))
    add_python(bare_path, "python3.12", (3, 12))
    assert run_script(bare_path).stdout.split()[1] == "python3"


def test_a_python_that_was_named_and_does_not_fit_is_an_error(bare_path):
    add_python(bare_path, "python3", (3, 12))
    done = run_script(bare_path, EDK_PYTHON="/bin/true")
    assert done.returncode == 1
    assert "EDK_PYTHON=/bin/true" in done.stderr


def test_an_unknown_word_changes_nothing_and_names_the_known_ones(bare_path):
    (bare_path / "python3").symlink_to(sys.executable)
    done = run_script(bare_path, "demonstrate", EDK_VENV=str(bare_path / "venv"))
    assert done.returncode == 2
    assert "[demo|test|check]" in done.stderr
    assert not (bare_path / "venv").exists()


@pytest.mark.parametrize(("num_cores", "expected"), [(1, None), (2, "3"), (64, "4")])
def test_files_of_tests_run_side_by_side_where_there_are_cores_for_it(monkeypatch, num_cores, expected):
    monkeypatch.setattr(set_up.os, "cpu_count", lambda: num_cores)
    words = set_up.command_line(set_up.Target("python", None, "plain"), "test", [])
    assert (words[words.index("-n") + 1] if "-n" in words else None) == expected
