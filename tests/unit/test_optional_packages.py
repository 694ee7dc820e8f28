"""Packages of the host that nothing here needs: hidden in processes of our own, and in a kernel only where they are broken."""

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from broken_packages import write_broken_packages

from everydream_kit.optional_packages import hide_broken


def run(program, *, packages):
    words = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(packages)!r})\n{program}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


@pytest.mark.parametrize("name", ["xformers", "hqq", "kernels", "tensorflow", "flash_attn"])
def test_a_process_of_our_own_does_not_find_it(name, tmp_path):
    program = (
        "import importlib.util\nfrom everydream_kit.optional_packages import hide_unused\nhide_unused()\n"
        f"print(importlib.util.find_spec({name!r}))\n"
        f"try: import {name}\nexcept ModuleNotFoundError: print('hidden')"
    )
    out, _ = run(program, packages=write_broken_packages(tmp_path, [name]))
    assert out.split() == ["None", "hidden"]


def test_what_works_stays_in_a_kernel(tmp_path):
    (tmp_path / "hqq.py").write_text("answer = 42", encoding="utf-8")
    program = "from everydream_kit.optional_packages import hide_broken\nhide_broken()\nimport hqq\nprint(hqq.answer)"
    out, _ = run(program, packages=tmp_path)
    assert out == "42"


def test_bitsandbytes_line_about_a_kernel_that_nothing_uses_reaches_nobody(caplog):
    hide_broken()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with caplog.at_level(logging.WARNING):
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", "No module")
        logger.warning("something that matters")
    assert [record.getMessage() for record in caplog.records] == ["something that matters"]


def test_nor_does_it_where_a_base_is_quantized_first(caplog):
    from everydream_kit.models.quantized import FORMS

    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.filters.clear()
    FORMS["nf4"].check()
    with caplog.at_level(logging.WARNING):
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", "No module")
    assert caplog.records == []


def test_the_line_that_is_dropped_is_the_one_that_bitsandbytes_logs():
    specification = importlib.util.find_spec("bitsandbytes")
    source = Path(specification.submodule_search_locations[0], "backends", "cpu", "ops.py")
    assert "from kernels-community" in source.read_text(encoding="utf-8")
