"""`everydream export`, `merge` and `extract`, typed as people type them: what is written, and what a misuse says."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import draw, tiny_folder

from everydream_kit.cli import main
from everydream_kit.demo import base_model_path
from everydream_kit.models.loading import load_model, open_model
from everydream_kit.models.lora.injection import add_lora
from everydream_kit.models.model_saving import save_model
from everydream_kit.models.random_models import build_tiny_model, write_model
from everydream_kit.models.tokens import add_tokens


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA checkpoint that changes the image a lot."""
    model = load_model(tiny_folder("sd1"))
    for index, parameter in enumerate(add_lora(model, 4, text_encoder=True)):
        with torch.no_grad():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    folder = tmp_path_factory.mktemp("lora") / "jets-ep01-gs00020"
    save_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(build_tiny_model("sd1", seed=1), tmp_path_factory.mktemp("other") / "model")


def say(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Exit status, and what was printed, or the problem."""
    try:
        status = main([str(word) for word in words])
    except SystemExit as ended:
        status = int(ended.code or 0)
    shown = capsys.readouterr()
    return status, (shown.err if status else shown.out).strip()


def weights(model: Path, name: str = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight") -> torch.Tensor:
    return open_model(model).tensors["unet"][name].read()


def test_a_single_file_becomes_a_folder_again_and_draws_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = tmp_path / "x.safetensors", tmp_path / "x"
    assert say(capsys, "export", tiny_folder("sd1"), file, "--precision", "fp32") == (0, str(file))
    assert say(capsys, "export", file, folder, "--format", "diffusers", "--precision", "fp32") == (0, str(folder))
    assert {path.name for path in tmp_path.iterdir()} == {"x.safetensors", "x"}
    np.testing.assert_array_equal(draw(load_model(folder)), draw(load_model(tiny_folder("sd1"))))
    status, problem = say(capsys, "export", file, folder, "--format", "diffusers")
    assert (status, "already exists" in problem) == (1, True)


def test_a_lora_goes_out_in_both_layouts_and_merged(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for format_name, part in (("lora", ".lora_down.weight"), ("diffusers_lora", ".lora_A.weight")):
        file = tmp_path / f"{format_name}.safetensors"
        assert say(capsys, "export", lora, file, "--format", format_name)[0] == 0
        tensors = load_file(file)
        assert any(name.endswith(part) for name in tensors)
        assert {tensor.dtype for name, tensor in tensors.items() if not name.endswith(".alpha")} == {torch.float16}
        merged = tmp_path / f"{format_name}-merged"
        assert say(capsys, "merge", tiny_folder("sd1"), file, merged, "--precision", "fp32")[0] == 0
        assert torch.allclose(weights(merged), weights(lora), atol=2e-3)
    assert not torch.allclose(weights(lora), weights(tiny_folder("sd1")), atol=0.1)


def test_a_run_and_its_averaged_weights_can_be_named(
    lora: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "jets-20261122-120000"
    checkpoint = run / "ckpts" / "jets-ep01-gs00020"
    shutil.copytree(lora, checkpoint)
    shutil.copytree(other, run / "ckpts" / "jets-ep01-gs00020_ema")
    (run / "config.json").write_text("{}")
    words = ("--precision", "fp32")
    assert say(capsys, "export", run, tmp_path / "live.safetensors", *words)[0] == 0
    assert torch.allclose(weights(tmp_path / "live.safetensors"), weights(lora))
    assert say(capsys, "export", checkpoint, tmp_path / "ema", "--format", "diffusers", "--ema", *words)[0] == 0
    assert torch.equal(weights(tmp_path / "ema"), weights(other))
    status, problem = say(capsys, "export", other, tmp_path / "no.safetensors", "--ema")
    assert (status, "no EMA weights were saved with it" in problem) == (1, True)


def test_sample_takes_a_run_as_its_lora_and_says_what_is_none(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, base = tmp_path / "jets-20261122-120000", tiny_folder("sd1")
    shutil.copytree(lora, run / "ckpts" / lora.name)
    (run / "config.json").write_text("{}")
    words = ("--prompt", "cat", "--num_inference_steps", 1, "--width", 64, "--height", 64, "--out", tmp_path / "out")
    assert say(capsys, "sample", base, *words, "--lora", run)[0] == 0
    assert (
        f"is a folder of runs. Name one of them, the latest first: {run}." in say(capsys, "sample", tmp_path, *words)[1]
    )
    for given, problem in (
        (run / "ckpts", "is a folder without a LoRA. Give a LoRA's file, a LoRA checkpoint or a run folder."),
        (base, "is a complete model; generate with it as the checkpoint."),
        (tmp_path / "no", "is not there. Give a LoRA's file, a LoRA checkpoint or a run folder."),
    ):
        assert say(capsys, "sample", base, *words, "--lora", given) == (1, f"error: lora: {given} {problem}")


def test_a_lora_is_merged_at_its_strength(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_folder("sd1")
    for strength, out in ((0.0, "none.safetensors"), (0.5, "half.ckpt"), (1.0, "whole")):
        words = ("merge", base, lora, tmp_path / out, "--strength", strength, "--precision", "fp32")
        assert say(capsys, *words) == (0, str(tmp_path / out))
        expected = torch.lerp(weights(base), weights(lora), strength)
        assert torch.allclose(weights(tmp_path / out), expected, atol=1e-6)


def test_two_models_are_mixed_by_weight(other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_folder("sd1")
    for flags, weight in (((), 0.5), (("--weight", "0.25"), 0.25)):
        out = tmp_path / f"mix-{weight}.safetensors"
        assert say(capsys, "merge", base, other, out, "--precision", "fp32", *flags)[0] == 0
        assert torch.allclose(weights(out), torch.lerp(weights(base), weights(other), weight))


def test_the_difference_of_two_models_becomes_a_lora(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = tiny_folder("sd1"), tmp_path / "tuned.safetensors"
    say(capsys, "export", lora, tuned, "--precision", "fp32")
    out = tmp_path / "extracted.safetensors"
    words = ("extract", tuned, base, out, "--rank", "4", "--precision", "fp32")
    assert say(capsys, *words) == (0, str(out))
    assert any(name.startswith("lora_te_") for name in load_file(out))
    say(capsys, "merge", base, out, tmp_path / "again.safetensors", "--precision", "fp32")
    assert torch.allclose(weights(tmp_path / "again.safetensors"), weights(tuned), atol=1e-4)
    assert say(capsys, *words, "--unet_only", "--format", "diffusers_lora")[0] == 0
    assert {name.partition(".")[0] for name in load_file(out)} == {"unet"}


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_learned_token_becomes_an_embedding_file(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(tiny_folder(family))
    add_tokens(model, {"<cat>": "striped house", "<jet>": "plane"})
    save_model(model, tmp_path / "checkpoint")
    out = tmp_path / "cat.safetensors"
    words = ("export", tmp_path / "checkpoint", out, "--format", "embedding")
    assert say(capsys, *words, "--token", "<cat>") == (0, str(out))
    assert {name: len(rows) for name, rows in load_file(out).items()} == (
        {"clip_l": 2, "clip_g": 2} if family == "sdxl" else {"emb_params": 2}
    )
    assert "has the tokens <cat>, <jet>; name one" in say(capsys, *words)[1]
    assert "has no learned token '<dog>'; it has <cat>, <jet>" in say(capsys, *words, "--token", "<dog>")[1]


@pytest.mark.parametrize("command", ["merge FILE OTHER FILE", "merge OTHER FILE FILE", "export FILE FILE"])
def test_a_result_does_not_take_the_place_of_what_it_is_made_from(
    command: str, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "own.safetensors"
    say(capsys, "export", other, file)
    before = file.read_bytes()
    words = [{"FILE": file, "OTHER": other}.get(word, word) for word in command.split()]
    status, problem = say(capsys, *words)
    assert (status, "own.safetensors is the model that is read" in problem) == (1, True)
    assert file.read_bytes() == before


@pytest.mark.parametrize("command", ["merge FOLDER LORA PART", "merge LORA FOLDER PART", "export FOLDER PART"])
def test_a_result_does_not_take_the_place_of_a_part_of_what_it_is_made_from(
    command: str, lora: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(other, tmp_path / "model"))
    part = folder / "unet" / "diffusion_pytorch_model.safetensors"
    before = part.read_bytes()
    words = {"FOLDER": folder, "PART": part, "LORA": lora}
    status, problem = say(capsys, *[words.get(word, word) for word in command.split()])
    assert (status, f"is a part of {folder}, which is read" in problem) == (1, True)
    assert part.read_bytes() == before
    assert say(capsys, "export", folder, folder / "new.safetensors")[0] == 0


def test_a_result_does_not_take_the_place_of_the_base_that_a_lora_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base.safetensors"
    say(capsys, "export", tiny_folder("sd1"), base)
    model = load_model(base)
    add_lora(model, 4)
    save_model(model, tmp_path / "lora")
    status, problem = say(capsys, "export", tmp_path / "lora", base)
    assert (status, "base.safetensors is the model that is read" in problem) == (1, True)


@pytest.mark.parametrize(
    ("words", "status", "problem"),
    [
        ("export BASE OUT.safetensors --format lora", 1, "not a LoRA checkpoint"),
        ("export LORA OUT.pt --format lora", 1, "must end in .safetensors"),
        ("export BASE OUT.safetensors --format embedding", 1, "no learned tokens here"),
        ("export BASE OUT.safetensors --format embedding --precision fp32", 1, "does not apply to the form embedding"),
        ("export BASE OUT.safetensors --token <cat>", 1, "it goes with embedding"),
        ("export BASE OUT.safetensors --format kohya", 2, "invalid choice: 'kohya' (choose from"),
        ("export NOWHERE OUT.safetensors", 1, "no such file or folder"),
        ("merge BASE LORA OUT.safetensors --weight 0.3", 1, "is a LoRA; it is merged with strength"),
        ("merge BASE OTHER OUT.safetensors --strength 0.3", 1, "two models are mixed with weight"),
        ("merge BASE LORA OUT.safetensors --strength nan", 1, "strength: must be a finite number"),
        ("merge BASE OTHER OUT.safetensors --weight inf", 1, "weight: must be a finite number"),
        ("merge BASE LORA OUT.safetensors --strength 1e39", 1, "strength: must be a finite number"),
        ("export LORA OUT.safetensors --strength nan", 1, "strength: must be a finite number"),
        ("merge BASE OTHER OUT.safetensors --weight 1e38", 1, "NaN or infinite as float16. Nothing was written"),
        ("merge BASE OTHER OUT.ckpt --weight 1e38", 1, "NaN or infinite as float16. Nothing was written"),
        ("merge BASE OTHER OUT --weight 1e38", 1, "NaN or infinite as float16. Nothing was written"),
        ("merge BASE SDXL OUT.safetensors", 1, "they cannot be mixed"),
        ("merge SDXL LORA OUT.safetensors", 1, "does not fit"),
        ("merge BASE LORA OUT.safetensor", 1, "ends in .safetensors or .ckpt"),
        ("merge BASE NOWHERE OUT.safetensors", 1, "no such file or folder"),
        ("merge BASE LORA OUT --strengh 1", 2, "did you mean --strength?"),
        ("extract BASE BASE OUT.safetensors", 1, "nothing to extract"),
        ("extract BASE SDXL OUT.safetensors", 1, "a LoRA cannot turn one into the other"),
        ("extract OTHER BASE OUT.ckpt", 1, "must end in .safetensors"),
        ("extract OTHER BASE OUT.safetensors --rank 0", 1, "must be at least 1"),
        ("export BASE OUT.safetensors --format lora", 1, "are exported with --format single_file or diffusers"),
        ("sample BASE --prompt cat --cfg 1e30", 1, "cfgs: "),
        ("sample FLOW --prompt cat --clip_skip 2", 1, "clip_skip: "),
    ],
)
def test_each_misuse_is_one_clear_error(
    words: str, status: int, problem: str, lora: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"BASE": tiny_folder("sd1"), "LORA": lora, "OTHER": other, "NOWHERE": tmp_path / "nowhere"}
    if "FLOW" in words:
        places["FLOW"] = tiny_folder("z_image")
    if "SDXL" in words:
        places["SDXL"] = tiny_folder("sdxl")
    typed = [str(places.get(word, tmp_path / word if word.startswith("OUT") else word)) for word in words.split(" ")]
    ended, text = say(capsys, *typed)
    assert ended == status
    assert problem in text
    assert len(text.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["FILE/sub", "/proc/edk"])
@pytest.mark.parametrize(
    "command",
    [
        "export BASE OUT/x.safetensors",
        "export BASE OUT/x --format diffusers",
        "export LORA OUT/x.safetensors --format lora",
        "merge BASE OTHER OUT/x",
        "extract OTHER BASE OUT/x.safetensors",
        "sample BASE --prompt cat --out OUT",
    ],
)
def test_a_place_that_takes_no_files_is_refused_before_the_work(
    command: str, place: str, lora: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file.json").write_text("{}")
    out = place.replace("FILE", str(tmp_path / "file.json"))
    places = {"BASE": str(tiny_folder("sd1")), "LORA": str(lora), "OTHER": str(other)}
    status, problem = say(capsys, *[places.get(word, word.replace("OUT", out)) for word in command.split()])
    assert status == 1
    cause = "file.json is a file)" if "FILE" in place else "nothing can be written in /proc: it is read-only"
    assert problem.startswith(f"error: out: {out} cannot be made (") and cause in problem


def test_a_folder_with_the_name_of_the_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.safetensors").mkdir()
    status, problem = say(capsys, "export", tiny_folder("sd1"), tmp_path / "x.safetensors")
    assert (status, "x.safetensors is a folder; give the file another name" in problem) == (1, True)


@pytest.mark.parametrize("form", ["x.safetensors", "x.ckpt"])
def test_a_model_with_a_vocabulary_of_its_own_comes_back_from_a_single_file(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert say(capsys, "export", "embedded", tmp_path / form, "--precision", "fp32")[0] == 0
    again, before = load_model(tmp_path / form), load_model(base_model_path())
    caption = "a red balloon, a platypus"
    assert again.tokenizers[0](caption)["input_ids"] == before.tokenizers[0](caption)["input_ids"]
    np.testing.assert_array_equal(draw(again, caption), draw(before, caption))
    assert say(capsys, "export", tmp_path / form, tmp_path / "folder", "--format", "diffusers")[0] == 0
    assert load_model(tmp_path / "folder").tokenizers[0](caption) == before.tokenizers[0](caption)
