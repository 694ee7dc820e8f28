"""Auto-captioning with a real BLIP model, tiny and with random weights."""

import pytest
from PIL import Image

from everydream_kit.data.captioning import auto_caption
from everydream_kit.data.changes import undo
from everydream_kit.errors import ModelError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "a", "cat", "dog", "photo", "of", "the", "red"]


@pytest.fixture(scope="module")
def tiny_blip(tmp_path_factory):
    import torch
    from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    folder = tmp_path_factory.mktemp("blip")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), additional_special_tokens=["[DEC]", "[ENC]"])
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(WORDS), "encoder_hidden_size": 32, "bos_token_id": 5, "sep_token_id": 3}
    config = BlipConfig(
        text_config={**small, **text, "pad_token_id": 0, "eos_token_id": 3, "max_position_embeddings": 64},
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    torch.manual_seed(0)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    root.mkdir()
    for name, color in (("one", "red"), ("two", "green"), ("three", "blue")):
        Image.new("RGB", (64, 48), color).save(root / f"{name}.png")
    (root / "two.txt").write_text("mine")
    return root


def captions(folder):
    return {path.stem: path.read_text() for path in folder.glob("*.txt")}


def test_images_without_captions_get_them_with_prompt_and_prefix(folder, tiny_blip):
    done = []
    report = auto_caption(
        folder,
        model=tiny_blip,
        batch_size=2,
        prompt="a photo of",
        prefix="ohwx, ",
        suffix=", end",
        max_new_tokens=8,
        progress=lambda *counts: done.append(counts),
    )
    written = captions(folder)
    assert written["two"] == "mine"
    for name in ("one", "three"):
        assert written[name].startswith("ohwx, a photo of")
        assert written[name].endswith(", end")
        assert "[" not in written[name]
    assert done == [(2, 2)]
    assert len(report.changes) == 2
    assert not auto_caption(folder, model="not/loaded").changes  # all have one now: no model is needed
    undo(report.journal)
    assert captions(folder) == {"two": "mine"}


def test_captions_are_replaced_only_when_asked(folder, tiny_blip):
    report = auto_caption(folder, model=tiny_blip, overwrite=True, prompt="a red", max_new_tokens=8)
    assert set(captions(folder)) == {"one", "two", "three"}
    assert captions(folder)["two"].startswith("a red")
    undo(report.journal)
    assert captions(folder) == {"two": "mine"}


def test_a_dry_run_loads_no_model(folder):
    report = auto_caption(folder, model="no/such-model", dry_run=True)
    assert len(report.changes) == 2
    assert captions(folder) == {"two": "mine"}


def test_a_broken_image_is_named_and_the_others_are_captioned(folder, tiny_blip, monkeypatch):
    from everydream_kit.data import tagging

    scan = tagging.scan_dataset

    def break_after_the_scan(root):
        dataset = scan(root)
        (folder / "one.png").write_bytes((folder / "one.png").read_bytes()[:60])
        return dataset

    monkeypatch.setattr(tagging, "scan_dataset", break_after_the_scan)
    report = auto_caption(folder, model=tiny_blip, max_new_tokens=4)
    assert [p.path.endswith("one.png") for p in report.problems] == [True]
    assert "three" in captions(folder)


def test_what_is_no_captioning_model_is_said(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="cannot be loaded as an image-to-text model"):
        auto_caption(folder, model=tmp_path / "empty")


@pytest.mark.background
def test_the_panel_suggests_captions_for_review_and_writes_only_what_is_ticked(folder, tiny_blip):
    from everydream_kit.panels.dataset_panel import DatasetPanel

    project = folder.parent / "jets"
    project.mkdir()
    folder.rename(project / "input")
    for name in ("one", "three"):  # names of cameras, so that the images have no caption
        (project / "input" / f"{name}.png").rename(project / "input" / f"IMG_{name}.png")
    panel = DatasetPanel(project)
    panel.captioner.model.value = str(tiny_blip)
    panel.captioner.prompt.value = "a photo of"
    panel.captioner.start_button.click()
    panel.captioner.task.job.watch(interval_seconds=0.05)
    panel.refresh()
    assert "2 captions suggested" in panel.message.value, panel.message.value
    assert captions(project / "input") == {"two": "mine"}, "nothing is written before the review"
    again = DatasetPanel(project)  # another kernel continues the review
    assert [path.stem for path in again.captioner.suggestions] == ["IMG_one", "IMG_three"]
    first, second, *rest = again.captioner.rows
    assert first.text.value.startswith("a photo of") and rest[0].path is None
    first.text.value = "a red square"
    second.check.value = False
    assert again.captioner.write_button.description == "Write 1 caption"
    again.captioner.write_button.click()
    assert captions(project / "input") == {"two": "mine", "IMG_one": "a red square"}
    assert again.captioner.suggestions == {} and again.captioner.review.layout.display == "none"
    again.undo_button.click()
    assert captions(project / "input") == {"two": "mine"}


@pytest.mark.background
def test_a_captioner_that_cannot_be_loaded_is_said_in_the_panel(folder):
    from everydream_kit.panels.dataset_panel import DatasetPanel

    project = folder.parent / "jets"
    project.mkdir()
    folder.rename(project / "input")
    panel = DatasetPanel(project)
    panel.captioner.model.value = str(project)
    panel.captioner.start_button.click()
    panel.captioner.task.job.watch(interval_seconds=0.05)
    panel.refresh()
    assert "cannot be loaded as an image-to-text model" in panel.message.value
