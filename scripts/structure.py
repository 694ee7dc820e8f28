#!/usr/bin/env python3
"""The shape of the package in figures, read from its syntax trees: `python scripts/structure.py [FOLDER]`.

It prints the packages with their lines, the longest functions and largest classes, import circles, imports that point up the
list of rooms, file names that stand twice, where settings are declared, and which modules know file names of a run folder.
FOLDER is a checkout, by default this one, so a version can be compared with another.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGE = "everydream_kit"
LONG_FUNCTION = 60
RUN_FILES = {
    *("events.jsonl", "status.json", "control.json", "live.json", "job.json", "environment.json", "train.log"),
    *("plan.json", "state.json", "resume/manifest.json", "manifest.json", "undersized_images.txt", "ckpts"),
    *("adapter.json", "pytorch_lora_weights.safetensors", "learned_embeds.safetensors"),
}
"""Names that are of run folders and checkpoints alone: as a text of their own they count wherever they stand."""
SHARED_NAMES = {"config.json", "samples", "resume", "losses", "best"}
"""Names that other things have as well: they count where a path is joined with them."""
WITH_OTHER_CONFIGS = ("models", "preflight")
"""Rooms whose `config.json` is a model component's."""


@dataclass
class Module:
    """One file of the package."""

    path: Path
    root: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=str(self.path))

    @property
    def name(self) -> str:
        """Dotted, from the package on: `training.run`, or `cli` for its `__init__`."""
        parts = self.path.relative_to(self.root / PACKAGE).with_suffix("").parts
        return ".".join(part for part in parts if part != "__init__") or PACKAGE

    @property
    def room(self) -> str:
        return self.name.split(".")[0]

    @cached_property
    def code_lines(self) -> int:
        """Lines that hold code: no blank ones, comments or docstrings."""
        skipped = {
            tokenize.COMMENT,
            tokenize.NL,
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.DEDENT,
            tokenize.ENDMARKER,
        }
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        lines = {n for one in tokens if one.type not in skipped for n in range(one.start[0], one.end[0] + 1)}
        said = [node for node in ast.walk(self.tree) if isinstance(node, ast.Expr)]
        texts = [one for one in said if isinstance(one.value, ast.Constant) and isinstance(one.value.value, str)]
        return len(lines - {n for one in texts for n in range(one.lineno, (one.end_lineno or one.lineno) + 1)})

    def imports(self) -> Iterator[tuple[str, ...]]:
        """Of each import in the package, at the top, in functions or for types alone, the names that it may mean.

        `from a import b` means the module a.b where there is one, else the module a.
        """
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found: list[tuple[str, ...]] = [(alias.name,) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found = [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
            else:
                continue
            yield from (tuple(n.removeprefix(f"{PACKAGE}.") for n in names) for names in found if PACKAGE in names[0])


def read_modules(root: Path) -> list[Module]:
    return [Module(path, root) for path in sorted((root / PACKAGE).rglob("*.py"))]


def import_graph(modules: list[Module]) -> dict[str, set[str]]:
    """Which module imports which. The package's door, which names public things and loads them late, counts as a leaf."""
    names = {module.name for module in modules}
    graph: dict[str, set[str]] = {name: set() for name in names}
    for module in modules:
        if module.name != PACKAGE:
            meant = (next((name for name in one if name in names), module.name) for one in module.imports())
            graph[module.name] = set(meant) - {module.name}
    return graph


def find_circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach one another (strongly connected components of more than one), largest first."""
    reached = {name: _reach(graph, name) for name in graph}
    circles = {
        tuple(sorted({name} | {other for other in reached[name] if name in reached[other]}))
        for name in graph
        if name in reached[name]
    }
    return sorted((list(circle) for circle in circles), key=len, reverse=True)


def _reach(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += graph[name]
    return seen


def rooms_in_order(root: Path) -> list[str]:
    """The rooms from top to bottom, as the table of `docs/architecture.md` lists them."""
    lines = (root / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines()
    header = next(number for number, line in enumerate(lines) if line.endswith("| holds |"))
    rooms = []
    for row in lines[header + 2 :]:
        if not row.startswith("|"):
            break
        rooms += [name.strip("` /") for name in row.split("|")[1].split(",")]
    return rooms


def upward_imports(modules: list[Module], rooms: list[str]) -> list[str]:
    """Imports of a room that stands below the importer's, but for the package's door and its command."""
    place = {name: number for number, name in enumerate(rooms)}
    last = len(rooms)
    found = []
    for module in modules:
        if module.name in (PACKAGE, "__main__"):
            continue
        own = last if module.name.startswith("demo.main") else place.get(module.room, last)
        for name, *_ in module.imports():
            other = name.split(".")[0]
            if other != module.room and place.get(other, -1) > own:
                found.append(f"{module.name} imports {name}")
    return sorted(set(found))


def functions(modules: list[Module]) -> list[tuple[int, str]]:
    """(lines without the docstring, where) of every function, longest first."""
    found = []
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1 - len((ast.get_docstring(node) or "").splitlines())
                found.append((lines, f"{module.name}:{node.lineno} {node.name}"))
    return sorted(found, reverse=True)


def classes(modules: list[Module]) -> list[tuple[int, int, str]]:
    """(fields, methods, where) of every class, largest first. Fields are annotated names and `self.x = ...` in `__init__`."""
    found = []
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                methods = [one for one in node.body if isinstance(one, ast.FunctionDef)]
                fields = {ast.unparse(one.target) for one in node.body if isinstance(one, ast.AnnAssign)}
                fields |= {name for method in methods if method.name == "__init__" for name in _set_in(method)}
                found.append((len(fields), len(methods), f"{module.name}:{node.lineno} {node.name}"))
    return sorted(found, key=lambda entry: (-entry[0] - entry[1], entry[2]))


def _set_in(method: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def declarations_of_settings(modules: list[Module]) -> dict[str, list[str]]:
    """Modules with pydantic models that have fields, but for what is data from elsewhere: a dialect of settings each."""
    bases = {"BaseModel"}
    found: dict[str, list[str]] = defaultdict(list)
    models = [(m, n) for m in modules for n in ast.walk(m.tree) if isinstance(n, ast.ClassDef)]
    while new := {n.name for _, n in models if n.name not in bases and bases & {ast.unparse(b) for b in n.bases}}:
        bases |= new
    for module, node in models:
        fields = [one for one in node.body if isinstance(one, ast.AnnAssign)]
        if node.name in bases and fields:
            found[module.name].append(node.name)
    return dict(found)


def readers_of_run_folders(modules: list[Module]) -> dict[str, list[str]]:
    """Modules that know file names of a run folder or a checkpoint, or find a run by `parent.parent`; and which."""
    found: dict[str, set[str]] = defaultdict(set)
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Constant) and node.value in RUN_FILES:
                found[module.name].add(str(node.value))
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("endswith", "with_name")):
                if "_ema" in ast.unparse(node):
                    found[module.name].add("_ema")
            elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
                name = node.right.value if isinstance(node.right, ast.Constant) else None
                if name in SHARED_NAMES and not (name == "config.json" and module.room in WITH_OTHER_CONFIGS):
                    found[module.name].add(str(name))
            elif isinstance(node, ast.Attribute) and ast.unparse(node).endswith("parent.parent"):
                found[module.name].add("parent.parent")
    return {name: sorted(names) for name, names in sorted(found.items())}


def names_used_twice(modules: list[Module]) -> dict[str, list[str]]:
    """File names that several modules have, but for `__init__` and `__main__`."""
    by_name: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        if not module.path.stem.startswith("__"):
            by_name[module.path.stem].append(module.name)
    return {name: found for name, found in sorted(by_name.items()) if len(found) > 1}


def main() -> None:
    """Print everything."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
    modules = read_modules(root)
    by_room: dict[str, list[Module]] = defaultdict(list)
    for module in modules:
        by_room[module.room].append(module)
    print("Packages: files, lines, lines of code, longest file")
    for room, members in sorted(by_room.items()):
        lengths = [(len(module.text.splitlines()), module.name) for module in members]
        total, code = sum(length for length, _ in lengths), sum(module.code_lines for module in members)
        print(f"  {room:20} {len(members):4} {total:6} {code:6}   {max(lengths)[1]} {max(lengths)[0]}")
    total, code = sum(len(one.text.splitlines()) for one in modules), sum(one.code_lines for one in modules)
    print(f"  {'all':20} {len(modules):4} {total:6} {code:6}")

    long = functions(modules)
    print(f"Functions of more than {LONG_FUNCTION} lines: {sum(lines > LONG_FUNCTION for lines, _ in long)}")
    print("\n".join(f"  {lines:4} {where}" for lines, where in long[:10]))
    print("Largest classes: fields, methods")
    print("\n".join(f"  {fields:4} {methods:3} {where}" for fields, methods, where in classes(modules)[:8]))

    circles = find_circles(import_graph(modules))
    print(f"Import circles among {len(modules)} modules: {len(circles)}")
    print("".join(f"  {', '.join(circle)}\n" for circle in circles), end="")
    upward = upward_imports(modules, rooms_in_order(root))
    print(f"Imports that point up the list: {len(upward)}")
    print("".join(f"  {one}\n" for one in upward), end="")
    twice = names_used_twice(modules)
    print(f"File names that stand twice or more: {len(twice)}")
    print("".join(f"  {name}: {', '.join(found)}\n" for name, found in twice.items()), end="")
    settings = declarations_of_settings(modules)
    print(f"Modules that declare settings: {len(settings)}")
    print("".join(f"  {name}: {', '.join(found)}\n" for name, found in settings.items()), end="")
    readers = readers_of_run_folders(modules)
    print(f"Modules that know file names of a run folder: {len(readers)}")
    print("".join(f"  {name}: {', '.join(found)}\n" for name, found in readers.items()), end="")


if __name__ == "__main__":
    main()
