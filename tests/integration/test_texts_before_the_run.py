"""Large text encoders encode what a run will ask for before its first step, shuffled captions too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from everydream_kit import train
from everydream_kit.config import TrainConfig
from everydream_kit.models import encoding
from everydream_kit.preflight.memory_estimate import estimate_memory
from everydream_kit.training import caching
from everydream_kit.training.reports import Listener
from everydream_kit.training.training_images import scan


@pytest.fixture
def settings(tmp_path: Path, image_folder: Path, family_folder: Path) -> dict[str, Any]:
    return {
        "resume_ckpt": str(family_folder),
        "data_root": str(image_folder),
        "logdir": str(tmp_path / "logs"),
        "training_kind": "lora",
        "lora_rank": 2,
        "resolution": 64,
        "batch_size": 4,
        "max_epochs": 2,
        "cond_dropout": 0.1,
        "shuffle_tags": True,
        "no_save_ckpt": True,
    }


@pytest.mark.parametrize("family", ["z_image"], indirect=True)
def test_shuffled_captions_are_encoded_before_the_first_step(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    encode = encoding.encode_captions

    def noted(model: Any, captions: list[str], *args: Any) -> Any:
        asked.extend(captions)
        return encode(model, captions, *args)

    class Start(Listener):
        def on_start(self, run: Any) -> None:
            asked.append("the start")

    monkeypatch.setattr(caching, "encode_captions", noted)
    ahead = train(TrainConfig(**settings), listeners=[Start()])
    before = asked.index("the start")
    assert before > 12  # more than there are images
    assert len(set(asked[:before])) == before
    assert not asked[before + 1 :]
    asked.clear()
    monkeypatch.setattr(caching, "MOST_TEXTS", 12)
    later = train(TrainConfig(**{**settings, "logdir": str(tmp_path / "more")}), listeners=[Start()])
    assert asked.index("the start") == 1  # the empty text, of samples
    assert len(asked) > 14
    assert [e["loss"] for e in later.events("loss")] == [e["loss"] for e in ahead.events("loss")]


@pytest.mark.parametrize("family", ["z_image"], indirect=True)
def test_a_plan_keeps_the_text_encoder_where_its_texts_are_too_many(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(**changes: Any) -> int:
        config = TrainConfig(**{**settings, **changes})
        dataset = scan(config, config.data_root)
        estimate = estimate_memory(config, device="cuda", dataset=dataset, cache_folder=tmp_path / "kept")
        return next(phase.by_category["weights"] for phase in estimate.phases if phase.name == "training step")

    few = weights()
    monkeypatch.setattr(caching, "MOST_TEXTS", 26)
    assert weights(max_epochs=50) > few
    assert weights(max_epochs=50, caption_variants=1) == few
