"""Who may import whom, who may print, and what no file here may hold: read from the syntax trees.

The list of rooms is the one in `docs/architecture.md`: a room imports itself and what stands above it.
"""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "everydream_kit"
MODULES = sorted(PACKAGE.rglob("*.py"))

ROOMS = [
    *(
        "errors",
        "public_arguments",
        "identity",
        "plain_text",
        "strict_json",
        "atomic",
        "disk_space",
        "locks",
        "draws",
        "config",
    ),
    *("runs", "foreign"),
    *(
        "everydream2",
        "settings",
        "params",
        "hosts",
        "optional_packages",
        "gpu_support",
        "notebook_files",
        "share_bar",
        "doctor",
    ),
    *(
        "transfers",
        "data",
        "models",
        "demo",
        "export",
        "training",
        "preflight",
        "start_folder",
        "sessions",
        "generation",
        "jobs",
        "demo.main",
        "actions",
        "panels",
        "cli",
    ),
]
APART = {("data", "models"), ("models", "data")}
TORCH_FREE = tuple(ROOMS[: ROOMS.index("doctor")])
TORCH_IN_PREFLIGHT = ("imitation.py", "rehearsal.py", "tracker.py")
"""They run the trainer's own step; whoever estimates imports them when it is asked to."""
TORCH_IN_DATA = ("batches.py", "captioning.py", "latent_encoding.py", "latents.py", "loader.py", "text_cache.py")
SLOW = ("diffusers", "transformers", "peft", "bitsandbytes", "accelerate", "pytorch_optimizer", "tensorboard", "torch")
"""Importing these takes from a half to several seconds; `torch` is listed for the rooms that must work without it."""
PROCESSES = (
    "everydream_kit/__main__.py",
    "everydream_kit/jobs/__main__.py",
    "everydream_kit/actions/background.py",
)
"""Modules that `python -m` starts; they set the exit status."""
LONGEST_FILE = 500
RAISES_EVERYTHING_AGAIN = {
    "everydream_kit/training/plugins.py": "code of other people: its errors are raised again with the plug-in's name",
    "everydream_kit/actions/background.py": "the status of the task names the error; then it is raised into the log",
}
LONGEST_FUNCTION = 60
"""Without the docstring."""


def name_of(path):
    return str(path.relative_to(REPOSITORY))


@cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def nodes_of(path):
    return list(ast.walk(tree_of(path)))


def room_of(path):
    """First part of the path; the demo's story stands far below its images and its base model, so it counts apart."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "demo.main" if parts[:2] == ("demo", "main") else parts[0]


def room_of_name(name):
    """The room of a dotted name, or None if it is not ours."""
    parts = name.split(".")
    if parts[0] != "everydream_kit" or len(parts) == 1:
        return None
    return "demo.main" if parts[1:3] == ["demo", "main"] else parts[1]


def imported_names(node, path):
    """Absolute dotted names that an import statement names; for `from a import b` both a and a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        base = ".".join([*parts[: len(parts) - node.level], *filter(None, [base])])
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


@cache
def imports(path, *, inside_functions=True, for_types=True):
    """(line, dotted name) of every import in a file."""

    def walk(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                yield from ((child.lineno, name) for name in imported_names(child, path))
            elif (is_type_checking(child) and not for_types) or (
                isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not inside_functions
            ):
                continue
            else:
                yield from walk(child)

    return list(walk(tree_of(path)))


def faces(path):
    """Whether a file is one of those that talk to people, or the start of a process."""
    return room_of(path) in ("cli", "panels") or name_of(path) in PROCESSES


def test_the_package_is_found():
    assert len(MODULES) > 20
    assert {room_of(path) for path in MODULES} - {"__init__", "__main__"} <= set(ROOMS)


def is_downward(room, other):
    """Whether an import of one room by another points down the list, or between two that do not know each other."""
    if other not in ROOMS or other == room:
        return False
    return ROOMS.index(other) > ROOMS.index(room) or (room, other) in APART


def test_imports_point_up_the_list_only():
    every_room = ("__init__", "__main__")  # the public names and the command's door know every room
    wrong = [
        f"{name_of(path)}:{line} imports {name}"
        for path in MODULES
        if room_of(path) not in every_room
        for line, name in imports(path)
        if is_downward(room_of(path), room_of_name(name))
    ]
    assert not wrong


def imported_from(packages, path, **kinds):
    """`file:line name` of every import in a file that is one of these packages or of one of them."""
    return [f"{name_of(path)}:{line} {name}" for line, name in imports(path, **kinds) if name.split(".")[0] in packages]


def test_only_panels_know_widgets():
    others = [path for path in MODULES if room_of(path) != "panels"]
    assert not [found for path in others for found in imported_from(("ipywidgets", "anywidget", "IPython"), path)]


WITHOUT_WIDGETS = {"__init__", "asset_files", "labels", "svg_charts", "thumbnails"}
"""Modules of `panels` that make no widget, but the text, HTML and SVG that widgets show."""


def test_what_needs_no_widgets_is_not_in_panels():
    panels = [path for path in MODULES if room_of(path) == "panels"]
    without = {p.stem for p in panels if not list(imported_from(("ipywidgets", "anywidget", "IPython"), p))}
    assert without == WITHOUT_WIDGETS


def slow_here(path):
    """Packages that a file may not import at its top: torch may be where nothing works without."""
    needs_torch = room_of(path) in ("transfers", "models", "training", "export", "demo") or path.name in TORCH_IN_DATA
    needs_torch |= room_of(path) == "preflight" and path.name in TORCH_IN_PREFLIGHT
    return [name for name in SLOW if not (needs_torch and name == "torch")]


def test_slow_packages_are_imported_where_they_are_used():
    """At the top of a file they would be paid for by all who import it."""
    assert not [
        found
        for path in MODULES
        for found in imported_from(slow_here(path), path, inside_functions=False, for_types=False)
    ]


def test_the_first_rooms_never_need_torch():
    # draws.py makes torch generators, and imports it when one is requested
    first = [path for path in MODULES if room_of(path) in TORCH_FREE and path.name != "draws.py"]
    assert first
    assert not [found for path in first for found in imported_from(("torch",), path, for_types=False)]


def test_data_needs_torch_in_the_loader_and_the_cache_only():
    others = [path for path in MODULES if room_of(path) == "data" and path.name not in TORCH_IN_DATA]
    assert others
    assert not [found for path in others for found in imported_from(("torch",), path, for_types=False)]


def test_only_the_faces_print_and_exit():
    forbidden = {"print", "exit", "quit", "sys.exit", "os._exit", "input"}
    # the second Ctrl-C, when the first one's orderly way hangs
    allowed = {("everydream_kit/training/control.py", "os._exit")}
    calls = {
        (name_of(path), ast.unparse(node.func))
        for path in MODULES
        if not faces(path)
        for node in nodes_of(path)
        if isinstance(node, ast.Call)
    }
    assert calls
    assert not sorted(call for call in calls - allowed if call[1] in forbidden)


def catches_everything(node, path):
    """Whether a handler hides the next bug. `BaseException` is for cleaning up, and must raise again."""
    caught = ast.unparse(node.type) if node.type else "everything"
    raises_again = any(isinstance(child, ast.Raise) for child in ast.walk(node))
    if raises_again and (caught == "BaseException" or name_of(path) in RAISES_EVERYTHING_AGAIN):
        return False
    return caught in ("everything", "Exception", "BaseException")


def test_no_handler_catches_everything():
    assert not [
        f"{name_of(path)}:{node.lineno}"
        for path in MODULES
        for node in nodes_of(path)
        if isinstance(node, ast.ExceptHandler) and catches_everything(node, path)
    ]


def test_files_stay_readable():
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FILE}


