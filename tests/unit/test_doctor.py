"""The doctor's verdicts, for machines that we do not have: each measurement is given, each cure is read."""

import json
import logging
from pathlib import Path

import pytest

from everydream_kit.cli import main
from everydream_kit.doctor import GIB, Check, Device, Diagnosis, Machine, _container_limit, _import_problem, diagnose

T4 = Device("cuda", "Tesla T4", 15 * GIB, 14 * GIB, has_bf16=False, torch_cuda="12.8")
CPU = Device("cpu", "x86_64")
INSTALLED = {"packaging": "25.0", "torch": "2.13.0", "diffusers": "0.42.1", "bitsandbytes": "0.50.2", "peft": "0.21.2"}
REQUIREMENTS = ["torch>=2.6", "diffusers>=0.39", "bitsandbytes>=0.46", "peft>=0.17"]


def healthy_machine(**changes):
    """A machine on which everything is well, with some answers changed."""
    answers = {
        "python": (3, 12, 1),
        "system": "Linux",
        "cores": 8,
        "environ": {"HF_TOKEN": "hf_secret"},
        "requirements": lambda: REQUIREMENTS,
        "version_of": INSTALLED.get,
        "import_problem": lambda name: "",
        "device": lambda: T4,
        "memory": lambda: (32 * GIB, 24 * GIB),
        "disk_free": lambda folder: 100 * GIB,
        "nvidia_driver": lambda: True,
    }
    return Machine(**{**answers, **changes})


def test_a_good_machine_has_no_problems():
    diagnosis = diagnose("runs", healthy_machine())
    assert diagnosis.status == "ok"
    assert diagnosis.problems == ()
    assert "fp16 with a gradient scaler" in diagnosis["device"].text
    assert "torch 2.13.0" in diagnosis["packages"].text


def test_the_token_is_never_shown():
    assert "hf_secret" not in str(diagnose("runs", healthy_machine()))


