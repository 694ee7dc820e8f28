"""The command line: what a person gets who makes a mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from everydream_kit.cli import COMMANDS, main
from everydream_kit.identity import identify
from everydream_kit.runs import RunFolder


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


def test_help_needs_neither_torch_nor_the_settings() -> None:
    code = (
        "import sys\nfrom everydream_kit.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'pydantic', 'diffusers', 'PIL'} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip() == "[]"


def problem_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    try:
        status = main(words)
    except SystemExit as ended:
        status = int(ended.code or 0)
    return status, capsys.readouterr().err


def test_an_unknown_flag_names_its_nearest_neighbor(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = problem_of(["train", "--batchsize", "3"], capsys)
    assert (status, "did you mean --batch_size?" in text) == (2, True)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--learning_rate=1e-6", "lr"),
        ("--train_batch_size", "batch_size"),
        ("--rank", "lora_rank"),
        ("--te_lr", "text_encoder_lr"),
    ],
)
def test_a_name_of_another_trainer_is_understood(word: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = problem_of(["train", word, "1"], capsys)
    assert (status, f"unknown flag {word}; did you mean --{meant}?" in text) == (2, True)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("sample x --steps 5", "--steps; did you mean --num_inference_steps?"),
        ("sample x --num-steps 5", "--num-steps; did you mean --num_inference_steps?"),
        ("sample x --negative bad", "--negative; did you mean --negative_prompt?"),
        ("train --enable_bucket", "--enable_bucket; --help lists the flags."),
        (
            "train --save_model_as ckpt",
            "--save_model_as; --help lists the flags.",
        ),  # not one that the help does not list
    ],
)
def test_an_unknown_flag_is_answered_with_the_one_that_is_meant_or_with_none(
    words: str, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = problem_of([*words.split(), *(["--prompt", "x"] if words.startswith("sample") else [])], capsys)
    assert (status, f"unknown flag {answer}" in text) == (2, True), text


def test_a_run_folder_as_base_is_named_as_one(
    tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder.create(tmp_path, "jets")
    run.config_path.write_text("{}", "utf-8")
    words = ["train", "--resume_ckpt", str(run.folder), "--data_root", str(image_folder), "--logdir", str(tmp_path)]
    status, text = problem_of(words, capsys)
    assert (status, f"is a run folder. Continue the run with: everydream resume {run.folder}" in text) == (1, True), (
        text
    )


def test_a_value_too_many_is_no_flag(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = problem_of(["train", "--quantization", "int8", "nf4"], capsys)
    assert (status, "'nf4' belongs to no flag" in text, "unknown flag" in text) == (2, True, False)


@pytest.mark.parametrize("flag", ["--lowvram", "--useadam8bit", "--resume_ckpt_variant=fp16"])
def test_resume_knows_the_flags_that_train_knows(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = problem_of(["resume", str(tmp_path / "none"), flag], capsys)
    assert (status, "unknown flag" in text) == (1, False)  # there is no such run


def test_names_of_other_trainers_mean_parameters_and_are_none() -> None:
    from everydream_kit.config import OTHER_TRAINERS, TrainConfig, nearest_name

    assert set(OTHER_TRAINERS.values()) <= set(TrainConfig.model_fields)
    assert not OTHER_TRAINERS.keys() & TrainConfig.model_fields.keys()
    assert nearest_name("learning_rate") == "lr"


def test_an_unknown_key_in_a_file_names_its_nearest_neighbor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.json").write_text('{"resume_ckpt": "x", "max_epoch": 3}', "utf-8")
    status, text = problem_of(["train", "--config", str(tmp_path / "c.json")], capsys)
    assert (status, "max_epoch: unknown setting; did you mean max_epochs?" in text) == (1, True)


def test_values_that_cannot_be_are_reported_together(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = problem_of(["train", "--resume_ckpt", "x", "--lr", "fast", "--seed", "often"], capsys)
    assert status == 1
    assert "lr: must be a number" in text
    assert "seed: must be a whole number" in text
    status, text = problem_of(["train", "--resume_ckpt", "x", "--lr", "-1", "--cond_dropout", "2"], capsys)
    assert status == 1
    assert "lr: must be greater than 0 (got -1.0)" in text
    assert "cond_dropout: must be less than or equal to 1 (got 2.0)" in text


def test_a_data_folder_that_is_missing_or_empty_is_one_clear_error(
    tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["train", "--resume_ckpt", str(tiny_model_folder), "--logdir", str(tmp_path / "logs")]
    status, text = problem_of([*common, "--data_root", str(tmp_path / "nowhere")], capsys)
    assert status == 1
    assert "nowhere" in text
    assert "Traceback" not in text
    (tmp_path / "empty").mkdir()
    status, text = problem_of([*common, "--data_root", str(tmp_path / "empty")], capsys)
    assert status == 1
    assert "empty: holds no image (.jpg, .jpeg, " in text
    assert "Give the folder that holds yours." in text


def test_a_base_model_that_is_not_there_is_one_clear_error(
    tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "train",
        "--resume_ckpt",
        str(tmp_path / "no_model"),
        "--data_root",
        str(image_folder),
        "--resolution",
        "64",
    ]
    status, text = problem_of([*words, "--logdir", str(tmp_path / "logs")], capsys)
    assert status == 1
    assert "no_model" in text


def test_resume_without_a_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = problem_of(["resume", "--logdir", str(tmp_path)], capsys)
    assert (status, "holds no run" in text) == (1, True)
    status, text = problem_of(["resume", "--set", "lr"], capsys)
    assert (status, "NAME=VALUE" in text) == (1, True)


@pytest.mark.parametrize(
    ("plot", "words"),
    [("{out}/none/x.png", "none: no such folder"), ("{out}/x.xyz", "not the name of an image; let it end in .png")],
)
def test_a_plot_that_cannot_be_written_is_said_before_the_dataset_is_read(
    plot: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = problem_of(["prepare", str(tmp_path / "nowhere"), "--plot", plot.format(out=tmp_path)], capsys)
    assert (status, words in text) == (1, True)


def test_a_dataset_without_images_is_an_error_and_a_folder_without_runs_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    status, text = problem_of(["prepare", "empty"], capsys)
    assert (status, "empty: holds no image that can be trained on. Give the folder" in text) == (1, True)
    assert problem_of(["runs", "--logdir", "nowhere"], capsys) == (0, "nowhere: holds no run.\n")


def test_runs_says_which_process_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder.create(tmp_path, "jets")
    run.config_path.write_text("{}", "utf-8")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        run.write_status({"state": "running", "step": 7, **identify(process.pid).to_json()})
        assert main(["runs", "--logdir", str(tmp_path)]) == 0
        assert capsys.readouterr().out == f"running    step       7  {run.folder}\n"
        process.kill()
    assert main(["runs", "--logdir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"died       step       7  {run.folder}\n"
