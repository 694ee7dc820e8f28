"""The license of a base that lies on this disk reaches the card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hub_runs import make_run
from safetensors.torch import save_file

from everydream_kit.export.hub import preview_push
from everydream_kit.export.license import license_fields, local_license
from everydream_kit.runs import RunFolder


def card_of(push: Path | RunFolder) -> str:
    return preview_push(push, "me/jets").card


def start_from(run: RunFolder, base: Path | str) -> RunFolder:
    config = json.loads(run.config_path.read_text("utf-8"))
    run.config_path.write_text(json.dumps(config | {"resume_ckpt": str(base)}), "utf-8")
    return run


def test_a_base_folders_card_states_the_license(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    front = "license: other\nlicense_name: studio-license\nlicense_link: https://example.org/licence\ntags: [x]"
    (base / "README.md").write_text(f"---\n{front}\n---\n# Base\n", "utf-8")
    card = card_of(start_from(make_run(tmp_path / "logs"), base))
    assert "license: other\nlicense_name: studio-license\nlicense_link: https://example.org/licence\n" in card
    assert card.endswith("## License\n\n`studio-license`\n")


def test_a_base_files_header_states_the_license(tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    save_file({"x": torch.zeros(1)}, base, metadata={"modelspec.license": "CreativeML Open RAIL++-M License"})
    assert "\nlicense: openrail++\n" in card_of(start_from(make_run(tmp_path / "logs"), base))


def test_what_is_pushed_may_state_it_itself_and_a_given_license_wins(tmp_path: Path) -> None:
    file = tmp_path / "jets.safetensors"
    save_file({"x": torch.zeros(1)}, file, metadata={"modelspec.license": "MIT"})
    assert "\nlicense: mit\n" in card_of(file)
    assert "\nlicense: openrail\n" in preview_push(file, "me/jets", license="openrail").card


def test_the_embedded_base_and_the_base_of_a_lora_count_too(tmp_path: Path) -> None:
    assert "\nlicense: mit\n" in card_of(start_from(make_run(tmp_path / "logs"), "embedded"))
    base, lora = tmp_path / "base", tmp_path / "lora"
    for folder in (base, lora):
        folder.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n", "utf-8")
    (lora / "adapter.json").write_text(json.dumps({"base": {"source": str(base)}}), "utf-8")
    assert local_license(lora) == {"license": "apache-2.0"}


def test_a_base_on_the_hub_is_not_looked_for_on_disk(tmp_path: Path) -> None:
    run = start_from(make_run(tmp_path), "someone/base-model")
    (run.last_checkpoint / "README.md").write_text("---\nlicense: mit\n---\n", "utf-8")
    assert "Not stated." in card_of(run)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# no front matter",
        "---\nlicense: [a\n---\n",
        "---\n- a list\n---\n",
        "---\nlicense: 3\n---\n",
        "---\nlicense",
    ],
)
def test_a_card_that_states_nothing_counts_as_silence(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text, "utf-8")
    assert local_license(tmp_path) == {}


def test_damaged_or_absent_files_count_as_silence(tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "old.ckpt").write_bytes(b"x")
    (tmp_path / "adapter.json").write_text("{", "utf-8")
    for path in (tmp_path / "cut.safetensors", tmp_path / "old.ckpt", tmp_path, tmp_path / "nowhere", None):
        assert local_license(path) == {}


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("CreativeML OpenRAIL-M", {"license": "creativeml-openrail-m"}),
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("MIT License", {"license": "mit"}),
        ("CC-BY-NC-SA-4.0", {"license": "cc-by-nc-sa-4.0"}),
        (
            "Fair AI Public License 1.0-SD (https://freedevproject.org/faipl-1.0-sd/)",
            {
                "license": "other",
                "license_name": "fair-ai-public-license-1.0-sd",
                "license_link": "https://freedevproject.org/faipl-1.0-sd/",
            },
        ),
        (
            "https://example.org/terms",
            {"license": "other", "license_name": "see-link", "license_link": "https://example.org/terms"},
        ),
        ("  ", {}),
    ],
)
def test_free_text_becomes_what_the_hub_knows(text: str, fields: dict[str, str]) -> None:
    assert license_fields(text) == fields
