"""A run of a stranger on the Hub: what it may bring, what is requested again, and what it must not touch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_hostile import run_of, serve, stranger_files, tree_of, with_config, with_files, with_manifest
from hub_runs import make_run
from hub_stand_in import HubStandIn, use_as_hub

from everydream_kit import jobs
from everydream_kit.cli import main
from everydream_kit.errors import CheckpointError, ConfigError, HubError, KitError
from everydream_kit.export.hub import fetch_run
from everydream_kit.foreign import ASKED, read_origin, split_settings
from everydream_kit.runs import RunFolder
from everydream_kit.settings import give_again, load_config

SOURCE = "hf://stranger/jets"
ASKED_VALUES: dict[str, Any] = {
    "resume_ckpt": "stranger/base",
    "base_revision": "evil",
    "base_subfolder": "../..",
    "base_variant": "evil",
    "vae": "/etc/vae",
    "data_root": "/etc",
    "latent_cache_dir": "/tmp/elsewhere",
    "optimizer": "os.getcwd",
    "optimizer_config": {"base": {"optimizer": "evil.Optimizer"}},
    "unet_optimizer": "evil.Optimizer",
    "text_encoder_optimizer": "evil.Optimizer",
    "unet_train_layers": ["(a+)+$"],
    "unet_freeze_layers": [".*" * 9],
    "validation_data_root": "/home",
    "validation_extra_data_roots": {"mine": "/home"},
    "lora_targets": ["(a+)+$"],
    "ema_device": "meta",
    "ema_resume_model": "stranger/ema",
    "sample_prompts": "/etc/passwd",
    "validation_config": {"extra_manual_datasets": {"mine": "/home"}},
    "save_ckpt_dir": "/tmp/elsewhere",
    "push_to": "victim/best-model",
    "wandb": True,
    "plugins": ["evil.Plugin"],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return stranger_files(tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubStandIn]:
    with HubStandIn(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def hub(server: HubStandIn) -> HubStandIn:
    server.repos.clear()
    server.requests.clear()
    return server


def fetch(hub: HubStandIn, target: Path, source: str = SOURCE, **options: Any) -> Path:
    from huggingface_hub import HfApi

    return fetch_run(source, target, api=HfApi(endpoint=hub.url), sleep=lambda _: None, **options)


def test_every_dangerous_setting_has_a_hostile_value_here() -> None:
    assert ASKED_VALUES.keys() == ASKED.keys()


@pytest.mark.parametrize(("name", "value"), ASKED_VALUES.items())
def test_a_setting_that_names_something_outside_is_asked_for_again(
    hub: HubStandIn, files: dict[str, bytes], tmp_path: Path, name: str, value: Any
) -> None:
    serve(hub, "stranger/jets", with_config(files, **{name: value}))
    given = dict.fromkeys(ASKED.keys() - {name})
    with pytest.raises(ConfigError, match=rf"(?s){name} .*everydream resume hf://stranger/jets.*--{name} VALUE"):
        fetch(hub, tmp_path / "logs", given=given)
    assert not any("model.safetensors" in path for _, path, _ in hub.requests)


def test_what_is_fetched_without_a_persons_word_is_marked_and_cannot_be_used(
    hub: HubStandIn, files: dict[str, bytes], tmp_path: Path
) -> None:
    serve(hub, "stranger/jets", with_config(files, **ASKED_VALUES))
    folder = fetch(hub, tmp_path / "logs")
    written = json.loads((folder / "config.json").read_text())
    assert not [name for name, value in ASKED_VALUES.items() if written[name] == value]
    with pytest.raises(ConfigError) as caught:
        load_config(folder / "config.json")
    assert all(f"\n  {name} " in str(caught.value) for name in ASKED)


def test_a_run_is_fetched_by_a_command_of_its_own(
    hub: HubStandIn,
    files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_as_hub(monkeypatch, hub)
    serve(hub, "stranger/jets", files)
    assert main(["fetch", SOURCE, str(tmp_path / "runs")]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert folder.parent == tmp_path / "runs"
    (checkpoint,) = RunFolder(folder).checkpoints()
    assert read_origin(folder) is not None and checkpoint.state_path.is_file()
    assert main(["fetch", "hf://stranger", str(tmp_path / "runs")]) == 1
    assert "is written hf://owner/name" in capsys.readouterr().err


def test_what_shapes_the_training_travels_and_the_rest_is_given_once(
    hub: HubStandIn, files: dict[str, bytes], tmp_path: Path
) -> None:
    serve(hub, "stranger/jets", with_config(files, push_to="stranger/jets", push_every=3, optimizer="lion"))
    given = {"data_root": "mine", "resume_ckpt": "me/base", "push_to": "me/jets", "lr": 1.0}
    folder = fetch(hub, tmp_path / "logs", given=given)
    assert give_again(folder, given) == {"lr": 1.0}
    config, _ = load_config(folder / "config.json")
    assert (config.data_root, config.resume_ckpt, config.push_to, config.push_every) == (
        "mine",
        "me/base",
        "me/jets",
        3,
    )
    assert (config.resolution, config.lr, config.optimizer) == (128, 2e-6, "lion")
    assert Path(config.logdir) == tmp_path / "logs"
    origin = read_origin(folder)
    assert origin is not None
    assert (origin.source, origin.asked) == (SOURCE, {})
    assert origin.given == ["data_root", "push_to", "resume_ckpt"]


def test_single_files_of_a_fetched_run_stay_in_its_folder(
    hub: HubStandIn, files: dict[str, bytes], tmp_path: Path
) -> None:
    serve(hub, "stranger/jets", with_config(files, save_ckpt_dir=None))
    folder = fetch(hub, tmp_path / "logs")
    assert json.loads((folder / "config.json").read_text())["save_ckpt_dir"] == str(folder)


@pytest.mark.parametrize(
    ("name", "value", "travels"),
    [
        ("optimizer", "adamw8bit", True),
        ("optimizer", "torch.optim.Rprop", True),
        ("optimizer", "torch.hub.load", False),
        ("optimizer", ["os.getcwd"], False),
        ("optimizer_config", {"base": {"optimizer": "adamw", "lr": 1e-6}}, True),
        ("optimizer_config", {"text_encoder_overrides": {"optimizer": "evil.Class"}}, False),
        ("optimizer_config", {"unet_freezing": {"train": ["attn2"]}}, True),
        ("optimizer_config", {"unet_freezing": {"train": ["(a*)*b"]}}, False),
        ("optimizer_config", {"unet_freezing": {"freeze": [".*" * 9]}}, False),
        ("optimizer_config", "/etc/passwd", False),
        ("validation_config", {"auto_split_proportion": 0.2}, True),
        ("validation_config", {"val_data_root": "/home"}, False),
        ("unet_train_layers", ["attn2"], True),
        ("text_encoder_optimizer", "lion8bit", True),
        ("lora_targets", ["to_q", r"attn2.*\.(to_k|to_v)"], True),
        ("ema_device", "cuda", True),
        ("plugins", [], True),
        ("wandb", False, True),
        ("wandb", 0, False),
        ("data_root", "input", True),
        ("resume_ckpt", "embedded", True),
        ("resume_ckpt", "findlast", False),
    ],
)
def test_only_harmless_values_travel(name: str, value: Any, travels: bool) -> None:
    kept, asked, _ = split_settings({name: value})
    assert (name in kept, name in asked) == (travels, not travels)


def test_the_queue_and_jobs_obey_the_mark(hub: HubStandIn, files: dict[str, bytes], tmp_path: Path) -> None:
    serve(hub, "stranger/jets", with_config(files, plugins=["evil.Plugin"]))
    folder = fetch(hub, tmp_path / "logs")
    before = tree_of(folder)
    with pytest.raises(ConfigError, match="plugins "):
        jobs.resume(folder)
    with pytest.raises(ConfigError, match="plugins "):
        jobs.start(folder / "config.json")
    with pytest.raises(ConfigError, match="plugins "):
        jobs.Queue(tmp_path / "queue.json").add(folder / "config.json")
    assert tree_of(folder) == before
    assert not (tmp_path / "queue.json").exists()


def test_a_person_gives_the_settings_to_a_job(hub: HubStandIn, files: dict[str, bytes], tmp_path: Path) -> None:
    serve(hub, "stranger/jets", files)
    folder = fetch(hub, tmp_path / "logs")
    wait = [sys.executable, "-c", "pass"]
    jobs.resume(folder, changes={"data_root": "mine", "resume_ckpt": "me/base"}, command=wait).watch()
    assert load_config(folder / "config.json")[0].data_root == "mine"


def test_a_damaged_mark_is_a_mark(hub: HubStandIn, files: dict[str, bytes], tmp_path: Path) -> None:
    serve(hub, "stranger/jets", files)
    folder = fetch(hub, tmp_path / "logs")
    for text in ("", "[]", "{}", '{"asked": 3}', "[" * 100_000):
        (folder / "origin.json").write_text(text)
        with pytest.raises(ConfigError, match=r"origin\.json"):
            load_config(folder / "config.json")


def test_a_strangers_words_do_not_reach_the_terminal_as_they_are(
    hub: HubStandIn, files: dict[str, bytes], tmp_path: Path
) -> None:
    serve(hub, "stranger/jets", with_config(files, data_root="\x1b[2J\u202e" + "a" * 5000))
    with pytest.raises(ConfigError) as caught:
        fetch(hub, tmp_path / "logs", given={})
    assert all(line.isprintable() for line in str(caught.value).splitlines())
    assert len(str(caught.value)) < 1500


# Nothing of theirs runs --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"plugins": ["evil.Plugin"]}, {"optimizer": "evil.Plugin"}, {"plugins": ["unet.evil.Plugin"]}],
    ids=["plugin", "optimizer", "package in the checkpoint"],
)
@pytest.mark.parametrize("place", ["evil.py", "unet/evil.py", "resume/evil.py", "evil/__init__.py", "unet/evil.pyc"])
def test_code_in_a_checkpoint_is_neither_fetched_nor_run(
    hub: HubStandIn, files: dict[str, bytes], tmp_path: Path, settings: dict[str, Any], place: str
) -> None:
    hostile = with_config(files, **settings)
    hostile = with_manifest(hostile, lambda listed: listed.update({place: {"bytes": 4, "sha256": "0" * 64}}))
    serve(hub, "stranger/jets", hostile | {place: b"evil"})
    with pytest.raises(CheckpointError, match=r"which no checkpoint of the kit holds"):
        fetch(hub, tmp_path / "logs", given=ASKED)
    assert not list(tmp_path.rglob("*evil*"))


def test_the_command_names_every_flag_and_runs_nothing(
    hub: HubStandIn, files: dict[str, bytes], tmp_path: Path
) -> None:
    """The attack as it was found: a plug-in in the working folder's reach, and a token to read."""
    (tmp_path / "evil.py").write_text("open('ran', 'w').close()\nclass Plugin: pass\n")
    serve(hub, "stranger/jets", with_config(files, plugins=["evil.Plugin"], push_to="victim/jets"))
    done = subprocess.run(
        [sys.executable, "-m", "everydream_kit", "resume", SOURCE, "--data_root", "mine"],
        cwd=tmp_path,
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "", "PYTHONPATH": ":".join(sys.path[1:])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "--data_root VALUE --resume_ckpt VALUE --push_to VALUE --plugins VALUE" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "ran").exists()


