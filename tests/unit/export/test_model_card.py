"""The model card: what the Hub reads in it, what people read, and what must not be in it."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hub_runs import make_run
from safetensors.numpy import save_file

from everydream_kit.export.curves import draw_curves, running_mean
from everydream_kit.export.hub import preview_push
from everydream_kit.export.hub.repository_contents import without_folders
from everydream_kit.export.model_card import CardFacts, make_model_card, read_base, settings_table
from everydream_kit.runs import RunFolder


def metadata(card: str) -> dict[str, Any]:
    front = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert front
    return dict(yaml.safe_load(front[1]))


def test_the_metadata_is_what_the_hub_reads(tmp_path: Path) -> None:
    card = metadata(preview_push(make_run(tmp_path), "me/jets", license="creativeml-openrail-m").card)
    assert card["license"] == "creativeml-openrail-m"
    assert (card["base_model"], card["base_model_relation"]) == ("someone/base-model", "finetune")
    assert (card["library_name"], card["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert {"text-to-image", "stable-diffusion", "everydream-kit"} <= set(card["tags"])
    assert card["widget"] == [
        {
            "text": prompt,
            "output": {"url": f"samples/gs00020-00{number}.jpg"},
            "parameters": {"negative_prompt": "blurry"},
        }
        for number, prompt in enumerate(("a red jet", "a <b>blue</b> jet: *fast* | loud"))
    ]


def test_the_card_tells_settings_data_results_and_use(tmp_path: Path) -> None:
    card = preview_push(make_run(tmp_path), "me/jets").card
    assert "| lr | 2e-06 |" in card and "| flip_p | 0.5 |" in card
    assert "12 images, trained at 128 px." in card
    assert "20 optimizer steps (1 epoch); training loss at the end 0.0500." in card
    assert "![Training curves](training/curves.png)" in card
    assert "from_pretrained('me/jets'" in card and "pipeline('a red jet', clip_skip=1)" in card
    assert "<Gallery />" in card
    assert "Not stated." in card


def test_steps_after_the_last_point_of_the_log_are_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with run.events_path.open("a", encoding="utf-8") as file:
        file.write('{"kind": "saved", "step": 23, "path": "x", "files": []}\n')
    assert "23 optimizer steps (1 epoch); training loss at step 20 0.0500." in preview_push(run, "me/jets").card


def test_no_folder_of_the_machine_is_in_the_card_or_the_settings(tmp_path: Path) -> None:
    preview = preview_push(make_run(tmp_path), "me/jets")
    text = preview.card + next(f.source for f in preview.files if f.path == "training/config.json").decode()
    assert "/home/ada" not in text and str(tmp_path) not in text
    assert without_folders({"a": ["/x/y", "C:\\data\\cats", "~/z"], "b": "me/jets", "c": 1}) == {
        "a": ["y", "cats", "z"],
        "b": "me/jets",
        "c": 1,
    }


def test_a_lora_is_an_adapter_that_is_loaded_over_its_base(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    folder = run.checkpoints_folder / "jets-ep01-gs00030"
    folder.mkdir()
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
    preview = preview_push(folder, "me/jets")
    card = metadata(preview.card)
    assert card["base_model_relation"] == "adapter" and "lora" in card["tags"]
    assert "from_pretrained('someone/base-model'" in preview.card and "load_lora_weights('me/jets')" in preview.card
    assert "pytorch_lora_weights.safetensors" in [file.path for file in preview.files]


@pytest.mark.parametrize(
    ("architecture", "tags", "dtype"),
    [
        ("flux-2-klein", {"flux2-klein"}, "bfloat16"),
        ("stable-diffusion-xl-v1-base", {"stable-diffusion-xl"}, "float16"),
    ],
)
@pytest.mark.parametrize("as_file", [True, False])
def test_the_card_of_a_lora_is_of_its_family(
    architecture: str, tags: set[str], dtype: str, as_file: bool, tmp_path: Path
) -> None:
    file = tmp_path / "pytorch_lora_weights.safetensors"
    weights = {"unet.x.lora_A.weight": np.zeros((1, 1), np.float32)}
    save_file(weights, file, {"modelspec.architecture": f"{architecture}/lora"})
    preview = preview_push(file if as_file else tmp_path, "me/jets", base_model="someone/base", license="mit")
    card = metadata(preview.card)
    assert tags | {"lora"} <= set(card["tags"])
    assert not {"diffusers-training", "stable-diffusion"} & set(card["tags"])
    assert card["base_model_relation"] == "adapter"
    assert f"from_pretrained('someone/base', torch_dtype=torch.{dtype})" in preview.card
    end = f", weight_name='{file.name}')" if as_file else ")"
    assert f"load_lora_weights('me/jets'{end}" in preview.card
    assert "checkpoint files" not in preview.card


@pytest.mark.parametrize(("class_name", "dtype"), [("Flux2KleinPipeline", "bfloat16"), (None, "float16")])
def test_the_card_of_a_model_loads_it_in_its_format(class_name: str | None, dtype: str, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    if class_name:
        (run.last_checkpoint / "model_index.json").write_text(json.dumps({"_class_name": class_name}))
    preview = preview_push(run, "me/jets", what=("diffusers", "single_file"))
    assert f"torch_dtype=torch.{dtype})" in preview.card
    assert ("holds the denoiser of FLUX.2-klein alone" in preview.card) == (class_name is not None)
    assert ("stable-diffusion" in metadata(preview.card)["tags"]) == (class_name is None)


def test_a_card_of_a_bare_checkpoint_says_only_what_is_known() -> None:
    card = make_model_card(CardFacts("jets", "me/jets"))
    assert "base_model" not in metadata(card) and "license" not in metadata(card)
    assert "## Training settings" not in card and "## Results" not in card and "<Gallery" not in card


@pytest.mark.parametrize(
    ("pipeline_class", "line"),
    [
        ("StableDiffusionPipeline", "DiffusionPipeline.from_pretrained('me/jets', torch_dtype=torch.float16)"),
        ("Krea2Pipeline", "DiffusionPipeline.from_pretrained('me/jets', torch_dtype=torch.bfloat16)"),
        ("AnimaModularPipeline", "ModularPipeline.from_pretrained('me/jets')\n"),
    ],
)
def test_the_lines_of_use_and_the_tags_are_those_of_the_models_pipeline(pipeline_class: str, line: str) -> None:
    card = make_model_card(CardFacts("jets", "me/jets", pipeline_class=pipeline_class))
    assert line in card
    assert ("stable-diffusion" in card) == (pipeline_class == "StableDiffusionPipeline")


def test_a_lora_of_a_modular_pipeline_is_loaded_too() -> None:
    card = make_model_card(CardFacts("jets", "me/jets", pipeline_class="AnimaModularPipeline", is_lora=True))
    assert "pipeline.load_lora_weights('me/jets')" in card


def test_only_a_hub_id_counts_as_a_base(tmp_path: Path) -> None:
    assert read_base({"resume_ckpt": "someone/base-model"}) == "someone/base-model"
    for other in (str(tmp_path), "embedded", "findlast", "models/base.safetensors", None):
        assert read_base({"resume_ckpt": other}) is None


def test_the_table_holds_main_settings_and_changed_ones_but_no_wiring() -> None:
    table = settings_table({"lr": 1e-6, "crop_jitter": 0.1, "log_step": 25, "push_to": "me/jets", "data_root": "input"})
    assert table.splitlines()[2:] == ["| lr | 1e-06 |", "| crop_jitter | 0.1 |"]


def test_curves_are_read_from_events_and_drawn_as_an_image(tmp_path: Path) -> None:
    from PIL import Image

    def draw(events: list[dict[str, Any]]) -> bytes | None:
        run = RunFolder(tmp_path)
        run.events_path.write_text("".join(json.dumps(event) + "\n" for event in events))
        return draw_curves(run)

    events: list[dict[str, Any]] = [
        {"kind": "loss", "step": n, "loss": 1 / n, "lr": {"unet": n * 1e-6}} for n in range(1, 50)
    ]
    plain = draw(events)
    events += [{"kind": "sample", "step": 3}, {"kind": "warning", "message": "x"}]
    events += [{"kind": "loss", "step": 50, "loss": float("nan"), "lr": {"unet": float("nan")}}]
    assert draw(events) == plain  # what is no number is no point
    events += [{"kind": "validation", "step": 25, "loss": 0.3}]
    assert draw(events) != plain
    image = Image.open(io.BytesIO(draw(events) or b""))
    assert image.size == (720, 440)
    assert len(image.getcolors(1 << 20) or []) > 3
    assert draw(events[:1]) is None
    without_rates = [{name: value for name, value in event.items() if name != "lr"} for event in events]
    assert Image.open(io.BytesIO(draw(without_rates) or b"")).size == (720, 220)


def test_the_running_mean_follows_its_window() -> None:
    points = [(float(n), float(n)) for n in range(1, 9)]
    assert running_mean(points)[:3] == [(1.0, 1.0), (2.0, 1.5), (3.0, 2.0)]
    assert running_mean(points)[-1] == (8.0, 6.0)  # mean of 4..8


HOSTILE = "<img src=x onerror=alert(1)>\n# Heading [link](javascript:x) `code` | cell\u2028\x1b[2J"


def test_names_that_come_from_files_do_nothing_in_the_card() -> None:
    facts = CardFacts(
        title=HOSTILE,
        repo_id="me/jets",
        base_model=HOSTILE,
        license={"license": "other", "license_name": HOSTILE},
        config={"new_tokens": {HOSTILE: "cat"}, "clip_skip": HOSTILE, "resolution": HOSTILE, "lr": HOSTILE},
        events=[
            {"kind": "dataset", "pictures": 3, "captions": {HOSTILE: HOSTILE}},
            {"kind": "loss", "loss": 0.5, "step": HOSTILE},
        ],
        single_file=HOSTILE,
        learned_tokens={HOSTILE: 1},
        samples=[("samples/1.jpg", HOSTILE, HOSTILE)],
    )
    _, front, text = make_model_card(facts).split("---\n", 2)
    assert yaml.safe_load(front)["widget"][0]["text"] == HOSTILE
    body = re.sub(r"```python\n.*?\n```", "", text, flags=re.DOTALL)  # there names are in Python's own quotes
    assert "<img" not in body
    assert "[link]" not in body
    assert "`code`" not in body
    assert not any(line.startswith("# Heading") for line in body.splitlines())
    assert all(one.isprintable() or one == "\n" for one in text)
