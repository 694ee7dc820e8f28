"""Tables of tests: where a test stands, and what its source says."""

from __future__ import annotations

import ast
from functools import lru_cache
from pathlib import Path

TESTS = Path(__file__).parents[1]


@lru_cache
def functions_of(file: str) -> dict[str, str]:
    """Source of each test function of a file, decorators and trailing comments included."""
    source = (TESTS / file).read_text("utf-8")
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def check_named_test(place: str, words: str) -> None:
    """Assert that `file::function`, or `file::function:words`, names a test whose source says the words."""
    file, name = place.split("::")
    function, _, other_words = name.partition(":")
    assert function in functions_of(file), f"{file} has no {function}"
    assert (other_words or words) in functions_of(file)[function], f"{function} does not speak of {words}"