# Nothing of mine is touched ----------------------------------------------------------------------


def test_a_repository_without_settings_is_refused(hub: HubStandIn, files: dict[str, bytes], tmp_path: Path) -> None:
    mine = make_run(tmp_path / "logs", unet_bytes=2000)
    before = tree_of(mine.folder)
    serve(hub, "stranger/jets", with_files(files, {"training/config.json": None}))
    with pytest.raises(CheckpointError, match=r"training/config\.json is missing there"):
        fetch(hub, tmp_path / "logs")
    assert tree_of(mine.folder) == before


@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_repository_that_names_my_run_does_not_touch_it(
    hub: HubStandIn, files: dict[str, bytes], tmp_path: Path, has_manifest: bool
) -> None:
    mine = make_run(tmp_path / "logs", unet_bytes=2000)
    if not has_manifest:
        (mine.last_checkpoint / "resume" / "manifest.json").unlink()
    before = tree_of(tmp_path / "logs" / mine.name)
    serve(hub, "stranger/jets", files)
    with pytest.raises(CheckpointError, match=r"already exists, and did not come from hf://stranger/jets"):
        fetch(hub, tmp_path / "logs")
    assert tree_of(mine.folder) == before


def test_a_fetched_run_is_not_joined_by_another_repository(
    hub: HubStandIn, files: dict[str, bytes], tmp_path: Path
) -> None:
    serve(hub, "stranger/jets", files)
    serve(hub, "other/jets", with_files(files, {"training/run.json": next_checkpoint(files)}))
    before = tree_of(fetch(hub, tmp_path / "logs"))
    with pytest.raises(CheckpointError, match=r"already exists, and came from hf://stranger/jets"):
        fetch(hub, tmp_path / "logs", "hf://other/jets")
    assert tree_of(run_of(tmp_path / "logs").folder) == before


