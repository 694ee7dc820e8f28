"""The embedded base: it loads everywhere, generates what is requested, and learns the demo's ink drawings.

What is drawn is judged by `everydream_kit.demo.score`, a network that knows nothing of the training loss.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from everydream_kit.demo import base_model_path, images_path

MAX_BYTES = 16_000_000
KNOWN = ("red apple", "penguin", "guitar", "rocket", "pizza", "sunflower", "mouse face", "automobile")
STEPS, GUIDANCE = 20, 4.0


@pytest.fixture(scope="module")
def pipeline():
    import torch
    from diffusers import StableDiffusionPipeline

    made = StableDiffusionPipeline.from_pretrained(base_model_path(), dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipeline, prompts: list[str], seed: int) -> list[Image.Image]:
    import torch

    return pipeline(
        prompts,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        width=128,
        height=128,
        generator=[torch.Generator().manual_seed(seed + number) for number in range(len(prompts))],
    ).images


def test_the_packaged_base_keeps_its_size_and_is_half_precision_throughout():
    from safetensors import safe_open

    files = [path for path in base_model_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert sorted(path.parent.name for path in weights) == ["text_encoder", "unet", "vae"]
    for path in weights:
        with safe_open(path, framework="pt") as file:
            kinds = Counter(file.get_slice(key).get_dtype() for key in file.keys())  # noqa: SIM118
        assert set(kinds) == {"F16"}, path


def test_text_encoder_names_are_prefixed_and_all_of_them_are_found():
    from safetensors import safe_open
    from transformers import CLIPTextModel

    folder = base_model_path() / "text_encoder"
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert all(key.startswith("text_model.") for key in file.keys())  # noqa: SIM118
    _, found = CLIPTextModel.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]


@pytest.mark.parametrize(
    "text",
    ["red apple, ink drawing", "", "Ünïcödé 日本語 🎉", "x" * 5000, "hello world, a photo of a cat", "\x00\n\t<|x|>"],
)
def test_the_tokenizer_writes_any_text_in_at_most_77_tokens(pipeline, text):
    ids = pipeline.tokenizer(text, padding="max_length", truncation=True, max_length=77).input_ids
    assert len(ids) == 77
    assert ids[0] == pipeline.tokenizer.bos_token_id and pipeline.tokenizer.eos_token_id in ids
    assert max(ids) < pipeline.text_encoder.config.vocab_size


def test_words_of_captions_are_whole_tokens_as_clip_cuts_them(pipeline):
    assert pipeline.tokenizer.tokenize("Red apple, ink drawing") == [
        "red</w>",
        "apple</w>",
        ",</w>",
        "ink</w>",
        "drawing</w>",
    ]


def test_the_noise_schedule_is_stable_diffusion_1s():
    config = json.loads((base_model_path() / "scheduler/scheduler_config.json").read_text("utf-8"))
    found = {key: config[key] for key in ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")}
    assert found == {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
    }


def test_the_demo_images_are_captioned_small_and_of_four_shapes_or_more():
    folder = images_path()
    images = sorted(folder.glob("*.webp"))
    assert 24 <= len(images) <= 40
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2_000_000
    shapes = set()
    for path in images:
        assert path.with_suffix(".txt").read_text("utf-8").strip().endswith(", ink drawing")
        with Image.open(path) as image:
            shapes.add(round(image.width / image.height, 2))
    assert len(shapes) >= 4
    assert (folder / "SOURCE.md").is_file()


def test_the_score_knows_real_ink_samples_from_others_and_names_their_subjects():
    from everydream_kit.demo.score import score

    paths = sorted(images_path().glob("*.webp"))
    subjects = [path.with_suffix(".txt").read_text("utf-8").split(",")[0] for path in paths]
    found = score([Image.open(path) for path in paths], subjects)
    assert min(found.styles) > 0
    assert found.style > 0.5


def test_the_score_refuses_what_it_cannot_judge():
    from everydream_kit.demo.score import score

    image = Image.new("RGB", (128, 128))
    with pytest.raises(ValueError, match="1 images and 2 subjects"):
        score([image], ["red apple", "guitar"])
    with pytest.raises(ValueError, match="no reference for a grand idea"):
        score([image], ["a grand idea"])


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (100, 200))])
def test_the_base_draws_the_subjects_it_is_asked_for_as_3d_images(pipeline, seed):
    from everydream_kit.demo.score import score

    found = score(draw(pipeline, [f"{subject}, 3d" for subject in KNOWN], seed), KNOWN)
    assert found.subject >= 0.75, found.nearest_subjects
    assert found.style < -0.3


def teach(folder: Path, seed: int, **changes) -> list[Image.Image]:
    """Fine-tune the base on the demo's images with the demo's settings, and draw its subjects as ink drawings."""
    import everydream_kit as edk
    from everydream_kit.demo.main import TRAINING, generate_subjects
    from everydream_kit.generation import open_for_sampling

    config = edk.TrainConfig(
        **{
            **TRAINING,
            "resume_ckpt": "embedded",
            "data_root": str(images_path()),
            "project_name": "taught",
            "logdir": str(folder),
            "seed": seed,
            **changes,
        }
    )
    return generate_subjects(open_for_sampling(edk.train(config)), seed)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_demo_teaches_the_base_to_draw_in_ink(tmp_path, seed):
    from everydream_kit.demo.main import SUBJECTS, generate_subjects
    from everydream_kit.demo.score import score
    from everydream_kit.generation import open_for_sampling

    before = score(generate_subjects(open_for_sampling("embedded"), seed), SUBJECTS)
    after = score(teach(tmp_path, seed), SUBJECTS)
    assert before.style < 0
    assert after.style > 0.3
    assert after.style - before.style > 0.6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_without_learning_the_score_stays_where_it_was(tmp_path):
    """The test above cannot pass by itself: a rate too small to change anything leaves the base's own look."""
    from everydream_kit.demo.main import SUBJECTS
    from everydream_kit.demo.score import score

    assert score(teach(tmp_path, 1, lr=1e-12, max_epochs=2), SUBJECTS).style < 0
