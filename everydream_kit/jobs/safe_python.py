"""Starting a Python module as a process that imports nothing from its working folder.

`python -m module` looks for modules in the working folder first. That may be an unpacked dataset, whose `yaml.py` would
run. Python 3.11 has `-P` against it; for 3.10 the folder is taken off the path by hand.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

_BY_HAND = (
    "import sys; sys.path.pop(0); import runpy; "
    "module = sys.argv.pop(1); sys.argv[0] = module; runpy.run_module(module, run_name='__main__', alter_sys=True)"
)
"""`-c` puts the working folder first, and what is built in is all that is imported before it is gone."""


def module_command(module: str, arguments: Sequence[str], version: tuple[int, int] = sys.version_info[:2]) -> list[str]:
    """The command that runs a module with arguments, without the working folder on the module path."""
    if version >= (3, 11):
        return [sys.executable, "-P", "-m", module, *arguments]
    return [sys.executable, "-c", _BY_HAND, module, *arguments]


def safe_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables under which children of a child are safe too; empty entries of PYTHONPATH mean the working folder."""
    safe = {**environment, "PYTHONSAFEPATH": "1"}
    separator = ";" if os.name == "nt" else ":"  # a drive's colon does not end an entry
    if "PYTHONPATH" in safe:
        safe["PYTHONPATH"] = separator.join(entry for entry in safe["PYTHONPATH"].split(separator) if entry)
    return safe
