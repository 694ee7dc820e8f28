"""Jobs from outside: real detached processes (a double of the trainer), a real run folder, real signals."""

import errno
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from everydream_kit import jobs
from everydream_kit.errors import ConfigError, JobError
from everydream_kit.hosts import count_cores
from everydream_kit.identity import identify
from everydream_kit.locks import hold, is_held
from everydream_kit.runs import RunFolder

DOUBLE = str(Path(__file__).parents[1] / "fakes" / "trainer_double.py")


def double(*options: object) -> list[str]:
    return [sys.executable, DOUBLE, "{run}", *map(str, options)]


@pytest.fixture
def settings(tmp_path):
    return {"resume_ckpt": "embedded", "project_name": "jets", "logdir": str(tmp_path / "logs")}


@pytest.fixture
def started(settings):
    """Starts jobs that are ended with the test."""
    running = []

    def start(*options, **keywords):
        running.append(jobs.start(settings, command=double(*options), **keywords))
        return running[-1]

    yield start
    for job in running:
        if job.is_alive():
            job.kill()


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_a_started_job_runs_detached_to_its_end_and_leaves_everything_in_its_folder(started):
    job = started("--steps", 6, "--seconds-a-step", 0.02)
    assert os.getsid(json.loads((job.folder / "job.json").read_text())["pid"]) != os.getsid(0)
    seen = []
    status = job.watch(lambda s: seen.append(s["step"]), interval_seconds=0.02)
    assert (status["state"], status["step"], status["alive"]) == ("finished", 6, False)
    assert seen == sorted(seen)
    assert job.run.log_tail()[-1] == "step 6"
    assert json.loads((job.folder / "config.json").read_text())["project_name"] == "jets"


