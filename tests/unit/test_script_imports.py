"""Scripts, benchmarks and recipes import names that exist: they run by hand, and seldom."""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = sorted(
    path for folder in ("scripts", "benchmarks", "recipes") for path in (REPOSITORY / folder).rglob("*.py")
)


def imported_names(path: Path) -> list[tuple[str, str]]:
    """(module, name) of each `from module import name`, at any depth of the file."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
    return [(node.module, alias.name) for node in nodes if node.module for alias in node.names]


def test_the_scripts_are_found():
    assert {path.parent.name for path in SCRIPTS} >= {"scripts", "benchmarks", "recipes", "embedded_base"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_what_a_script_imports_from_the_repository_is_there(path, monkeypatch):
    folder = path.parent.parent if (path.parent / "__init__.py").is_file() else path.parent
    monkeypatch.syspath_prepend(folder)
    own = {"everydream_kit", *(entry.stem for entry in folder.iterdir())}
    missing = []
    for module, name in imported_names(path):
        if module.partition(".")[0] in own:
            found = hasattr(importlib.import_module(module), name) or importlib.util.find_spec(f"{module}.{name}")
            missing += [] if found else [f"{name} of {module}"]
    assert not missing
