"""What is given to the kit's public functions for a path or a text: a wrong type is one clear error, for all of them.

`everydream_kit.NAME` hands the functions out with this check; within the kit they are called without it.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

from everydream_kit.errors import ConfigError

PLACES = {"str", "Path", "Checkpoint"}
"""Words of an annotation that asks for a path or a text."""
OTHERS = {"int", "float", "bool", "Any"}
"""Words of one that takes numbers as well, or anything."""
SEVERAL = {"Sequence", "Iterable", "list", "tuple"}


@functools.cache
def with_checked_places(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which refuses numbers, bytes, lists and None where its annotations ask for a path or a text.

    Raises:
        ConfigError: from the function; the message names the argument and what it takes.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*arguments: Any, **named: Any) -> Any:
        for name, value in signature.bind_partial(*arguments, **named).arguments.items():
            annotation = str(signature.parameters[name].annotation)
            if _is_wrong(value, set(re.findall(r"\w+", re.sub(r"(dict|Mapping)\[.*?\]", "", annotation)))):
                raise ConfigError(f"{name}: takes {annotation} (got {value!r}, which is {type(value).__name__})")
        return function(*arguments, **named)

    return checked


def _is_wrong(value: Any, words: set[str]) -> bool:
    if not words & PLACES or words & OTHERS:
        return False
    if value is None:
        return "None" not in words
    return isinstance(value, int | float | bytes) or (isinstance(value, list | tuple) and not words & SEVERAL)
