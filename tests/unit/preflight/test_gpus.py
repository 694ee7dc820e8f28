"""The GPUs that are known: found by what people call them, and by what the driver calls them."""

import re
from pathlib import Path

import pytest

from everydream_kit.cli import main
from everydream_kit.errors import ConfigError
from everydream_kit.preflight.gpus import GIB, find_gpu, known_gpus, recognize


def test_every_card_has_what_a_plan_needs():
    names = [gpu_spec.name for gpu_spec in known_gpus()]
    assert {
        "T4",
        "V100",
        "L4",
        "A10G",
        "RTX 3060 12GB",
        "RTX 3090",
        "RTX 4090",
        "A40",
        "A100 40GB",
        "A100 80GB",
        "H100",
    } <= set(names)
    assert len(names) == len(set(names))
    for gpu_spec in known_gpus():
        assert 7 * GIB < gpu_spec.memory_bytes < 90 * GIB
        assert gpu_spec.fp32_tflops > 0 and gpu_spec.half_tflops > 0 and gpu_spec.bandwidth_bytes > 1e11
        assert gpu_spec.has_bf16 == (gpu_spec.bf16_tflops > 0)
        assert 0.2e9 < gpu_spec.context_bytes < 1e9 and 0 < gpu_spec.fragmentation < 0.2
        assert gpu_spec.name in gpu_spec.describe() and gpu_spec.hosts


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("T4", "T4"),
        ("tesla t4", "T4"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("3090", "RTX 3090"),
        ("rtx-4090", "RTX 4090"),
        ("a100", "A100 40GB"),
        ("A100-SXM4-80GB", "A100 80GB"),
        ("H100 80GB HBM3", "H100"),
        ("3060 12gb", "RTX 3060 12GB"),
    ],
)
def test_a_card_is_found_by_what_people_call_it(said, meant):
    assert find_gpu(said).name == meant


def test_an_unknown_card_is_answered_with_the_nearest_name_and_all_of_them():
    with pytest.raises(
        ConfigError, match=r"gpu: no GPU named 'RTX 3080' is known; did you mean RTX 30.0\? Known are T4, P100"
    ):
        find_gpu("RTX 3080")
    with pytest.raises(ConfigError, match="gpu: no GPU named 'Voodoo' is known; Known are"):
        find_gpu("Voodoo")


def test_only_turing_and_older_are_without_bf16():
    assert [gpu_spec.name for gpu_spec in known_gpus() if not gpu_spec.has_bf16] == ["T4", "P100", "V100"]


def test_the_card_that_is_here_keeps_the_memory_that_was_measured():
    gpu_spec = recognize("Tesla T4", int(14.7 * GIB))
    assert (gpu_spec.name, gpu_spec.memory_bytes, gpu_spec.fp16_tflops) == ("T4", int(14.7 * GIB), 65)


def test_cards_of_one_name_are_reported_apart_by_their_memory():
    assert recognize("NVIDIA A100-SXM4-80GB", 79 * GIB).name == "A100 80GB"
    small = recognize("NVIDIA GeForce RTX 3060", 8 * GIB)  # the 8 GB one, which is not in the list
    assert (small.memory_bytes, small.bandwidth_bytes) == (8 * GIB, 0)


def test_a_card_that_is_not_in_the_list_is_known_by_its_memory_only():
    gpu_spec = recognize("NVIDIA GeForce RTX 2080 Ti", 11 * GIB, has_bf16=False)
    assert (gpu_spec.name, gpu_spec.memory_bytes, gpu_spec.has_bf16, gpu_spec.half_tflops) == (
        "NVIDIA GeForce RTX 2080 Ti",
        11 * GIB,
        False,
        0,
    )


def test_doctor_lists_the_cards(capsys):
    main(["doctor"])
    line = next(line for line in capsys.readouterr().out.splitlines() if "everydream plan --gpu" in line)
    assert "T4 (15 GiB)" in line and "A100 80GB (79 GiB)" in line


def test_the_planning_page_lists_the_known_gpus():
    text = " ".join((Path(__file__).parents[3] / "docs" / "planning.md").read_text(encoding="utf-8").split())
    (listed,) = re.findall(r"lists those that are known: ([^.]+)\.", text)
    assert sorted(listed.split(", ")) == sorted(gpu_spec.name for gpu_spec in known_gpus())
