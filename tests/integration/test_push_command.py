"""`everydream push`, typed as people type it, against the Hub stand-in: each flag is seen in what arrives."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_runs import TOKEN, make_run
from hub_stand_in import HubStandIn, use_as_hub

from everydream_kit.cli import main


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    with HubStandIn(tmp_path / "hub") as server:
        server.add_user(TOKEN, "me")
        use_as_hub(monkeypatch, server)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def arrived(hub: HubStandIn, revision: str = "main") -> set[str]:
    return set(hub.files("me/jets", revision)) - {".gitattributes"}


def card(hub: HubStandIn) -> str:
    return hub.text_of("me/jets", "README.md")


def say(words: list[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        status = main([str(word) for word in words])
    except SystemExit as ended:
        status = int(ended.code or 0)
    shown = capsys.readouterr()
    return status, shown.out.strip(), shown.err


def test_a_push_from_a_shell_of_its_own(hub: HubStandIn, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    environ = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    words = ["push", str(run.folder), "me/jets", "--license", "openrail", "--message", "Jets, evening two"]
    done = subprocess.run(
        [sys.executable, "-m", "everydream_kit", *words], env=environ, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, f"{hub.url}/me/jets"), done.stderr
    assert hub.titles("me/jets")[-1] == "Jets, evening two"
    assert {"unet/model.safetensors", "samples/gs00020-000.jpg", "training/curves.png"} <= arrived(hub)
    assert "license: openrail\n" in card(hub)
    assert re.search(r"100 %  commit to me/jets", done.stderr)
    assert TOKEN not in done.stdout + done.stderr + card(hub)


def test_only_the_parts_that_are_named_go(hub: HubStandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    words = ["push", run.folder, "me/jets", "--license", "mit"]
    assert say([*words, "--what", "samples", "training"], capsys)[0] == 0
    assert {path.partition("/")[0] for path in arrived(hub)} == {"README.md", "samples", "training"}
    assert say([*words, "--what", "diffusers", "resume"], capsys)[0] == 0
    assert "resume/optimizer.safetensors" in arrived(hub)


def test_a_single_file_is_written_in_the_wanted_precision(
    hub: HubStandIn, tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors import safe_open

    words = ["push", tiny_model_folder, "me/jets", "--what", "single_file", "--precision", "bf16", "--license", "mit"]
    assert say(words, capsys)[0] == 0
    name = f"{tiny_model_folder.name}.safetensors"
    assert arrived(hub) == {"README.md", name}
    with safe_open(hub.lfs_folder / hub.sha256_of("me/jets", name), framework="pt") as file:
        assert file.get_slice("model.diffusion_model.out.2.weight").get_dtype() == "BF16"


def test_a_lora_goes_with_its_base_named(hub: HubStandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    folder = run.checkpoints_folder / "jets-ep01-gs00030"
    folder.mkdir()
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
    words = ["push", folder, "me/jets", "--what", "lora", "--base_model", "someone/other-base", "--license", "mit"]
    assert say(words, capsys)[0] == 0
    assert arrived(hub) == {"README.md", "pytorch_lora_weights.safetensors"}
    assert "base_model: someone/other-base\nbase_model_relation: adapter\n" in card(hub)


def test_a_new_repository_is_private_unless_public_is_said(
    hub: HubStandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path)
    words = ["push", run.folder, "me/jets", "--what", "training", "--license", "mit"]
    say(words, capsys)
    assert hub.repos["me/jets"].private
    say([*words, "--public"], capsys)
    assert "me/jets is private already and is not changed" in caplog.text
    say(["push", run.folder, "me/open", "--what", "training", "--license", "mit", "--public"], capsys)
    assert not hub.repos["me/open"].private


def test_a_branch_and_a_pull_request(hub: HubStandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    words = ["push", run.folder, "me/jets", "--what", "training", "--license", "mit"]
    assert say([*words, "--revision", "night-2"], capsys)[1] == f"{hub.url}/me/jets/tree/night-2"
    assert arrived(hub) == set()
    assert "training/config.json" in arrived(hub, "night-2")
    assert say([*words, "--create_pr"], capsys)[1] == f"{hub.url}/me/jets/discussions/1"
    assert arrived(hub) == set()


def test_a_dry_run_says_what_would_go_and_asks_nobody(
    hub: HubStandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    words = ["push", make_run(tmp_path).folder, "me/jets", "--dry_run", "--message", "Evening two"]
    status, text, _ = say([*words, "--public"], capsys)
    assert status == 0
    assert "to me/jets as one commit: Evening two" in text and "is created public" in text
    assert "unet/model.safetensors" in text and "resume/" not in text
    text = say([*words, "--what", "resume", "--create_pr", "--revision", "night-2"], capsys)[1]
    assert "to me/jets at night-2 as one pull request" in text and "is created" not in text
    assert "resume/optimizer.safetensors" in text and "unet/" not in text
    assert hub.requests == []


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["--what", "weights"], 2, "invalid choice: 'weights' (choose from "),
        (["--what", "lora"], 1, "holds no LoRA"),
        (["--precision", "fp32"], 1, "add single_file to what"),
        (["--precision", "fp8"], 2, "invalid choice: 'fp8'"),
        (["--create_pr", "--public"], 1, "public: is for a new repository"),
        (["--private", "--public"], 2, "not allowed with argument"),
        (["--licence", "mit"], 2, "unknown flag --licence; did you mean --license?"),
    ],
)
def test_each_misuse_is_one_clear_error(
    hub: HubStandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], status: int, words: str
) -> None:
    ended, _, problem = say(["push", make_run(tmp_path).folder, "me/jets", *flags], capsys)
    assert ended == status
    assert words in problem
    assert len(problem.strip().splitlines()) == 1
    assert hub.requests == []


@pytest.mark.parametrize("name", ["bad repo/x", "me/ü", "me/a--b", "me/x/y", "me/"])
def test_a_name_that_the_hub_does_not_take_is_said_in_a_dry_run_as_well(
    name: str, hub: HubStandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    for flags in ([], ["--dry_run"]):
        ended, _, problem = say(["push", run.folder, name, *flags], capsys)
        assert (ended, "not a repository's name" in problem) == (1, True)
    assert hub.requests == []


def test_a_source_that_is_none_and_a_missing_token_are_reported(
    hub: HubStandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    assert "is not there" in say(["push", tmp_path / "nothing", "me/jets"], capsys)[2]
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "hf auth login" in say(["push", make_run(tmp_path).folder, "me/jets"], capsys)[2]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_learned_words_go_with_a_card_whose_lines_load_them(family: str, tmp_path: Path) -> None:
    import torch
    from diffusers import DiffusionPipeline
    from safetensors.torch import load_file
    from tiny_models import tiny_folder

    from everydream_kit.export.hub import preview_push
    from everydream_kit.models.encoding import encode_captions
    from everydream_kit.models.loading import load_model
    from everydream_kit.models.model_saving import save_model
    from everydream_kit.models.tokens import add_tokens

    model = load_model(tiny_folder(family))
    with torch.no_grad():
        for rows in add_tokens(model, {"<cat>": "striped house", "<jet>": "plane"}):
            rows.add_(1.0)
    save_model(model, tmp_path / "words")
    preview = preview_push(tmp_path / "words", "me/words", base_model="someone/base")
    assert {file.path for file in preview.files} == {"README.md", "adapter.json", "learned_embeds.safetensors"}
    [adapter] = [file.source for file in preview.files if file.path == "adapter.json"]
    assert (
        json.loads(adapter)["base"]["source"] == tiny_folder(family).name
    )  # whose machine it was is nobody's business
    assert "base_model_relation: adapter" in preview.card and "- textual_inversion\n" in preview.card
    assert "from_pretrained('someone/base'" in preview.card

    lines = [line for line in preview.card.splitlines() if line.startswith("pipeline.load_textual_inversion(")]
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder(family))
    exec(
        "\n".join(lines),
        {"pipeline": pipeline, "vectors": load_file(tmp_path / "words" / "learned_embeds.safetensors")},
    )
    caption = "a <cat> on a <jet>"
    theirs = pipeline.encode_prompt(caption, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    assert torch.allclose(theirs[0], encode_captions(model, [caption]).encoder_hidden_states, atol=1e-5)
