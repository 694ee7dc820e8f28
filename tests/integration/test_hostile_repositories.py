"""Repositories of strangers by the dozen: each is one KitError, leaves no run behind, and writes nothing elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_hostile import Content, serve, stranger_files, tree_of, with_files
from hub_stand_in import HubStandIn

from everydream_kit.errors import KitError
from everydream_kit.export.hub import fetch_run
from everydream_kit.runs.layout import RESUME_MANIFEST

DEEP = "[" * 100_000
DIGITS = b'{"max_epochs": ' + b"9" * 6000 + b"}"
RUN = {"version": 1, "run": "jets-20261122-120000", "checkpoint": "jets-ep01-gs00020"}
BAD_RUN_NAMES = (
    *("../jets-20261122-120000", "/tmp/jets-20261122-120000", "..", ".", "", ".jets-20261122-120000", "jets"),
    *(
        "a/b-20261122-120000",
        "a\\b-20261122-120000",
        "C:-20261122-120000",
        "a\n-20261122-120000",
        "\x1b-20261122-120000",
    ),
    *("\u202ejets-20261122-120000", "a" * 300 + "-20261122-120000", "jets-20261122-120000\n", "*-20261122-120000"),
    *(7, None, [], {}, True),
)
BAD_CHECKPOINT_NAMES = (
    *(
        "../jets-ep01-gs00020",
        "..",
        "best",
        "",
        ".partial-x",
        "jets-ep01-gs00020/../../x",
        "jets-ep1-gs",
        3,
        None,
        ["x"],
    ),
    *("jets-ep01-gs" + "9" * 400, "jets-ep01-gs00020_ema", "\x00-ep01-gs00020"),
)
BAD_LISTED = (
    *("../../evil.py", "/etc/cron.d/evil", "evil.py", "unet/evil.py", "unet/model.pt", "resume/optimizer.pt", "a.so"),
    *("unet/../../x.json", "unet//config.json", "./model_index.json", ".git/config", ".gitattributes", "conftest.py"),
    *("unet/model.safetensors\n", "resume/sitecustomize.py", "tokenizer/evil.json", "vae/diffusion_pytorch_model.bin"),
    *(
        "",
        " ",
        "\x00",
        "unet",
        "resume/",
        "training/config.json",
        "README.md",
        "a" * 5000,
        "\u202e.json",
        "UNET/config.json",
    ),
)
BAD_CONFIGS: tuple[Content, ...] = (
    *("", "null", "[]", '"text"', "3", DEEP, DIGITS, b"\xff\xfe\x00", b'{"lr": 1e999}', b'{"lr": NaN}', b'{"lr": 1,}'),
    {"unknown_setting": 1},
    {"version": 10**15},
    {"version": "1"},
    {"version": True},
    {"given": 5},
    {"given": [{}]},
    {"resolution": 10**15},
    {"resolution": [512] * 3 + ["x"]},
    {"lr": "fast"},
    {"lr": -1},
    {"project_name": "../../x"},
    {"project_name": "a\nb"},
    {"project_name": ["x"]},
    {"training_kind": "evil"},
    {"new_tokens": [["a"]]},
    {"background": "#zzzzzz"},
    {"max_epochs": True},
    {"timestep_start": 900, "timestep_end": 100},
    {"run_name": {"a": {}}},
    {"seed": 2**63},
)
BAD_MANIFESTS: tuple[Content, ...] = (
    *("", "[]", "null", "{}", DEEP, b"\xff", '{"files": 3}', '{"files": ["model_index.json"]}', '{"files": null}'),
    {"files": {"unet/model.safetensors": {}, "missing.json": {}}},
    {"files": {"vae/config.json": None, "scheduler/scheduler_config.json": None}},
)
WORDS = {
    "run ": "names no usable run",
    "checkpoint ": "names no usable checkpoint",
    "lists ": "which no checkpoint of the kit holds",
    "config ": r"training/config\.json",
    "manifest ": r"resume/manifest\.json",
    "large ": "no run of the kit has more than",
    "patterns": "can take forever to match",
}
"""What the error of each kind of case says, besides where it was found."""


def completed(config: Content) -> Content:
    """A config that is wrong in one way only."""
    return {"resume_ckpt": "embedded", **config} if isinstance(config, dict) else config


CASES: list[tuple[str, dict[str, Content]]] = [
    *((f"run {name!r:.40}", {"training/run.json": {**RUN, "run": name}}) for name in BAD_RUN_NAMES),
    *(
        (f"checkpoint {name!r:.40}", {"training/run.json": {**RUN, "checkpoint": name}})
        for name in BAD_CHECKPOINT_NAMES
    ),
    *((f"run.json {text!r:.20}", {"training/run.json": text}) for text in ("", "[]", "null", DEEP, b"\xff", "{}")),
    *((f"lists {name!r:.40}", {RESUME_MANIFEST: {"files": {name: {}}}, "evil": name}) for name in BAD_LISTED),
    *((f"config {str(config)[:40]}", {"training/config.json": completed(config)}) for config in BAD_CONFIGS),
    *((f"manifest {str(text)[:40]}", {RESUME_MANIFEST: text}) for text in BAD_MANIFESTS),
    ("no manifest", {RESUME_MANIFEST: None}),
    ("no run.json", {"training/run.json": None}),
    ("no config", {"training/config.json": None}),
    ("no weights", {"unet/model.safetensors": None}),
    ("large config", {"training/config.json": json.dumps({"resume_ckpt": "a" * 3_000_000})}),
    ("large run.json", {"training/run.json": json.dumps({**RUN, "a": "a" * 200_000})}),
    (
        "patterns",
        {"adapter.json": {"lora": {"targets": ["(a+)+$"]}}, RESUME_MANIFEST: {"files": {"adapter.json": {}}}},
    ),
    ("adapter", {"adapter.json": DEEP, RESUME_MANIFEST: {"files": {"adapter.json": {}}}}),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return stranger_files(tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubStandIn]:
    with HubStandIn(tmp_path_factory.mktemp("hub")) as server:
        yield server


def test_there_are_many() -> None:
    assert len({name for name, _ in CASES}) > 60


@pytest.mark.parametrize(("name", "changes"), CASES, ids=[name for name, _ in CASES])
def test_a_hostile_repository_is_one_error_and_leaves_no_run(
    hub: HubStandIn, files: dict[str, bytes], tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    from huggingface_hub import HfApi

    hub.repos.clear()
    serve(hub, "stranger/jets", with_files(files, changes))
    (tmp_path / "mine.txt").write_text("mine")
    words = next((words for kind, words in WORDS.items() if name.startswith(kind)), "")
    with pytest.raises(KitError, match=rf"(?s)stranger/jets.*{words}") as caught:
        fetch_run("hf://stranger/jets", tmp_path / "logs", api=HfApi(endpoint=hub.url), sleep=lambda _: None)
    assert all(line.isprintable() for line in str(caught.value).splitlines())
    assert len(str(caught.value)) < 3000
    left = [path for path in tree_of(tmp_path) if not path.startswith("logs/.partial-stranger--jets-")]
    assert left == ["mine.txt"]
    assert not [path for path in (tmp_path / "logs").glob("*") if not path.name.startswith(".partial-")]
