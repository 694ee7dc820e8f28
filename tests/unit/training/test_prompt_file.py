"""What a prompt file may hold, and what a mistake in it costs."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any, get_args

import pytest

from everydream_kit.config.sample_settings import SampleGroup, SamplerName
from everydream_kit.errors import ConfigError
from everydream_kit.models.families import FAMILIES
from everydream_kit.models.family import Family
from everydream_kit.models.sampling_schedulers import SAMPLERS, sampler_by_name
from everydream_kit.training.prompt_file import MOST_SAMPLES, PromptFile, SampleSettings, read_prompt_file
from everydream_kit.training.sampling_listener import clean_for_file_name, plan_prompts

DEFAULTS = SampleSettings.of(SampleGroup())
EVERYDREAM_2 = """{
  "batch_size": 3,    # lower this if memory is short
  "seed": 555,
  "cfgs": [7, 4],
  "scheduler": "dpm++",
  "num_inference_steps": 15, // fewer for dpm++
  "show_progress_bars": true,
  "samples": [
    {"prompt": "a # that is not a comment, https://nor.is/this", "negative_prompt": "distorted"},
    {"prompt": "a man on a bicycle", "seed": -1},
    {"random_caption": true, "cfgs": [1, 11], "size": [640, 384]}
  ]
}"""
"""The layout of the file that EveryDream 2 ships, with its comments."""


def read(tmp_path: Path, content: Any) -> PromptFile:
    path = tmp_path / "prompts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return read_prompt_file(path, DEFAULTS)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_samples_have_a_size_that_the_family_samples(tmp_path: Path, family: Family) -> None:
    file = read(tmp_path, {"samples": [{"prompt": "a"}, {"prompt": "b", "aspect_ratio": 0.5}]})
    multiple = family.sampler.size_multiple
    planned = plan_prompts(file.settings, None, seed=0, resolution=72, step=0, multiple=multiple)
    assert (planned[0].width, planned[0].height) == (72 // multiple * multiple,) * 2
    assert not any(side % multiple for one in planned for side in (one.width, one.height))


def test_everydream_2s_own_file_is_read_whole(tmp_path: Path) -> None:
    file = read(tmp_path, EVERYDREAM_2)
    assert file.problems == ()
    assert (file.settings.batch_size, file.settings.scheduler, file.settings.num_inference_steps) == (3, "dpm++", 15)
    first, second, third = file.settings.samples
    assert first.prompt == "a # that is not a comment, https://nor.is/this"
    assert (first.cfgs, second.seed, third.cfgs, third.size) == (None, -1, [1, 11], [640, 384])


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("scheduler", "dimm", "'ddim'"),
        ("cfgs", "high", "[7.0, 4.0, 1.01]"),
        ("cfgs", [], "[7.0, 4.0, 1.01]"),
        ("cfgs", [-1], "[7.0, 4.0, 1.01]"),
        ("num_inference_steps", 0, "30"),
        ("seed", 2**64, "the run's own value"),
        ("resolution", 500, "the run's own value"),
        ("resolution", 10**9, "the run's own value"),
        ("batch_size", 0, "'auto'"),
        ("batch_size", "some", "'auto'"),
        ("generate_samples_every_n_steps", "often", "the run's own value"),
        ("generate_pretrain_samples", "perhaps", "False"),
    ],
)
def test_a_wrong_value_is_named_and_replaced_and_all_else_holds(
    tmp_path: Path, name: str, value: Any, instead: str
) -> None:
    file = read(tmp_path, {name: value, "show_progress_bars": True, "samples": [{"prompt": "a cat"}]})
    [problem] = file.problems
    assert problem.startswith(f"{name}: ") and problem.endswith(f"; {instead} is used instead.")
    assert getattr(file.settings, name) == getattr(DEFAULTS, name)
    assert [entry.prompt for entry in file.settings.samples] == ["a cat"]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"prompt": "x", "size": [100, 100]}, "samples.1.size: must be a multiple of 8 (got 100)"),
        ({"prompt": "x", "size": [8, 64]}, "samples.1.size: must be greater than or equal to 64 (got 8)"),
        ({"prompt": "x", "size": [64]}, "samples.1.size: "),
        ({"prompt": "x", "size": [2**40, 64]}, "samples.1.size: must be less than or equal to 4096"),
        ({"prompt": "x", "seed": -(2**63) - 1}, "samples.1.seed: "),
        ({"prompt": "x", "seed": 2**64}, "samples.1.seed: "),
        ({"prompt": "x", "cfgs": ["high"]}, "samples.1.cfgs: "),
        ({"prompt": "x", "aspect_ratio": 0}, "samples.1.aspect_ratio: must be greater than 0 (got 0)"),
        ({"prompt": 5}, "samples.1.prompt: "),
        ({"promt": "x"}, "samples.1.promt: unknown setting, not used; did you mean prompt?"),
        ({"prompt": "half a \ud800 letter"}, "samples.1.prompt: "),
        (7, "samples.1: must be an object {...} (got 7)"),
    ],
)
def test_a_wrong_sample_is_named_and_costs_no_other(tmp_path: Path, entry: Any, words: str) -> None:
    file = read(tmp_path, {"samples": [{"prompt": "a cat"}, entry, {"prompt": "a dog"}]})
    assert [sample.prompt for sample in file.settings.samples] == ["a cat", "a dog"]
    assert file.problems[0].startswith(words)
    assert file.problems[-1].endswith("this sample is skipped.")
    assert read(tmp_path, {"samples": [entry]}).is_empty and not file.is_empty


def test_unknown_names_are_named_and_the_rest_is_used(tmp_path: Path) -> None:
    file = read(tmp_path, {"schedular": "euler", "doc": {"a": 1}, "samples": [{"prompt": "x", "steps": 5}]})
    assert file.problems == (
        "schedular: unknown setting, not used; did you mean scheduler?",
        "samples.0.steps: unknown setting, not used.",
    )
    assert [entry.prompt for entry in file.settings.samples] == ["x"]


def test_null_means_not_given_and_a_lone_number_or_text_is_a_list_or_a_prompt(tmp_path: Path) -> None:
    names = [*SampleSettings.model_fields]
    assert read(tmp_path, dict.fromkeys(names)) == PromptFile(DEFAULTS)
    file = read(tmp_path, {"cfgs": 5, "samples": ["a cat", {"prompt": "a dog", "size": None, "cfgs": 3}]})
    assert (file.problems, file.settings.cfgs, file.settings.samples[1].cfgs) == ((), [5], [3])
    assert [entry.prompt for entry in file.settings.samples] == ["a cat", "a dog"]


def test_seeds_are_taken_up_to_the_last_that_torch_takes(tmp_path: Path) -> None:
    seeds = [-(2**63), -1, 2**64 - 1]
    file = read(tmp_path, {"samples": [{"prompt": "x", "seed": seed} for seed in seeds]})
    assert [entry.seed for entry in file.settings.samples] == seeds and not file.problems


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"cfgs": [1,]', "line 1, column"),
        ("[1]", "holds a list [...] where an object {...} is expected"),
        ("[" * 100_000, "nested more than 64 deep"),
        ('{"seed": ' + "9" * 10_000 + "}", "a whole number of 10,000 digits"),
        ('{"cfgs": [NaN]}', "NaN is not a number"),
        ("\x00\x01", "not text"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_words(tmp_path: Path, content: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"prompts\.json") as error:
        read(tmp_path, content)
    assert words in str(error.value)


def test_of_lines_only_so_many_are_read_and_any_text_encoding_is(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n" * (MOST_SAMPLES + 5), "utf-16")
    file = read_prompt_file(path, DEFAULTS)
    assert len(file.settings.samples) == MOST_SAMPLES
    assert file.problems == ("samples: the first 1,000 of 1,005 are used.",)


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("ddim", "DDIM"),
        ("pndm", "PLMS"),
        ("ddpm", "DDPM"),
        ("lms", "LMS"),
        ("euler", "Euler"),
        ("euler_a", "Euler a"),
        ("kdpm2", "DPM2 a"),
        ("dpm++", "DPM++ 2M"),
        ("dpm++_2s", "DPM++ 2S"),
        ("dpm++_2m", "DPM++ 2M"),
        ("dpm++_sde", "DPM++ SDE"),
        ("dpm++_2m_sde", "DPM++ 2M SDE"),
        ("dpm++_2s_k", "DPM++ 2S Karras"),
        ("dpm++_2m_k", "DPM++ 2M Karras"),
        ("dpm++_sde_k", "DPM++ SDE Karras"),
        ("dpm++_2m_sde_k", "DPM++ 2M SDE Karras"),
        ("DPM++ SDE Karras", "DPM++ SDE Karras"),
        ("dpmpp_sde", "DPM++ SDE"),
    ],
)
def test_every_scheduler_of_everydream_2_is_the_one_that_it_names(name: str, title: str) -> None:
    assert sampler_by_name(name).title == title


def test_the_setting_offers_every_scheduler() -> None:
    assert get_args(SamplerName) == tuple(SAMPLERS)


def test_what_the_file_says_wins_over_the_settings_and_the_rest_is_theirs(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text('{"cfgs": [2], "num_inference_steps": "many"}', "utf-8")
    settings = SampleGroup(sample_cfgs=[5.0], sample_num_inference_steps=12, sample_seed=3, sample_scheduler="euler")
    file = read_prompt_file(path, SampleSettings.of(settings))
    read = file.settings
    assert (read.cfgs, read.num_inference_steps, read.seed, read.scheduler) == ([2], 12, 3, "euler")
    [problem] = file.problems
    assert problem.startswith("num_inference_steps: ")
    assert problem.endswith("; 12 is used instead.")


def test_file_names_are_cut_by_bytes_between_letters() -> None:
    assert clean_for_file_name("龍" * 100) == "龍" * 40
    assert len(clean_for_file_name("a" * 300)) == 100
    assert clean_for_file_name("a/b: c?.") == "ab c"


def test_a_file_of_a_million_lines_is_refused_in_words_and_takes_no_memory(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"a photo of a cat on a sofa\n" * 1_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=r"prompts\.txt: larger than 1 MiB"):
            read_prompt_file(path, DEFAULTS)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("size", "batch_size", "resolution", "together"),
    [
        ((512, 512), 1, 512, 4),
        ((768, 768), 1, 768, 1),
        ((1024, 1024), 1, 1024, 1),
        ((1024, 1024), 2, 1024, 2),  # never more than a training batch holds
        ((1152, 896), 8, 1024, 4),  # a bucket of that class; more than 4 is no faster
        ((512, 512), 2, 1024, 4),
        ((2048, 2048), 1, 512, 1),
    ],
)
def test_auto_samples_as_many_pixels_together_as_are_trained_or_keep_a_gpu_busy(
    tmp_path: Path, size: tuple[int, int], batch_size: int, resolution: int, together: int
) -> None:
    trained_pixels = batch_size * resolution**2
    assert DEFAULTS.images_together(*size, trained_pixels) == together
    assert read(tmp_path, {"batch_size": 7}).settings.images_together(*size, trained_pixels) == 7
