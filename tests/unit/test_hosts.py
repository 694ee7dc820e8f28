"""Hosts are recognized by what they set, and everything of Colab goes through one replaceable bridge."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from everydream_kit.errors import HostError
from everydream_kit.hosts import (
    GoogleColab,
    detect_host,
    drive_mountpoint,
    find_kernel_python,
    find_secret,
    outlives_machine,
    port_address,
    prepare_storage,
)


class FakeColab:
    """Stands for Google's side: a Drive that mounts, and a panel of secrets."""

    def __init__(self, secrets=None):
        self.secrets = secrets or {}
        self.mounted = []

    def mount_drive(self, mountpoint):
        self.mounted.append(mountpoint)
        (mountpoint / "MyDrive").mkdir(parents=True)

    def read_secret(self, name):
        return self.secrets.get(name)


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({}, "plain"),
        ({"COLAB_RELEASE_TAG": "release-colab_20261101"}, "colab"),
        ({"COLAB_GPU": ""}, "colab"),  # set and empty on a CPU runtime
        ({"RUNPOD_POD_ID": "abc123"}, "runpod"),
        ({"VAST_CONTAINERLABEL": "C.42"}, "vast"),
        ({"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}, "kaggle"),
        ({"LIGHTNING_CLOUD_SPACE_ID": "01abc"}, "lightning"),
        ({"PAPERSPACE_NOTEBOOK_REPO_ID": "r1"}, "paperspace"),
        ({"HOME": "/home/studio-lab-user"}, "studiolab"),
        ({"HOME": "/home/someone"}, "plain"),
    ],
)
def test_a_host_is_recognized_by_the_variables_that_it_sets(environ, name):
    assert detect_host(environ).name == name


def test_a_folder_named_workspace_does_not_make_a_machine_a_pod(tmp_path):
    (tmp_path / "workspace").mkdir()
    (tmp_path / "content").mkdir()
    host = detect_host({}, root=tmp_path)
    assert host.name == "plain"
    assert not host.is_rented


def test_projects_live_on_the_volume_of_a_pod(tmp_path):
    (tmp_path / "workspace").mkdir()
    host = detect_host({"RUNPOD_POD_ID": "abc123"}, root=tmp_path)
    folder = prepare_storage(host, fallback=tmp_path / "elsewhere")
    assert folder == tmp_path / "workspace" / "everydream"
    assert folder.is_dir()
    assert outlives_machine(host, folder)
    assert not outlives_machine(host, tmp_path / "tmp")


def test_a_pod_without_a_volume_uses_the_fallback_and_says_that_it_will_be_lost(tmp_path):
    host = detect_host({"VAST_CONTAINERLABEL": "C.42"}, root=tmp_path)
    folder = prepare_storage(host, fallback=tmp_path / "home")
    assert folder == tmp_path / "home"
    assert not outlives_machine(host, folder)


def test_a_plain_machine_uses_the_fallback_and_loses_nothing(tmp_path):
    host = detect_host({})
    assert prepare_storage(host, fallback=tmp_path / "projects") == tmp_path / "projects"
    assert outlives_machine(host, tmp_path / "projects")


def test_colab_without_drive_keeps_projects_on_the_disk_that_is_lost(tmp_path):
    host = detect_host({"COLAB_RELEASE_TAG": "x"}, root=tmp_path)
    colab = FakeColab()
    folder = prepare_storage(host, fallback=tmp_path, bridge=colab)
    assert folder == tmp_path / "content" / "everydream"
    assert colab.mounted == []
    assert not outlives_machine(host, folder)


def test_colab_mounts_drive_once_when_asked(tmp_path):
    host = detect_host({"COLAB_RELEASE_TAG": "x"}, root=tmp_path)
    colab = FakeColab()
    folders = {prepare_storage(host, fallback=tmp_path, mount_drive=True, bridge=colab) for _ in range(2)}
    assert folders == {tmp_path / "content" / "drive" / "MyDrive" / "everydream"}
    assert colab.mounted == [tmp_path / "content" / "drive"]
    assert outlives_machine(host, folders.pop())


def test_only_colab_has_a_drive_to_mount():
    with pytest.raises(HostError, match="this machine has no Google Drive"):
        drive_mountpoint(detect_host({}))


def test_a_secret_comes_from_the_environment_before_colabs_panel():
    host = detect_host({"COLAB_RELEASE_TAG": "x"})
    colab = FakeColab({"HF_TOKEN": "from-panel"})
    assert find_secret("HF_TOKEN", host, environ={"HF_TOKEN": "from-shell"}, bridge=colab) == "from-shell"
    assert find_secret("HF_TOKEN", host, environ={}, bridge=colab) == "from-panel"
    assert find_secret("OTHER", host, environ={}, bridge=colab) is None


