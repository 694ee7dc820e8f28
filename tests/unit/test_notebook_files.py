"""`everydream notebooks`: copies for people who installed a wheel and have no clone."""

import pytest

from everydream_kit.cli import main
from everydream_kit.errors import DataError
from everydream_kit.notebook_files import copy_notebooks, find_notebooks


def test_the_five_notebooks_are_copied(tmp_path, capsys):
    assert main(["notebooks", str(tmp_path / "mine")]) == 0
    names = sorted(path.name for path in (tmp_path / "mine").iterdir())
    assert len(names) == 5
    assert names[0] == "00_quickstart.ipynb"
    assert f"jupyter lab {tmp_path / 'mine'}" in capsys.readouterr().out


def test_a_notebook_that_is_there_stays(tmp_path):
    mine = tmp_path / "00_quickstart.ipynb"
    mine.write_text("my work", encoding="utf-8")
    copied, kept = copy_notebooks(tmp_path)
    assert kept == [mine]
    assert mine.read_text(encoding="utf-8") == "my work"
    assert len(copied) == len(find_notebooks()) - 1


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=r"file: cannot be made .* another folder"):
        copy_notebooks(tmp_path / "file")