@pytest.mark.parametrize(("own", "expected"), [(None, str(max(1, count_cores() - 1))), ("7", "7")])
def test_a_job_leaves_a_core_to_the_notebook_unless_the_variable_is_set(settings, monkeypatch, own, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    program = "import os; print('threads:', os.environ.get('OMP_NUM_THREADS'))"
    job = jobs.start(settings, command=[sys.executable, "-c", program])
    job.wait()
    assert job.run.log_tail() == [f"threads: {expected}"]


def test_settings_are_checked_before_anything_is_made(settings):
    with pytest.raises(ConfigError, match="lr: must be greater than 0"):
        jobs.start({**settings, "lr": -1.0}, command=double())
    assert not Path(settings["logdir"]).exists()


def test_a_second_start_of_the_same_project_is_refused_while_it_runs(started):
    job = started("--steps", 400)
    with pytest.raises(JobError, match="being trained already"):
        started()
    with pytest.raises(JobError, match="in progress already"):
        jobs.resume(job.folder, command=double())
    other = started("--steps", 1, allow_parallel=True)
    assert other.folder != job.folder


def test_two_starts_at_once_are_kept_apart_by_the_lock(settings):
    Path(settings["logdir"]).mkdir()
    lock = Path(settings["logdir"]) / ".jets.starting"
    with hold(lock, ""), pytest.raises(JobError, match="another start is under way"):
        jobs.start(settings, command=double())
    lock.touch()  # left behind by a machine that was switched off
    jobs.start(settings, command=double("--steps", 1)).watch(interval_seconds=0.02)
    assert not is_held(lock)


def test_a_lock_ends_with_its_holder(tmp_path):
    lock = tmp_path / "lock"
    program = f"""
import sys
from pathlib import Path
from everydream_kit.locks import hold
with hold(Path({str(lock)!r}), ""):
    print("held", flush=True)
    sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        assert is_held(lock)
        with pytest.raises(JobError, match="somebody has it"), hold(lock, "somebody has it"):
            pass
        holder.kill()
    assert not is_held(lock)
    with hold(lock, ""):
        assert is_held(lock)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_disk_without_locks_is_a_warning(tmp_path, monkeypatch, caplog, number):
    def refuse(*how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold(tmp_path / "lock", ""):
        assert f"this disk keeps no locks ([Errno {number}]" in caplog.text
        assert "start one run at a time" in caplog.text


def test_a_folder_that_takes_no_lock_file_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match="file: cannot be written"), hold(tmp_path / "file" / "lock", ""):
        pass


def test_stop_saves_and_resume_goes_on_where_it_stopped(started):
    job = started("--steps", 400, "--seconds-a-step", 0.02)
    wait_until(lambda: job.status()["step"] >= 3)
    assert job.stop(timeout_seconds=60)
    status = job.status()
    assert status["state"] == "stopped"
    assert list((job.folder / "ckpts").glob("last-*"))
    resumed = jobs.resume(job.folder, command=double("--steps", status["step"] + 2, "--seconds-a-step", 0.02))
    assert resumed.watch(interval_seconds=0.02)["state"] == "finished"
    assert resumed.status()["step"] == status["step"] + 2


def test_stop_before_the_trainer_can_listen_counts_as_stopped(settings):
    job = jobs.start(settings, command=[sys.executable, "-c", "import time; time.sleep(60)"])
    assert job.stop(timeout_seconds=60)
    assert job.status()["state"] == "stopped"


def test_kill_ends_the_process_and_its_children(settings):
    sleeper = "import time; time.sleep(60)"
    family = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleeper!r}]); {sleeper}"
    job = jobs.start(settings, command=[sys.executable, "-c", family])
    pid = json.loads((job.folder / "job.json").read_text())["pid"]
    wait_until(lambda: psutil.Process(pid).children())
    child = psutil.Process(pid).children()[0]
    job.kill()
    assert not job.is_alive()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    with pytest.raises(JobError, match="not in progress"):
        job.kill()


def test_a_process_that_was_killed_is_recognized_and_says_so(started):
    job = started("--steps", 400, "--die-at", 3, "--seconds-a-step", 0.02)
    status = job.watch(interval_seconds=0.02)
    assert status["state"] == "died"
    assert "signal 9" in status["message"] and "step 2" in status["message"]


def test_a_failed_run_keeps_its_own_message(started):
    status = started("--fail-at", 2, "--seconds-a-step", 0.02).watch(interval_seconds=0.02)
    assert (status["state"], status["message"]) == ("failed", "no images")


def test_a_reused_process_id_is_not_taken_for_the_job(started):
    job = started("--steps", 1)
    job.watch(interval_seconds=0.02)
    record = json.loads((job.folder / "job.json").read_text())
    (job.folder / "job.json").write_text(json.dumps({**record, "pid": os.getpid()}))
    (job.folder / "status.json").unlink()
    assert not job.is_alive()


def test_a_run_on_another_machine_is_alive_by_its_heartbeat(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    status = {"state": "running", "pid": 1, "host": "another", "heartbeat": time.time()}
    (tmp_path / "status.json").write_text(json.dumps(status))
    job = jobs.attach(tmp_path)
    assert job.is_alive()
    with pytest.raises(JobError, match="another machine"):
        job.kill()
    (tmp_path / "status.json").write_text(json.dumps({**status, "heartbeat": time.time() - 3600}))
    assert not job.is_alive()


def test_an_interrupt_only_detaches_the_watcher(started):
    job = started("--steps", 400)

    def interrupt(status):
        raise KeyboardInterrupt

    assert job.watch(interrupt)["alive"]
    assert job.is_alive()


def test_the_run_outlives_the_process_that_started_it(settings):
    script = (
        f"from everydream_kit import jobs; print(jobs.start({settings!r}, "
        f"command={double('--steps', 30, '--seconds-a-step', 0.05)!r}).folder)"
    )
    starter = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    job = jobs.attach(starter.stdout.strip())
    assert job.is_alive()
    assert job.watch(interval_seconds=0.05)["state"] == "finished"


def test_requests_reach_the_trainer(started):
    job = started("--steps", 400)
    wait_until(lambda: job.status()["step"] >= 1)
    job.request("save")
    wait_until(lambda: list((job.folder / "ckpts").glob("jets-*")))
    with pytest.raises(JobError, match="no such request"):
        job.request("dance")


def test_attach_refuses_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(JobError, match="not a run folder"):
        jobs.attach(tmp_path)


def test_of_a_progress_bar_the_log_shows_only_the_latest_state(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "train.log").write_bytes(b"begin\n10%\r20%\r30%\nend\n")
    assert jobs.attach(tmp_path).run.log_tail() == ["begin", "30%", "end"]


def test_a_line_after_a_progress_bars_unfinished_state_stands_alone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    bar = "epoch 1:  25%|##5       | 6/24 [00:02<00:07, 2.50step/s, loss 0.1, 9 images/s]"
    (tmp_path / "train.log").write_text(f"  0%|          | 0/24 [00:00<?, ?step/s]0.37 s a step\n{bar}\n")
    assert jobs.attach(tmp_path).run.log_tail() == ["0.37 s a step", bar]


def test_a_queue_trains_its_configs_one_after_the_other(settings, tmp_path):
    configs = [{**settings, "project_name": name} for name in ("one", "two")]
    queue = jobs.start_queue(configs, tmp_path / "queue.json", command=double("--steps", 3, "--seconds-a-step", 0.01))
    with pytest.raises(JobError, match="running already"):
        jobs.start_queue(configs, tmp_path / "queue.json")
    wait_until(lambda: not queue.is_alive(), 30)
    assert [entry["state"] for entry in queue.entries] == ["finished", "finished"]
    assert [Path(entry["run"]).name[:3] for entry in queue.entries] == ["one", "two"]


def test_a_stopped_queue_starts_no_further_run(settings, tmp_path):
    configs = [{**settings, "project_name": name} for name in ("one", "two")]
    queue = jobs.start_queue(configs, tmp_path / "queue.json", command=double("--steps", 900))
    wait_until(lambda: queue.entries[0]["state"] == "running", 20)
    wait_until(lambda: jobs.attach(queue.entries[0]["run"]).status()["step"] > 0)
    queue.stop()
    wait_until(lambda: not queue.is_alive(), 20)
    assert [entry["state"] for entry in queue.entries] == ["stopped", "waiting"]


def test_a_queue_is_added_to_moved_and_thinned_while_it_works(settings, tmp_path):
    queue = jobs.Queue(tmp_path / "queue.json")
    with pytest.raises(JobError, match="The queue is empty"):
        queue.start()
    first = queue.add({**settings, "project_name": "first"})
    queue.start(command=double("--steps", 900))
    wait_until(lambda: queue.entries[0].get("run"), 20)
    second, third, fourth = (queue.add({**settings, "project_name": name}) for name in ("second", "third", "fourth"))
    queue.move(fourth, -2)
    queue.remove(third)
    assert [entry["id"] for entry in queue.entries] == [first, fourth, second]
    queue.move(fourth, 1)
    assert [entry["id"] for entry in queue.entries] == [first, second, fourth]
    with pytest.raises(JobError, match="being trained"):
        queue.remove(first)
    with pytest.raises(JobError, match="queued entries"):
        queue.move(first, 1)
    with pytest.raises(JobError, match="no longer in the queue"):
        queue.remove(third)
    with pytest.raises(ConfigError, match="lr"):
        queue.add({**settings, "lr": -1})
    queue.stop()
    wait_until(lambda: not queue.is_alive(), 20)
    assert [entry["state"] for entry in queue.entries] == ["stopped", "waiting", "waiting"]


def test_a_queue_waits_for_a_run_in_progress_of_the_same_project(started, settings, tmp_path):
    job = started("--steps", 400)
    wait_until(lambda: job.status()["step"] > 0)
    queue = jobs.start_queue([settings], tmp_path / "queue.json", command=double("--steps", 2))
    wait_until(lambda: queue.entries[0]["state"] == "starting", 20)
    assert queue.entries[0]["run"] is None
    job.stop(timeout_seconds=60)
    wait_until(lambda: queue.entries[0]["state"] == "finished", 20)


def test_a_queue_that_was_killed_goes_on_with_what_waits(settings, tmp_path):
    configs = [{**settings, "project_name": name} for name in ("one", "two")]
    queue = jobs.start_queue(configs, tmp_path / "queue.json", command=double("--steps", 900))
    wait_until(lambda: queue.entries[0].get("run"), 20)
    for pid in (queue.path.with_suffix(".job.json"), Path(queue.entries[0]["run"]) / "job.json"):
        psutil.Process(json.loads(pid.read_text())["pid"]).kill()
    wait_until(lambda: not queue.is_alive(), 20)
    queue.start(command=double("--steps", 2))
    wait_until(lambda: queue.entries[1]["state"] == "finished", 20)
    wait_until(lambda: not queue.is_alive(), 20)
    assert queue.entries[0]["state"] == "died"


def test_a_program_that_cannot_be_started_is_one_clear_error(settings):
    with pytest.raises(JobError, match="could not be started"):
        jobs.start(settings, command=["/no/such/program"])


def test_a_stop_signal_alone_is_enough(started):
    job = started("--steps", 400)
    wait_until(lambda: job.status()["step"] >= 1)
    os.kill(json.loads((job.folder / "job.json").read_text())["pid"], signal.SIGTERM)
    wait_until(lambda: not job.is_alive())
    assert job.status()["state"] == "stopped"


BROKEN_QUEUES = {
    "stray comma": ('{"entries": [\n{},]}', r"line 2, column \d+: not valid JSON"),
    "a list": ("[]", "holds a list"),
    "entries are none": ('{"entries": {}}', "entries: holds an object"),
    "an entry is a text": ('{"entries": ["jets.json"]}', "entry 1: holds a text"),
    "no id": ('{"entries": [{"state": "waiting", "settings": {"given": []}}]}', "entry 1: id must be a text"),
    "no settings": ('{"entries": [{"id": "a", "state": "waiting"}]}', "entry 1: settings must be an object"),
    "command": ('{"command": "rm -rf", "entries": []}', "command: must be null or a list"),
    "empty": ("", "line 1, column 1"),
}


@pytest.mark.parametrize(("text", "words"), BROKEN_QUEUES.values(), ids=BROKEN_QUEUES)
def test_a_broken_queue_is_refused_and_left_as_it_is(tmp_path, settings, text, words):
    queue = jobs.Queue(tmp_path / "queue.json")
    queue.path.write_text(text)
    tries = (
        lambda: queue.add(settings),
        lambda: queue.entries,
        lambda: queue.remove("a"),
        lambda: queue.move("a", 1),
        queue.start,
    )
    for one in tries:
        with pytest.raises(JobError, match=rf"queue\.json.*{words}"):
            one()
    assert queue.path.read_text() == text


def test_a_queue_that_is_broken_while_it_works_waits_until_it_is_fixed(settings, tmp_path):
    queue = jobs.Queue(tmp_path / "queue.json")
    first = queue.add({**settings, "project_name": "first"})
    second = queue.add({**settings, "project_name": "second"})
    queue.start(command=double("--steps", 20, "--seconds-a-step", 0.05))
    wait_until(lambda: queue.entries[0]["state"] == "running")
    whole = queue.path.read_text()
    queue.path.write_text(whole.replace('"entries"', '"entries', 1))
    log = queue.path.with_suffix(".log")
    wait_until(lambda: "The queue waits until the file can be read again." in log.read_text())
    assert queue.is_alive()
    queue.path.write_text(whole)
    wait_until(lambda: not queue.is_alive())
    assert {entry["id"]: entry["state"] for entry in queue.entries} == {first: "finished", second: "finished"}


def test_a_strangers_process_is_neither_taken_for_the_run_nor_killed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        known = identify(stranger.pid)
        older = {"pid": stranger.pid, "host": platform.node(), "start_time": psutil.Process(stranger.pid).create_time()}
        earlier = {**known.to_json(), "started": str(int(known.started) - 300)}
        for record in (older, earlier, {"pid": stranger.pid}):
            for name in ("job.json", "status.json"):
                (tmp_path / name).write_text(json.dumps({**record, "state": "running", "heartbeat": time.time()}))
            job = jobs.Job(tmp_path)
            assert not job.is_alive()
            with pytest.raises(JobError, match="not in progress"):
                job.kill()
            with pytest.raises(JobError, match="not in progress"):
                job.stop()
        assert stranger.poll() is None
        stranger.communicate(b"\n")


def test_without_a_sure_identity_a_run_that_holds_its_lock_is_alive_and_is_not_signalled(tmp_path):
    status = {"state": "running", "pid": os.getpid(), "host": platform.node(), "heartbeat": time.time()}
    (tmp_path / "status.json").write_text(json.dumps(status))
    job = jobs.Job(tmp_path)
    assert not job.is_alive()
    with hold(RunFolder(tmp_path).lock_path, ""):
        assert job.is_alive()
        with pytest.raises(JobError, match="not known for certain from here"):
            job.kill()
        job.stop()
        assert json.loads((tmp_path / "control.json").read_text())["action"] == "stop"