BROKEN = {
    "Python": ("error", {"python": (3, 9, 2)}),
    "device": ("error", {"device": lambda: None, "import_problem": lambda name: "ImportError: libcudart"}),
    "GPU memory": ("warning", {"device": lambda: Device("cuda", "GTX 1070", 8 * GIB, 8 * GIB)}),
    "memory": ("warning", {"memory": lambda: (4 * GIB, 3 * GIB)}),
    "disk": ("error", {"disk_free": lambda folder: 1 * GIB}),
    "bitsandbytes": ("warning", {"import_problem": lambda name: "OSError: x" if name == "bitsandbytes" else ""}),
    "torch": ("error", {"version_of": {**INSTALLED, "torch": "2.1.0"}.get}),
    "peft": ("warning", {"version_of": {**INSTALLED, "peft": None}.get}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_every_problem_turns_its_check_and_comes_with_a_cure(name):
    status, changes = BROKEN[name]
    check = diagnose("runs", healthy_machine(**changes))[name]
    assert check.status == status
    assert check.cure


def test_a_gpu_that_torch_has_no_code_for_is_an_error():
    device = Device("cuda", "P100", unsupported="torch has no code for this GPU. Install the build for CUDA 12.6")
    check = diagnose("runs", healthy_machine(device=lambda: device))["device"]
    assert (check.status, check.cure) == ("error", "Install the build for CUDA 12.6")


def test_a_cpu_with_an_nvidia_driver_is_reported_why_torch_cannot_use_it():
    built_without = diagnose("runs", healthy_machine(device=lambda: CPU))["device"]
    assert "built without CUDA" in built_without.cure
    other_driver = Device("cpu", "x86_64", torch_cuda="13.0")
    assert "fits this driver" in diagnose("runs", healthy_machine(device=lambda: other_driver))["device"].cure


def test_a_machine_without_a_gpu_is_a_warning_and_no_error():
    machine = healthy_machine(device=lambda: CPU, nvidia_driver=lambda: False)
    assert diagnose("runs", machine).status == "warning"


def test_a_gpu_that_is_half_taken_names_the_likely_reason():
    taken = Device("cuda", "A100", 40 * GIB, 5 * GIB, has_bf16=True, torch_cuda="12.8")
    assert "close other notebooks" in diagnose("runs", healthy_machine(device=lambda: taken))["GPU memory"].cure


def test_a_kit_that_was_never_installed_is_one_error_and_not_twenty():
    diagnosis = diagnose("runs", healthy_machine(requirements=lambda: None))
    assert [check.name for check in diagnosis.problems if check.status == "error"] == ["packages"]
    assert "colab_setup.sh" in diagnosis["packages"].cure


def test_a_missing_bitsandbytes_names_its_substitute():
    check = diagnose("runs", healthy_machine(version_of={**INSTALLED, "bitsandbytes": None}.get))["bitsandbytes"]
    assert check.status == "warning"
    assert "choose optimizer adamw" in check.text


def test_without_a_gpu_bitsandbytes_is_not_imported():
    asked = []
    machine = healthy_machine(
        device=lambda: CPU, nvidia_driver=lambda: False, import_problem=lambda name: asked.append(name) or ""
    )
    assert diagnose("runs", machine)["bitsandbytes"].text == "0.50.2, for machines with a GPU"
    assert "bitsandbytes" not in asked
    diagnose("runs", healthy_machine(import_problem=lambda name: asked.append(name) or ""))
    assert "bitsandbytes" in asked


def test_small_shared_memory_is_noticed_before_a_loader_dies():
    small = healthy_machine(disk_free=lambda folder: 64 * 1024**2 if folder == Path("/dev/shm") else 100 * GIB)
    assert "--shm-size" in diagnose("runs", small)["shared memory"].cure


def test_colab_is_warned_of_widgets_that_it_cannot_show():
    environ = {"COLAB_RELEASE_TAG": "x"}
    eight = diagnose(
        "/content/drive/x", healthy_machine(environ=environ, version_of={**INSTALLED, "ipywidgets": "8.1.9"}.get)
    )
    seven = diagnose(
        "/content/drive/x", healthy_machine(environ=environ, version_of={**INSTALLED, "ipywidgets": "7.7.1"}.get)
    )
    assert eight["widgets"].status == "warning"
    assert seven["widgets"].status == "ok"


@pytest.mark.parametrize(
    ("environ", "folder", "status"),
    [
        ({"COLAB_RELEASE_TAG": "x"}, "/content/drive/MyDrive/everydream", "ok"),
        ({"COLAB_RELEASE_TAG": "x"}, "/content/everydream", "warning"),
        ({"RUNPOD_POD_ID": "x"}, "/workspace/everydream", "ok"),
        ({"RUNPOD_POD_ID": "x"}, "/root", "warning"),
    ],
)
def test_a_rented_machine_says_whether_the_folder_will_be_lost(environ, folder, status):
    assert diagnose(folder, healthy_machine(environ=environ))["storage"].status == status


def test_a_plain_machine_has_no_storage_check():
    with pytest.raises(KeyError):
        diagnose("runs", healthy_machine())["storage"]


def test_problems_list_errors_before_warnings():
    checks = (Check("a", "warning", "", "x"), Check("b", "ok", ""), Check("c", "error", "", "y"))
    assert [check.name for check in Diagnosis(checks).problems] == ["c", "a"]
    assert Diagnosis(checks).status == "error"


def test_the_text_form_puts_each_cure_under_its_check():
    lines = str(Diagnosis((Check("disk", "error", "1 GiB free", "Free some."), Check("x", "ok", "fine")))).splitlines()
    assert [line.split() for line in lines] == [
        ["error", "disk:", "1", "GiB", "free"],
        ["Free", "some."],
        ["ok", "x:", "fine"],
    ]


def test_a_container_limit_is_read_and_unlimited_means_none(tmp_path):
    assert _container_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert _container_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("2147483648\n")
    assert _container_limit(tmp_path) == 2 * GIB


def test_an_import_problem_is_one_line_and_leaves_logging_as_it_was():
    before = logging.root.manager.disable
    assert _import_problem("no_such_module_anywhere").startswith("ModuleNotFoundError: No module named")
    assert _import_problem("json") == ""
    assert logging.root.manager.disable == before


def test_this_machine_can_be_examined(tmp_path):
    diagnosis = diagnose(tmp_path / "not" / "yet" / "there")
    assert diagnosis["packages"].status == "ok", diagnosis["packages"]
    assert diagnosis["device"].status in ("ok", "warning")
    assert not [check for check in diagnosis.checks if check.status != "ok" and not check.cure]


def test_the_json_form_is_what_an_issue_asks_for(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    main(["doctor", "--json"])
    text = capsys.readouterr().out
    facts = json.loads(text)
    assert facts["everydream_kit"]
    assert {"Python", "device", "packages"} <= {check["name"] for check in facts["checks"]}
    assert "hf_secret" not in text