def test_functions_stay_readable():
    lengths = {
        f"{name_of(path)}:{node.lineno} {node.name}": node.end_lineno
        - node.lineno
        + 1
        - len((ast.get_docstring(node) or "").splitlines())
        for path in MODULES
        for node in nodes_of(path)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert lengths
    assert not {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION}


@pytest.fixture(scope="module")
def structure():
    """The script that prints the shape of the package, and its modules."""
    spec = importlib.util.spec_from_file_location("structure", REPOSITORY / "scripts" / "structure.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules["structure"] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    return script, script.read_modules(REPOSITORY)


def test_no_modules_import_one_another_in_a_circle(structure):
    script, modules = structure
    assert script.find_circles(script.import_graph(modules)) == []


def test_one_module_knows_the_file_names_of_a_run_folder(structure):
    script, modules = structure
    assert list(script.readers_of_run_folders(modules)) == ["runs.layout"]


def test_no_two_modules_have_one_name(structure):
    script, modules = structure
    assert script.names_used_twice(modules) == {}


def test_importing_the_package_loads_neither_torch_nor_pydantic():
    program = (
        "import sys, everydream_kit; print([m for m in ('torch', 'pydantic', 'numpy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "[]"


TEXTS = {".py", ".md", ".txt", ".cfg", ".toml", ".json", ".yaml", ".yml", ".sh", ".ipynb", ".js", ".css", ""}
SKIPPED = {
    ".git",
    ".venv",
    ".hypothesis",
    "build",
    "dist",
    "node_modules",
    "logs",
    "workspace",
    "input",
    "demo-run",
    ".edk_cache",
}
MACHINE = re.compile(
    r"/wor[k]/(?!space)|/home/(?!(user|ada|me|you)\b)[a-z]\w*/|/roo[t]/|file:///(?!\{)|\.pyenv/versions"
)


def texts():
    """Every text file of ours: caches, environments and what runs leave behind are not."""
    paths = []
    for folder, names, files in os.walk(REPOSITORY):
        names[:] = [
            name for name in names if name not in SKIPPED and not name.endswith(("cache", "cache__", ".egg-info"))
        ]
        paths += [Path(folder) / name for name in files]
    for path in sorted(paths):
        if path.is_file() and path.suffix in TEXTS and path != Path(__file__) and path.stat().st_size < 2_000_000:
            yield path


def test_no_path_of_a_developers_machine_is_in_the_tree():
    found = []
    for path in texts():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if MACHINE.search(line):
                found.append(f"{name_of(path)}:{number}: {line.strip()[:100]}")
    assert not found


def test_nothing_is_left_to_do_in_the_code():
    marks = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    found = [
        name_of(path) for path in texts() if path.suffix == ".py" and marks.search(path.read_text(encoding="utf-8"))
    ]
    assert not found


def test_test_files_have_names_of_their_own():
    """Without packages in `tests`, pytest confuses two files of one name."""
    names = [path.name for path in (REPOSITORY / "tests").rglob("test_*.py")]
    assert names
    assert sorted(names) == sorted(set(names))
    assert not list((REPOSITORY / "tests").rglob("__init__.py"))


def test_images_are_opened_in_one_place_only():
    """`Image.open` tries every format that Pillow knows, and runs Ghostscript on PostScript."""
    others = [path for path in MODULES if path.relative_to(PACKAGE).as_posix() != "data/image_files.py"]
    opens = [
        f"{name_of(path)}:{node.lineno}"
        for path in others
        for node in nodes_of(path)
        if isinstance(node, ast.Attribute) and node.attr == "open" and ast.unparse(node.value) in ("Image", "PIL.Image")
    ]
    opens += [f"{name_of(path)}:{line}" for path in others for line, name in imports(path) if name == "PIL.Image.open"]
    assert not opens
