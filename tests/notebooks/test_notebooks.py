"""The notebooks: their form, that they are what their sources say, and that each runs from top to bottom."""

import ast
import importlib.util
import itertools
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(900)  # a busy machine is slow, not broken
REPOSITORY = Path(__file__).parents[2]
BOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
NAMES = ["00_quickstart", "01_prepare_dataset", "02_train", "03_compare_and_export", "04_share_on_the_hub"]


def read(path):
    import nbformat  # here: every test process collects this file, and the import takes two seconds of processor time

    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def test_all_five_are_there_in_order():
    assert [path.stem for path in BOOKS] == NAMES


def test_they_are_what_their_sources_say():
    script = REPOSITORY / "scripts" / "build_notebooks.py"
    checked = subprocess.run([sys.executable, script, "--check"], check=False, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_no_output_is_stored_and_ids_are_hashes(path):
    import nbformat

    book = read(path)
    nbformat.validate(book)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(path))
    assert len({cell.id for cell in book.cells}) == len(book.cells)


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_the_set_up_code_is_folded_in_lab_and_on_colab(path):
    first, *others = code_cells(path)
    assert first.source.startswith("#@title Set up")
    assert first.metadata["jupyter"]["source_hidden"] is True and first.metadata["cellView"] == "form"
    assert not any("jupyter" in cell.metadata for cell in others)


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_every_code_cell_follows_a_short_text(path):
    cells = read(path).cells
    assert cells[0].cell_type == "markdown"
    for before, cell in itertools.pairwise(cells):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown"
            assert len(before.source.split()) < 120


def test_the_first_code_cell_is_the_same_set_up_everywhere():
    assert len({code_cells(path)[0].source for path in BOOKS}) == 1


