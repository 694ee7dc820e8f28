"""The writer of files that are complete or absent, and the identity by which it knows what was left behind."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from everydream_kit import atomic, identity
from everydream_kit.atomic import open_atomic, sweep, write_atomic

FOLDER = """
import sys
from pathlib import Path
from everydream_kit.atomic import temporary_path
folder = temporary_path(Path(sys.argv[1]))
(folder / "unet").mkdir(parents=True)
(folder / "unet" / "weights").write_text("half")
print(folder)
"""
HOLD = """
import sys, time
from everydream_kit.atomic import open_atomic
with open_atomic(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("open", flush=True)
    time.sleep(60)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "new" / "a.json"
    with pytest.raises(FileNotFoundError):
        write_atomic(path, "x")
    write_atomic(path, "one\r\n", make_folder=True)
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["a.json"]


def test_permissions_are_the_users_own(tmp_path):
    path = tmp_path / "a.txt"
    before = os.umask(0o027)
    try:
        write_atomic(path, "x")
        assert path.stat().st_mode & 0o777 == 0o640
        path.chmod(0o664)
        write_atomic(path, "y")
        assert path.stat().st_mode & 0o777 == 0o664
    finally:
        os.umask(before)


def test_links_that_wait_at_old_names_and_at_the_target_are_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("a.txt", "a.txt.partial", ".a.txt.tmp"):
        (tmp_path / name).symlink_to(victim)
    write_atomic(tmp_path / "a.txt", "theirs")
    assert victim.read_text() == "mine"
    assert not (tmp_path / "a.txt").is_symlink()
    assert (tmp_path / "a.txt").read_text() == "theirs"


def test_a_prepared_temporary_name_is_not_written_through(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    guesses = iter(["0" * 16, "1" * 16])
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda _: next(guesses))
    owner = identity.this_process()
    (tmp_path / f".edk-{owner.place}-{owner.pid}-{owner.started}-{'0' * 16}.tmp").symlink_to(victim)
    write_atomic(tmp_path / "a.txt", "theirs")
    assert victim.read_text() == "mine"


def test_a_failure_keeps_the_old_content_and_leaves_nothing(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), open_atomic(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_atomic(tmp_path / "folder", "x")
    assert names(tmp_path) == ["a.txt", "folder"]


def test_a_full_disk_leaves_nothing(tmp_path):
    """A real one: a file size limit makes the kernel refuse the bytes."""
    program = (
        "import resource, signal, sys; from everydream_kit.atomic import write_atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_atomic(sys.argv[1], b'x' * 5000)\n"
        "except OSError as error: print(error.errno)"
    )
    path = tmp_path / "a.txt"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(errno.EFBIG)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_without_replace_what_is_there_stays(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("first")
    with pytest.raises(FileExistsError), open_atomic(path, replace=False) as file:
        file.write(b"second")
    assert path.read_text() == "first"
    with open_atomic(tmp_path / "b.txt", replace=False) as file:
        file.write(b"second")
    assert names(tmp_path) == ["a.txt", "b.txt"]


def test_only_what_killed_processes_left_is_swept(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "model.safetensors"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "open\n"
        (tmp_path / ".edk-notes.tmp").write_text("a person's own")
        assert sweep(tmp_path) == []
        assert len(names(tmp_path)) == 2
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert len(sweep(tmp_path)) == 1
    assert names(tmp_path) == [".edk-notes.tmp"]
    assert sweep(tmp_path / "no folder") == []


def test_folders_of_killed_processes_are_swept_and_links_to_folders_stay(tmp_path):
    gone = subprocess.run(
        [sys.executable, "-c", FOLDER, tmp_path], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "weights").write_text("a person's own")
    link = tmp_path / Path(gone).name.replace(".tmp", "0.tmp")
    link.symlink_to(tmp_path / "kept")
    assert sweep(tmp_path) == [Path(gone)]
    assert (tmp_path / "kept" / "weights").read_text() == "a person's own"


def test_files_of_other_machines_are_left_for_a_day(tmp_path):
    path = tmp_path / f".edk-{'f' * 16}-1-1-{'0' * 16}.tmp"
    path.write_text("x")
    assert sweep(tmp_path) == []
    old = path.stat().st_mtime - 25 * 3600
    os.utime(path, (old, old))
    assert sweep(tmp_path) == [path]


def test_a_process_is_known_by_its_start_and_not_by_its_id():
    me = identity.this_process()
    assert me.is_sure
    assert identity.is_running(me) is True
    assert identity.Process.from_json(me.to_json()) == me
    stranger = identity.Process(me.place, me.pid, "1")
    assert identity.is_running(stranger) is False
    assert identity.is_running(identity.Process("0" * 16, me.pid, me.started)) is None
    assert identity.is_running(identity.Process("", me.pid, me.started)) is None


@pytest.mark.parametrize("pid", [None, "7", -1, 0, True, 1.5, 1 << 40, [7]])
def test_a_record_without_a_process_names_none(pid):
    assert identity.Process.from_json({"pid": pid, "place": "a", "started": "1"}) is None


def test_a_record_of_an_older_version_is_never_sure():
    record = {"pid": os.getpid(), "start_time": 1700000000.0, "host": "here"}
    assert not identity.Process.from_json(record).is_sure


def test_a_zombie_has_ended():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    known = identity.identify(child.pid)
    assert identity.is_running(known) is True
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has collected it
    assert identity.is_running(known) is False
    child.wait()


def test_where_the_system_hides_its_boot_no_identity_is_sure(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "PROC", Path(tmp_path))
    identity._place.cache_clear()
    try:
        assert not identity.identify(os.getpid()).is_sure
    finally:
        monkeypatch.undo()
        identity._place.cache_clear()
