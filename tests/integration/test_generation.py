"""`sample`: images in files that carry their settings, from whatever a person names."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from tiny_models import tiny_folder

from everydream_kit.actions.dataset_report import report_dataset
from everydream_kit.cli import main
from everydream_kit.errors import ConfigError
from everydream_kit.generation import sample
from everydream_kit.models.families import FAMILIES

SMALL = {"num_inference_steps": 2, "width": 64, "height": 64}


def test_each_prompt_seed_and_cfg_is_a_file_with_its_settings_and_there_is_a_grid(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    paths = sample(tiny_model_folder, ["a cat", "a dog"], cfgs=[1.0, 3.0], num_images=2, out=tmp_path, **SMALL)
    assert len(paths) == 2 * 2 * 2 + 1
    with Image.open(paths[3]) as image:
        assert image.size == (64, 64)
        assert "Seed: 556" in image.info["parameters"]
        assert "CFG scale: 3" in image.info["parameters"]
    assert paths[-1].name == "grid.png"


@pytest.mark.parametrize(("family", "name", "steps"), [("sd1", "my-turbo", 8), ("flux2_klein", "FLUX.2-klein-4B", 4)])
def test_a_distilled_model_is_sampled_in_few_steps_without_guidance(
    family: str, name: str, steps: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = shutil.copytree(tiny_folder(family), tmp_path / name)
    (path,) = sample(model, "a cat", width=64, height=64, out=tmp_path / "samples")
    with Image.open(path) as image:
        assert f"Steps: {steps}," in image.info["parameters"]
        assert "CFG scale: 1," in image.info["parameters"]
    assert f"is distilled. Unless given, --num_inference_steps is {steps} and --cfg 1." in caplog.text


@pytest.mark.parametrize(
    ("family", "source", "is_distilled"),
    [
        ("sdxl", "stabilityai/sdxl-turbo", True),
        ("sdxl", "models/juggernautXL_v9Rdphoto2Lightning.safetensors", True),
        ("sd1", "SimianLuo/LCM_Dreamshaper_v7", True),
        ("sd2", "stabilityai/sd-turbo/", True),
        ("sd1", "turbo/stable-diffusion-v1-5", False),
        ("sd1", "a/hyperrealism-calcmix", False),
        ("sd1", "logs/turbo-cars-20261129-080000/ckpts/last-turbo-cars-ep10-gs00200", False),
        ("z_image", "turbo/Z-Image", False),
    ],
)
def test_a_distilled_model_is_recognized_by_its_own_name(family: str, source: str, is_distilled: bool) -> None:
    assert (FAMILIES[family].distilled(source) is not None) is is_distilled


def test_guidance_and_steps_are_the_familys_unless_given(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    [path] = sample(
        tiny_folder("flux1"), "a cat", width=64, height=64, out=tmp_path, progress=lambda *done: steps.append(done)
    )
    assert steps[-1] == (28, 28)
    with Image.open(path) as image:
        assert "CFG scale: 3.5" in image.info["parameters"]


def test_several_checkpoints_stand_side_by_side(
    tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", "a cat", "--prompt", "a dog", "--cfg", "1", "3", "--num_inference_steps", "2"]
    size = ["--width", "64", "--height", "64", "--out", str(tmp_path)]
    assert main(["sample", str(tiny_model_folder), "embedded", *words, *size]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert len(paths) == 2 * 2 * 2 + 1
    assert [path.name.partition("-")[0] for path in paths[:-1]] == [tiny_model_folder.name] * 4 + ["embedded"] * 4
    alone = sample("embedded", ["a cat", "a dog"], cfgs=[1.0, 3.0], out=tmp_path / "alone", **SMALL)
    with Image.open(paths[5]) as alongside, Image.open(alone[1]) as single, Image.open(paths[-1]) as grid:
        assert ImageChops.difference(alongside, single).getbbox() is None
        assert grid.width > 4 * 64 and grid.height > 2 * 64
        wanted = alongside.copy()
        found = [
            (x, y)
            for x in range(grid.width - 63)
            for y in range(grid.height - 63)
            if grid.getpixel((x, y)) == wanted.getpixel((0, 0))
            and ImageChops.difference(grid.crop((x, y, x + 64, y + 64)).convert("RGB"), wanted).getbbox() is None
        ]
    assert len(found) == 1  # first prompt, last column
    assert found[0][0] > grid.width - 2 * 64 - 40 and found[0][1] < grid.height // 2


def test_progress_of_several_checkpoints_is_reported_as_one(tmp_path: Path, tiny_model_folder: Path) -> None:
    reported: list[tuple[int, int]] = []
    sample([tiny_model_folder] * 2, "a cat", out=tmp_path, progress=lambda *at: reported.append(at), **SMALL)
    assert [done for done, _ in reported] == sorted(done for done, _ in reported)
    assert reported[-1][0] == reported[-1][1] and len({total for _, total in reported}) == 1


def test_earlier_images_are_never_overwritten(tmp_path: Path, tiny_model_folder: Path) -> None:
    first = sample(tiny_model_folder, "a cat", out=tmp_path, **SMALL)
    second = sample(tiny_model_folder, "a cat", out=tmp_path, **SMALL)
    assert first != second
    assert len(list(tmp_path.iterdir())) == 2


def test_names_in_any_script_are_short_enough_for_a_file(tmp_path: Path, tiny_model_folder: Path) -> None:
    model = tmp_path / ("龍" * 60)
    model.symlink_to(tiny_model_folder)
    paths = sample([model, model], "龍" * 100, out=tmp_path / "out", **SMALL)
    assert paths[0].name == f"{'龍' * 30}-{'龍' * 30}-seed555-cfg7.png"


def test_a_lora_changes_the_image(tmp_path: Path, tiny_model_folder: Path) -> None:
    import torch

    from everydream_kit.models.loading import load_model
    from everydream_kit.models.lora.injection import add_lora
    from everydream_kit.models.model_saving import save_model

    model = load_model(tiny_model_folder)
    for parameter in add_lora(model, 2):
        torch.nn.init.constant_(parameter, 0.3)
    save_model(model, tmp_path / "lora")
    plain = sample(tiny_model_folder, "a cat", out=tmp_path / "plain", **SMALL)
    adapted = sample(
        tiny_model_folder,
        "a cat",
        lora=tmp_path / "lora" / "pytorch_lora_weights.safetensors",
        out=tmp_path / "a",
        **SMALL,
    )
    with Image.open(plain[0]) as first, Image.open(adapted[0]) as second:
        assert ImageChops.difference(first, second).getbbox() is not None


def test_no_prompt_is_refused(tmp_path: Path, tiny_model_folder: Path) -> None:
    with pytest.raises(ConfigError, match="prompt: give at least one"):
        sample(tiny_model_folder, [], out=tmp_path)
    with pytest.raises(ConfigError, match="checkpoint: give at least one"):
        sample([], "a cat", out=tmp_path)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--num_inference_steps 0", "num_inference_steps: must be greater than or equal to 1 (got 0)"),
        ("--num_inference_steps 2000", "num_inference_steps: must be less than or equal to 1000 (got 2000)"),
        ("--seed 99999999999999999999999", "seed: must be less than 9223372036854775808"),
        ("--cfg nan", "cfgs: must be a finite number"),
        ("--num_images 0", "num_images: must be at least 1 (got 0)"),
        ("--width -64", "width: must be greater than or equal to 64 (got -64)"),
        ("--height 65", "height: must be a multiple of 8 (got 65)"),
        ("--clip_skip -1", "clip_skip: must be greater than or equal to 0 (got -1)"),
    ],
)
def test_a_value_that_cannot_be_is_one_line_and_nothing_is_written(
    flags: str, problem: str, tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["sample", str(tiny_model_folder), "--prompt", "a cat", "--out", str(out), *flags.split()]) == 1
    assert problem in capsys.readouterr().err
    assert not out.exists()


def test_a_file_in_the_place_of_the_folder_is_said(
    tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("mine")
    assert main(["sample", str(tiny_model_folder), "--prompt", "a cat", "--out", str(tmp_path / "out")]) == 1
    assert "out is a file; give a folder" in capsys.readouterr().err


ONE_CAT = ["--prompt", "a cat", *("--num_inference_steps", "2"), *("--width", "64"), *("--height", "64")]


def test_a_terminal_shows_how_far_the_drawing_is(tmp_path: Path, tiny_model_folder: Path) -> None:
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [
        sys.executable,
        "-m",
        "everydream_kit",
        "sample",
        str(tiny_model_folder),
        *ONE_CAT,
        "--out",
        str(tmp_path),
    ]
    drawn = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=stderr, text=True)
    shown = os.read(terminal, 100_000).decode()
    os.close(stderr)
    os.close(terminal)
    assert "sample   0%" in shown and ("sample  50%" in shown or "sample 100%" in shown)
    assert drawn.stdout.count("\n") == 1 and Path(drawn.stdout.strip()).is_file()


def test_the_sample_and_export_commands_name_what_they_wrote(
    tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(tiny_model_folder), *ONE_CAT, "--out", str(tmp_path)]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()
    assert main(["export", str(tiny_model_folder), str(tmp_path / "x.safetensors"), "--precision", "bf16"]) == 0
    assert Path(capsys.readouterr().out.strip()) == tmp_path / "x.safetensors"
    assert main(["export", str(tiny_model_folder), str(tmp_path / "x.txt")]) == 1
    assert ".safetensors or .ckpt" in capsys.readouterr().err


@pytest.mark.parametrize("family", FAMILIES)
def test_a_caption_is_too_long_where_the_familys_text_encoder_stops_reading(family: str, tmp_path: Path) -> None:
    """Of CLIP's 75 tokens it is 100; the tiny language models know letters alone, so it is 300 of theirs."""
    for name, number in (("some", 100), ("many", 700)):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("ab " * number, encoding="utf-8")
    report = json.loads(report_dataset(str(tmp_path), tokenizer=tiny_folder(family), as_json=True))
    long = {Path(one["path"]).stem for one in report["long_captions"]}
    assert long == ({"some", "many"} if FAMILIES[family].objective == "diffusion" else {"many"})


def test_a_caption_may_fill_what_template_and_marks_leave_of_the_text_encoders_length() -> None:
    assert (
        {name: family.caption_tokens for name, family in FAMILIES.items() if family.objective == "flow"}
        == {
            "z_image": 504,  # of 512; 3 before and 5 behind: <|im_start|> user line, <|im_end|> line <|im_start|> assistant line
            "flux2_klein": 500,  # the same, and <think> lines </think> lines
            "flux1": 511,  # T5's end
            "anima": 511,
            "krea2": 507,
            "qwen_image": 1019,
        }
    )