def test_a_run_of_mine_is_joined_by_the_repository_that_it_pushes_to(
    hub: HubStandIn, files: dict[str, bytes], tmp_path: Path
) -> None:
    mine = make_run(tmp_path / "logs", unet_bytes=2000)
    config = {**json.loads(mine.config_path.read_text()), "push_to": "me/jets"}
    mine.config_path.write_text(json.dumps(config))
    serve(
        hub, "me/jets", with_files(files, {"training/config.json": config, "training/run.json": next_checkpoint(files)})
    )
    assert fetch(hub, tmp_path / "logs", "hf://me/jets") == mine.folder
    assert [checkpoint.step for checkpoint in mine.checkpoints()] == [20, 40]
    assert read_origin(mine.folder) is None


def test_checkpoints_of_other_settings_do_not_join_a_run(
    hub: HubStandIn, files: dict[str, bytes], tmp_path: Path
) -> None:
    serve(hub, "stranger/jets", files)
    before = tree_of(fetch(hub, tmp_path / "logs"))
    serve(hub, "stranger/jets", with_config(with_files(files, {"training/run.json": next_checkpoint(files)}), lr=1e-3))
    with pytest.raises(CheckpointError, match=r"with other settings than hf://stranger/jets \(lr\)"):
        fetch(hub, tmp_path / "logs")
    assert tree_of(run_of(tmp_path / "logs").folder) == before


