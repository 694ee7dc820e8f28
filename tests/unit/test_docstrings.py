"""What is public says what it means, and names its arguments as they are."""

import ast
import re
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "everydream_kit"
MODULES = sorted([*PACKAGE.rglob("*.py"), *REPOSITORY.glob("scripts/*.py"), *REPOSITORY.glob("benchmarks/*.py")])
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def name_of(path):
    return str(path.relative_to(REPOSITORY))


@cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def public_nodes(tree):
    """(dotted name, node) of public classes, functions and methods; what is inside functions is private."""

    def walk(node, prefix):
        for child in node.body:
            if isinstance(child, (ast.ClassDef, *FUNCTIONS)) and not child.name.startswith("_"):
                yield f"{prefix}{child.name}", child
                if isinstance(child, ast.ClassDef):
                    yield from walk(child, f"{prefix}{child.name}.")

    return walk(tree, "")


OBVIOUS_LINES = 10
"""A method or a test of this length says in its name and its class what it does."""


def is_obvious(name, node):
    """Short methods, and those that answer a protocol's call (a listener's `on_…`), are explained by their class."""
    if isinstance(node, ast.ClassDef):
        return False
    lines = node.end_lineno - node.lineno + 1
    is_method = "." in name
    return lines <= 3 or (is_method and (lines <= OBVIOUS_LINES or node.name.startswith("on_")))


def test_every_module_opens_with_what_it_is():
    assert MODULES
    assert not [name_of(path) for path in MODULES if not ast.get_docstring(tree_of(path))]


def test_everything_public_has_a_docstring():
    silent = [
        f"{name_of(path)}:{node.lineno} {name}"
        for path in MODULES
        if path.parent.name != "benchmarks"
        for name, node in public_nodes(tree_of(path))
        if not ast.get_docstring(node) and not is_obvious(name, node)
    ]
    assert not silent


def documented_arguments(docstring):
    """Names in the Args section: `a, b: text` names two; continuation lines are indented further."""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", docstring + "\n", re.MULTILINE)
    if not section:
        return []
    names = []
    for line in section.group(1).splitlines():
        entry = re.match(r"    (\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \([^)]*\))?:(?:\s|$)", line)
        if entry:
            names += [name.lstrip("*") for name in entry.group(1).split(", ")]
    return names


def argument_names(node):
    arguments = node.args
    listed = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return {argument.arg for argument in listed if argument is not None}


def test_documented_arguments_exist():
    functions = [(path, node) for path in MODULES for node in ast.walk(tree_of(path)) if isinstance(node, FUNCTIONS)]
    wrong = [
        f"{name_of(path)}:{node.lineno} {node.name}: {name}"
        for path, node in functions
        for name in sorted(set(documented_arguments(ast.get_docstring(node) or "")) - argument_names(node))
    ]
    assert not wrong


def test_the_reader_of_argument_sections_understands_ours():
    docstring = (
        "One.\n\nArgs:\n    width, height: pixels.\n        More: still.\n    *names: x.\n\nRaises:\n    A: b.\n"
    )
    assert documented_arguments(docstring) == ["width", "height", "names"]


def entries_within_others(node):
    """Names of arguments or fields whose entry does not begin a line, but follows another one's text."""
    section = re.search(r"^(?:Args|Attributes):\n((?:    .*\n?|\n)+)", ast.get_docstring(node) or "", re.MULTILINE)
    if section is None:
        return []
    names = (
        argument_names(node) if isinstance(node, FUNCTIONS) else {getattr(one, "id", "") for one in targets_of(node)}
    )
    return sorted(names & set(re.findall(r"[.;]\s+(\w+): ", section[1])) - set(re.findall(ENTRY, section[1])))


ENTRY = re.compile(r"^ {4}(?:\w+, )*(\w+)(?:, \w+)*: ", re.MULTILINE)


def targets_of(node):
    return [one.target for one in node.body if isinstance(one, ast.AnnAssign)]


def test_each_argument_of_a_docstring_has_a_line_of_its_own():
    nodes = [(path, node) for path in MODULES for node in ast.walk(tree_of(path))]
    together = [
        f"{name_of(path)}:{node.lineno} {node.name}: {name}"
        for path, node in nodes
        if isinstance(node, (ast.ClassDef, *FUNCTIONS))
        for name in entries_within_others(node)
    ]
    assert not together