def test_a_plain_machine_never_asks_colab_for_a_secret():
    assert find_secret("HF_TOKEN", detect_host({}), environ={}, bridge=None) is None


def test_outside_colab_the_real_bridge_says_where_it_would_work():
    with pytest.raises(HostError, match=r"google\.colab\.userdata cannot be imported here"):
        GoogleColab().read_secret("HF_TOKEN")


FAKE_PACKAGE = {
    "errors": "class Error(Exception): pass\n",
    "drive": "def mount(mountpoint): raise ValueError('mount failed: ' + mountpoint)\n",
    "userdata": (
        "from google.colab import errors\n"
        "class NotebookAccessError(Exception): pass\n"
        "class SecretNotFoundError(errors.Error): pass\n"
        "def get(name):\n"
        "    if name == 'HF_TOKEN': return 'a-token'\n"
        "    if name == 'LOCKED': raise NotebookAccessError(name)\n"
        "    raise SecretNotFoundError(name)\n"
    ),
}


@pytest.fixture
def google_colab(tmp_path, monkeypatch):
    """A package with the names and errors of google.colab, as its source has them."""
    package = tmp_path / "google" / "colab"
    package.mkdir(parents=True)
    for name, source in FAKE_PACKAGE.items():
        (package / f"{name}.py").write_text(source)
    saved = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "google"}
    for name in saved:  # protobuf's half of the namespace is excluded for the test
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield GoogleColab()
    for name in [name for name in sys.modules if name.split(".")[0] == "google"]:
        del sys.modules[name]


def test_the_real_bridge_reads_a_shared_secret_and_none_for_the_others(google_colab):
    assert google_colab.read_secret("HF_TOKEN") == "a-token"
    assert google_colab.read_secret("LOCKED") is None
    assert google_colab.read_secret("ABSENT") is None


def test_a_refused_drive_says_what_to_do_instead(google_colab):
    with pytest.raises(HostError, match=r"not mounted at /content/drive: mount failed.*continue without Drive"):
        google_colab.mount_drive(Path("/content/drive"))


def test_a_port_of_a_pod_is_reached_through_runpods_proxy():
    assert port_address(detect_host({"RUNPOD_POD_ID": "abc"}), 6006) == "https://abc-6006.proxy.runpod.net"
    assert port_address(detect_host({}), 6006) == "http://127.0.0.1:6006"


def write_process(proc, pid, parent, *words):
    folder = proc / str(pid)
    folder.mkdir(parents=True)
    (folder / "cmdline").write_bytes("\0".join(words).encode() + b"\0")
    (folder / "stat").write_text(f"{pid} (a name) with) spaces) S {parent} 1 1 0")


def test_the_kernel_above_a_shell_names_its_python(tmp_path):
    write_process(tmp_path, 30, 20, "/bin/bash", "colab_setup.sh")
    write_process(tmp_path, 20, 10, sys.executable, "-m", "ipykernel_launcher", "-f", "kernel.json")
    write_process(tmp_path, 10, 1, "jupyter-lab")
    assert find_kernel_python(30, proc=tmp_path) == sys.executable


def test_a_shell_without_a_kernel_above_it_has_no_kernel_python(tmp_path):
    write_process(tmp_path, 30, 10, "/bin/bash", "colab_setup.sh", "ipy")
    write_process(tmp_path, 10, 1, "/sbin/init")
    assert find_kernel_python(30, proc=tmp_path) is None
    assert find_kernel_python(30, proc=tmp_path / "none") is None


def test_the_set_up_script_may_ask_before_anything_is_installed():
    source = "import everydream_kit.hosts as h, sys; print(h.detect_host({}).name, 'pydantic' in sys.modules)"
    repository = Path(__file__).parents[2]
    answer = subprocess.run(
        [sys.executable, "-S", "-c", source],  # -S: no site-packages at all
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.split() == ["plain", "False"]


@pytest.mark.parametrize(
    ("environ", "storage"),
    [
        ({"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, "kaggle/working"),
        ({"LIGHTNING_CLOUD_SPACE_ID": "01abc"}, "teamspace/studios/this_studio"),
        ({"PAPERSPACE_NOTEBOOK_REPO_ID": "r1"}, "storage"),
        ({"HOME": "/home/studio-lab-user"}, "home/studio-lab-user"),
    ],
)
def test_projects_go_to_the_folder_that_outlives_the_machine(environ, storage, tmp_path):
    (tmp_path / storage).mkdir(parents=True)
    host = detect_host(environ, root=tmp_path)
    folder = prepare_storage(host, fallback=tmp_path / "elsewhere")
    assert folder == tmp_path / storage / "everydream"
    assert outlives_machine(host, folder)
    assert not outlives_machine(host, tmp_path / "tmp")
