"""`.ci/run` with stand-ins for what it calls: all parts run whatever fails, and pytest's report comes last."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SETUP = """
case "$*" in
    "test --version")
        [ -n "${NO_ENVIRONMENT:-}" ] && exit 1
        mkdir -p "$EDK_VENV/bin" && ln -s "$PYTHON" "$EDK_VENV/bin/python" && touch "$EDK_VENV/.everydream-kit.json" ;;
    "check --no-tests") echo "all checks"; exit "$CHECKS" ;;
    test) echo "3 passed"; exit "$TESTS" ;;
    *) echo "unknown: $*"; exit 9 ;;
esac
"""
HOST = "import os, sys\nprint('the replica of', *sys.argv[1:])\nsys.exit(int(os.environ['HOST']))\n"


@pytest.fixture
def ci(tmp_path):
    """Runs it with these statuses of its parts; gives its own and what it printed."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / "scripts").mkdir()
    shutil.copy(REPOSITORY / ".ci" / "run", tmp_path / ".ci")
    (tmp_path / "colab_setup.sh").write_text(SETUP, encoding="utf-8")
    (tmp_path / "scripts" / "check_host.py").write_text(HOST, encoding="utf-8")

    def run(**statuses):
        environ = {**os.environ, "PYTHON": sys.executable, "CHECKS": "0", "TESTS": "0", "HOST": "0", **statuses}
        done = subprocess.run(
            ["bash", tmp_path / ".ci" / "run"], env=environ, capture_output=True, text=True, check=False, timeout=60
        )
        return done.returncode, done.stdout.splitlines(), done.stderr

    return run


@pytest.mark.parametrize(
    ("statuses", "said"),
    [
        ({}, ""),
        ({"CHECKS": "1"}, "the checks failed"),
        ({"HOST": "1"}, "The replica of Colab failed"),
        ({"TESTS": "1"}, ""),
    ],
    ids=str,
)
def test_every_part_runs_and_each_failure_counts(ci, statuses, said):
    status, shown, errors = ci(**statuses)
    assert (status == 0) is (statuses == {})
    assert [line.split()[-1] for line in shown] == ["checks", "--quick", "passed"]
    assert said in errors


def test_without_an_environment_nothing_else_is_tried(ci):
    status, shown, errors = ci(NO_ENVIRONMENT="1")
    assert (status, shown) == (1, [])
    assert "could not be set up" in errors
