"""Small files with anything in them: the answer is one KitError or a value that can be used, and nothing is written.

Hypothesis damages good files and makes bad ones, a bounded number of times and the same ones on every machine.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_hostile import tree_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from everydream_kit.config import TrainConfig
from everydream_kit.errors import KitError
from everydream_kit.everydream2.optimizer_file import import_optimizer_file
from everydream_kit.everydream2.validation_file import import_validation_file
from everydream_kit.foreign import Origin, read_origin, require_given, split_settings, write_origin
from everydream_kit.jobs import Job
from everydream_kit.models.adapters import read_adapter_file
from everydream_kit.models.lora.adapter_settings import LoraSettings
from everydream_kit.models.part_configs import scheduler_values, text_encoder_values
from everydream_kit.models.tokenizer import read_vocabulary
from everydream_kit.params import parameters, parse_text
from everydream_kit.runs import RunFolder
from everydream_kit.runs.layout import RESUME_MANIFEST
from everydream_kit.runs.resume_state import RESTORE_ERRORS, check_state
from everydream_kit.settings import give_again, load_config, upgrade
from everydream_kit.training.checkpoints import verify_checkpoint
from everydream_kit.training.reports import Averages, LossLog
from everydream_kit.training.validation import LossCurve

BOUNDED = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
HOSTILE = st.sampled_from(
    [
        *(
            None,
            True,
            False,
            0,
            -1,
            2**63,
            10**19,
            0.5,
            -0.0,
            1e308,
            "",
            "..",
            "../../x",
            "/etc/passwd",
            "a\x00b",
            "\u202e",
        ),
        *(
            "evil.Plugin",
            "..x",
            "hf://stranger/x",
            "x" * 5000,
            [],
            {},
            [[]],
            [None] * 50,
            {"": 0},
            {"__class__": "evil"},
        ),
    ]
)
JSON = st.recursive(
    HOSTILE | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
BYTES = st.sampled_from(
    [
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": ' + b"9" * 6000 + b"}",
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b"null",
        b'"a"',
        b"[]",
    ]
) | st.binary(max_size=60)

CONFIG = json.loads(TrainConfig(resume_ckpt="embedded", lr=1e-5, plugins=["a.B"], push_to="me/jets").to_json())
STATE = {
    "position": {"step": 20, "epoch": 1, "step_in_epoch": 5, "images": 80},
    "seed": 5,
    "num_pictures": 12,
    "versions": {"torch": "2"},
    "listeners": {"loss_log": {"since_log": vars(Averages()), "epoch": vars(Averages())}},
}
MANIFEST = {"version": 1, "files": {"resume/state.json": {"bytes": 2, "sha256": "0" * 64}}}
ORIGIN = {"version": 1, "source": "hf://a/b", "commit": "c", "reference": "hf://a/b", "asked": {"data_root": "/x"},
          "waiting": {"push_every": 2}, "given": []}  # fmt: skip
ADAPTER = {"version": 1, "base": {"source": "a/b"}, "lora": {"rank": 4, "alpha": 4.0, "targets": ["to_q"]}}
SCHEDULER = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "trained_betas": None}
TEXT_ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "hidden_act": "gelu", "_attn_implementation": "a/b"}
SPECIAL = {"pad_token": {"content": "!"}, "bos_token": "a"}
STATUS = {"state": "running", "pid": 1, "host": "x", "heartbeat": 1.0, "step": 1, "process_started": 1.0}
CURVE = {"values": [[1, 0.5]], "best_loss": 0.5, "best_step": 1, "num_since_best": 0}
OPTIMIZER = {"base": {"optimizer": "adamw", "lr": 1e-6, "betas": [0.9, 0.99]}, "unet_freezing": {"train": ["attn2"]}}
VALIDATION = {"val_split_mode": "automatic", "auto_split_proportion": 0.2, "extra_manual_datasets": {"a": "b"}}


@st.composite
def damaged(draw: Any, good: Any) -> bytes:
    """A good value with one to three places replaced, removed or added to; now and then no JSON at all."""
    if draw(st.integers(0, 9)) == 0:
        return bytes(draw(BYTES))
    value = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        place = value
        while isinstance(place, (dict, list)) and place:
            keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw(st.sampled_from(keys))
            inner = place[key]
            if not isinstance(inner, (dict, list)) or not inner or draw(st.booleans()):
                if isinstance(place, dict) and draw(st.integers(0, 4)) == 0:
                    del place[key]
                else:
                    place[key] = draw(JSON)
                break
            place = inner
    return json.dumps(value).encode()


def answers(read: Callable[[], Any], *allowed: type[BaseException]) -> Any:
    """What reading gives, or None for an error in words; anything else escapes and fails the test."""
    try:
        return read()
    except (KitError, *allowed) as error:
        assert "Traceback" not in str(error)
        return None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "logs" / "jets-20261128-120000"
    (folder / "ckpts").mkdir(parents=True)
    (folder.parent / "mine.txt").write_text("mine")
    return folder


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@BOUNDED
@given(damaged(CONFIG))
def test_configs(place: Path, content: bytes) -> None:
    path = written(place / "config", "config.json", content)
    before = tree_of(place.parent)
    found = answers(lambda: load_config(path))
    assert found is None or isinstance(found[0], TrainConfig)
    raw = answers(lambda: upgrade(json.loads(content))[0], ValueError, RecursionError, AttributeError)
    if isinstance(raw, dict):
        kept, asked, waiting = split_settings(raw)
        assert not kept.keys() & (asked.keys() | waiting.keys())
        assert kept.get("plugins", []) == []
        assert kept.get("push_to") is None
    assert tree_of(place.parent) == before


@BOUNDED
@given(
    damaged(ORIGIN), damaged(CONFIG), st.dictionaries(st.sampled_from(["data_root", "push_to", "lr"]), JSON, max_size=3)
)
@example(json.dumps({**ORIGIN, "asked": {"": None}}).encode(), json.dumps(CONFIG).encode(), {})
@example(json.dumps({**ORIGIN, "waiting": {"": None}}).encode(), json.dumps(CONFIG).encode(), {"data_root": "/y"})
def test_marks_of_fetched_runs(place: Path, origin: bytes, config: bytes, changes: dict[str, Any]) -> None:
    folder = place / "fetched"
    written(folder, "config.json", config)
    written(folder, "origin.json", origin)
    mark = answers(lambda: read_origin(folder))
    assert mark is None or isinstance(mark, Origin)
    answers(lambda: give_again(folder, changes))
    answers(lambda: load_config(folder / "config.json"))
    assert {path.name for path in folder.iterdir()} == {"config.json", "origin.json"}
    assert (place.parent / "mine.txt").read_text() == "mine"


@BOUNDED
@given(st.dictionaries(st.text(max_size=10), JSON, max_size=4), st.text(max_size=30))
def test_a_mark_comes_back_as_it_was_written(place: Path, asked: dict[str, Any], source: str) -> None:
    folder = place / "mark"
    folder.mkdir(exist_ok=True)
    origin = Origin(source, "c", source, asked)
    answers(lambda: write_origin(folder, origin), UnicodeEncodeError)
    answers(lambda: require_given(origin))


@BOUNDED
@given(damaged(MANIFEST), damaged(STATE))
def test_manifests_and_states(place: Path, manifest: bytes, state: bytes) -> None:
    folder = place / "ckpts" / "jets-ep01-gs00020"
    written(folder, RESUME_MANIFEST, manifest)
    written(folder, "resume/state.json", state)
    before = tree_of(place.parent)
    answers(lambda: verify_checkpoint(folder))
    held = answers(lambda: json.loads(state), ValueError, RecursionError)
    if isinstance(held, dict) and answers(lambda: check_state(held, folder) or True):
        answers(lambda: LossLog(1).restore(held["listeners"].get("loss_log", {})), *RESTORE_ERRORS)
    assert tree_of(place.parent) == before


@BOUNDED
@given(damaged(STATUS), BYTES | damaged({"action": "stop", "id": "x"}), BYTES | damaged([{"kind": "loss", "step": 1}]))
def test_control_files_events_and_statuses(place: Path, status: bytes, control: bytes, events: bytes) -> None:
    folder = place / "run"
    written(folder, "config.json", b"{}")
    written(folder, "status.json", status)
    written(folder, "job.json", status)
    written(folder, "control.json", control)
    written(folder, "events.jsonl", events + b"\n")
    run = RunFolder(folder)
    answers(run.status)
    answers(lambda: Job(folder).status())
    answers(run.pending_action)
    answers(lambda: list(run.events()))
    answers(lambda: list(run.events("loss")))
    answers(run.take_request)
    assert (place.parent / "mine.txt").read_text() == "mine"


@BOUNDED
@given(damaged(ADAPTER), damaged(SCHEDULER), damaged(TEXT_ENCODER), damaged(SPECIAL))
def test_files_of_model_folders(place: Path, adapter: bytes, scheduler: bytes, encoder: bytes, special: bytes) -> None:
    folder = place / "model"
    written(folder, "adapter.json", adapter)
    written(folder, "tokenizer/vocab.json", b'{"a": 0}')
    written(folder, "tokenizer/merges.txt", b"#version: 0.2\n")
    written(folder, "tokenizer/special_tokens_map.json", special)
    before = tree_of(place.parent)
    note = answers(lambda: read_adapter_file(folder))
    answers(lambda: LoraSettings.from_json(note["lora"]) if note and "lora" in note else None)
    answers(lambda: read_vocabulary(folder / "tokenizer"))
    for content, check in ((scheduler, lambda value: scheduler_values(value, "x")), (encoder, text_encoder_values)):
        value = answers(lambda content=content: json.loads(content), ValueError, RecursionError)
        if isinstance(value, dict):
            kept = answers(lambda check=check, value=value: check(value))
            assert kept is None or check is not text_encoder_values or "_attn_implementation" not in kept
    assert tree_of(place.parent) == before


@BOUNDED
@given(damaged(OPTIMIZER), damaged(VALIDATION), damaged(CURVE))
def test_side_files_and_curves(place: Path, optimizer: bytes, validation: bytes, curve: bytes) -> None:
    answers(lambda: import_optimizer_file(written(place / "side", "optimizer.json", optimizer)))
    answers(lambda: import_validation_file(written(place / "side", "validation.json", validation)))
    answers(lambda: LossCurve.restore(json.loads(curve)), *RESTORE_ERRORS, RecursionError)


@BOUNDED
@given(
    st.sampled_from([record.name for record in parameters()]),
    BYTES.map(lambda text: text.decode("latin-1")) | st.text(),
)
def test_flags(name: str, text: str) -> None:
    answers(lambda: parse_text(name, text))
    answers(lambda: TrainConfig(**{"resume_ckpt": "embedded", name: parse_text(name, text)}))