def test_a_checkpoint_is_there_until_the_new_one_is_whole(
    hub: HubStandIn, files: dict[str, bytes], tmp_path: Path
) -> None:
    """The fetched run has its checkpoint without resume state; a fetch of it again fails half-way."""
    serve(hub, "stranger/jets", files)
    run = fetch(hub, tmp_path / "logs")
    manifest = run_of(tmp_path / "logs").last_checkpoint / "resume" / "manifest.json"
    manifest.unlink()
    before = tree_of(run)
    hub.fail("GET", "resolve", skip=3, status=403, times=99)
    with pytest.raises(HubError):
        fetch(hub, tmp_path / "logs")
    assert tree_of(run) == before
    hub.faults.clear()
    fetch(hub, tmp_path / "logs")
    assert manifest.is_file()
    assert [path.name for path in (run / "ckpts").iterdir()] == ["jets-ep01-gs00020"]


def next_checkpoint(files: dict[str, bytes]) -> dict[str, Any]:
    return {**json.loads(files["training/run.json"]), "checkpoint": "jets-ep02-gs00040"}


def test_a_repository_without_a_commit_is_said(hub: HubStandIn, files: dict[str, bytes], tmp_path: Path) -> None:
    from hub_holdings import Commit, Repository

    hub.repos["stranger/jets"] = Repository(False, {"main": [Commit("", "empty", {})]})
    with pytest.raises(KitError, match="no commit"):
        fetch(hub, tmp_path / "logs")


GOOD_EVENT = {"kind": "loss", "step": 5, "loss": 0.5, "lr": {"unet": 1e-6}, "epoch": 0}
EVENTS: list[tuple[Any, Any]] = [
    (GOOD_EVENT, GOOD_EVENT),
    ({**GOOD_EVENT, "evil": "x", "path": "/etc"}, GOOD_EVENT),
    ({**GOOD_EVENT, "lr": {"unet": "<img>"}}, {key: GOOD_EVENT[key] for key in ("kind", "step", "loss", "epoch")}),
    ({**GOOD_EVENT, "epoch": "x"}, {key: GOOD_EVENT[key] for key in ("kind", "step", "loss", "lr")}),
    ({**GOOD_EVENT, "step": "5"}, None),
    ({**GOOD_EVENT, "step": -5}, None),
    ({**GOOD_EVENT, "loss": "evil"}, None),
    ({"kind": "saved", "files": 3, "path": "/etc/passwd"}, None),
    ({"kind": ["loss"]}, None),
    ({"kind": "warning", "message": "\x1b[2J"}, {"kind": "warning"}),
    ({"kind": "warning", "message": "all well"}, {"kind": "warning", "message": "all well"}),
    ({"kind": "dataset", "pictures": [], "captions": {"<img>": "x"}}, {"kind": "dataset"}),
    ([], None),
    ("evil", None),
]


def test_of_a_strangers_events_only_what_tells_of_the_training_is_taken(
    hub: HubStandIn, files: dict[str, bytes], tmp_path: Path
) -> None:
    lines = [json.dumps(event) for event, _ in EVENTS] + ["{", "[" * 100_000, "NaN", ""]
    serve(hub, "stranger/jets", with_files(files, {"training/events.jsonl": "\n".join(lines) + "\n"}))
    fetch(hub, tmp_path / "logs")
    assert list(run_of(tmp_path / "logs").events()) == [kept for _, kept in EVENTS if kept is not None]