@pytest.fixture
def run_setup(monkeypatch, tmp_path):
    """Runs the set-up cell as on a machine without the kit; gives the shell lines that it would run."""
    from IPython.core.inputtransformer2 import TransformerManager

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("EVERYDREAM_KIT_REPOSITORY", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(address):
        lines = []
        shell = types.SimpleNamespace(system=lines.append)
        source = re.sub('^REPOSITORY = ".*?"', f'REPOSITORY = "{address}"', code_cells(BOOKS[0])[0].source, flags=re.M)
        with pytest.raises(SystemExit) as stopped:
            exec(TransformerManager().transform_cell(source), {"get_ipython": lambda: shell})
        return lines, str(stopped.value)

    return run


def test_without_the_kit_and_its_address_the_set_up_says_what_to_do(run_setup):
    lines, message = run_setup("")
    assert lines == [] and "between the quotes of REPOSITORY" in message


def test_the_set_up_fetches_the_kit_from_its_address_or_from_next_to(run_setup, tmp_path, monkeypatch):
    lines, message = run_setup("https://example.org/kit")
    assert [line.split()[0] for line in lines] == ["git", "bash"] and "$ADDRESS" in lines[0]
    assert "lines above say why" in message  # nothing was fetched in this test
    monkeypatch.setenv("EVERYDREAM_KIT_REPOSITORY", "https://example.org/fork")
    assert len(run_setup("")[0]) == 2
    (tmp_path / "everydream-kit").mkdir()
    (tmp_path / "everydream-kit" / "colab_setup.sh").touch()
    lines, _ = run_setup("")
    assert [line.split()[0] for line in lines] == ["bash"]


def test_the_address_stands_in_one_place(tmp_path):
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    from build_notebooks import published_address

    (tmp_path / "setup.cfg").write_text("[metadata]\nname = kit\nurl = https://example.org/kit\n")
    assert published_address(tmp_path / "setup.cfg") == "https://example.org/kit"
    assert f'REPOSITORY = "{published_address()}"' in code_cells(BOOKS[0])[0].source


@pytest.mark.parametrize(
    ("address", "badge"),
    [
        ("", ""),
        ("https://example.org/kit", ""),  # Colab opens notebooks of GitHub only
        (
            "https://github.com/me/kit.git",
            "https://colab.research.google.com/github/me/kit/blob/main/notebooks/00_quickstart.ipynb",
        ),
    ],
)
def test_the_readme_gets_colabs_badge_from_the_published_address(address, badge):
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    from build_notebooks import with_badge

    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    filled = with_badge(readme, address)
    assert ("colab-badge.svg" in filled) == bool(badge)
    assert badge in filled
    assert with_badge(filled, "") == with_badge(readme, "")  # and goes again with the address


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_every_other_cell_is_one_call_without_logic(path):
    cells = code_cells(path)[1:]
    assert cells
    for cell in cells:
        body = [node for node in ast.parse(cell.source).body if not isinstance(node, ast.Import)]
        settings = [node for node in body if isinstance(node, ast.Assign)]
        calls = [node for node in body if isinstance(node, ast.Expr)]
        assert len(calls) == 1 and isinstance(calls[0].value, ast.Call)
        assert len(settings) + len(calls) == len(body)
        assert all(isinstance(node.value, ast.Constant) for node in settings)
        assert not settings or "parameters" in cell.metadata.tags
        assert "!" not in cell.source and "%" not in cell.source


def test_the_quickstart_has_five_code_cells():
    assert len(code_cells(BOOKS[0])) == 5


def run_book(name, folder, *more, **parameters):
    """Execute a notebook in a folder of its own, with other values in the cell tagged `parameters`, and more cells at its end."""
    import nbformat
    from nbclient import NotebookClient

    book = read(REPOSITORY / "notebooks" / f"{name}.ipynb")
    cell = next(cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ()))
    lines = cell.source.splitlines()
    for key, value in parameters.items():
        number = next(i for i, line in enumerate(lines) if line.startswith(f"{key} = "))
        lines[number] = f"{key} = {value!r}"
    cell.source = "\n".join(lines)
    book.cells += [nbformat.v4.new_code_cell(source) for source in more]
    NotebookClient(book, timeout=840, resources={"metadata": {"path": str(folder)}}, kernel_name="python3").execute()
    return book


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """One folder for all notebooks, as a person has it; kernels are the test's own Python."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")  # for the kernels; a test that comes later in this process is not offline
        yield tmp_path_factory.mktemp("notebooks")


def shown_text(book):
    """All HTML that the notebook's widgets show at its end."""
    state = book.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
    return "".join(str(entry["state"].get("value", "")) for entry in state.values())


WAIT_AS_A_SCRIPT = (
    "edk.panels.train(PROJECT).job.wait()",
    "compare = edk.panels.compare(PROJECT)\ncompare.run()\ncompare.job.wait()\ncompare.refresh()",
)
"""What stands for the page here: cells return at once, and without a page there is no clock."""


def test_the_quickstart_ends_with_before_and_after(workspace):
    (workspace / "workspace" / "quick").mkdir(parents=True)
    few = {"cfgs": [3], "num_inference_steps": 4, "samples": ["guitar, ink drawing"]}  # sampling takes most of the time
    (workspace / "workspace" / "quick" / "sample_prompts.json").write_text(json.dumps(few))
    book = run_book("00_quickstart", workspace, *WAIT_AS_A_SCRIPT, MAX_EPOCHS=1, PROJECT="quick")
    shown = shown_text(book)
    assert "Before and after appears here when training ends." in shown
    assert "before · base" in shown and "after · last-quick" in shown
    assert "images generated" in shown
    status = json.loads(next((workspace / "workspace" / "quick" / "logs").glob("*/status.json")).read_text())
    assert status["state"] == "finished" and status["step"] == status["num_steps"] > 0


@pytest.mark.parametrize(
    "name, project",
    [
        ("01_prepare_dataset", "alone"),
        ("02_train", "alone"),
        ("03_compare_and_export", "quick"),
        ("04_share_on_the_hub", "alone"),
    ],
)
def test_each_other_notebook_runs_alone_or_after_the_quickstart(name, project, workspace):
    book = run_book(name, workspace, PROJECT=project)
    shown = shown_text(book)
    assert "edk-head" in shown
    if project == "quick":
        assert "before · base" in shown
