"""Runs of flow transformers: resuming, their settings, captions that are encoded once, the plan."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_cases import CASES, FLOW, settings_for, weights_of
from PIL import Image
from safetensors.torch import load_file
from stop_after import StopAfter
from tiny_models import tiny_folder

from everydream_kit.config import TrainConfig
from everydream_kit.errors import ConfigError
from everydream_kit.models import sampling
from everydream_kit.models.loading import load_model
from everydream_kit.models.number_formats import EXACT
from everydream_kit.sessions import resume, train
from everydream_kit.training import offload, run_builder
from everydream_kit.training.reports import Listener, StepReport
from everydream_kit.training.run import Run


@pytest.fixture(params=FLOW)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def settings(family: str, tmp_path: Path) -> dict[str, Any]:
    return settings_for(family, tmp_path)


@pytest.mark.parametrize(
    "extra",
    [
        {"ema_decay_rate": 0.9, "ema_update_interval": 1, "timestep_sampling": "logit_normal"},
        {"training_kind": "lora", "lora_rank": 4, "timestep_sampling": "stratified", "gradient_checkpointing": True},
    ],
    ids=["full with EMA", "lora"],
)
def test_a_resumed_run_equals_one_that_never_stopped(
    settings: dict[str, Any], extra: dict[str, Any], tmp_path: Path
) -> None:
    validation = {"validation_config": {"auto_split_proportion": 0.25, "every_n_epochs": 0.5}}
    config = TrainConfig(**{**settings, **extra, **validation})
    whole = train(config)
    parted = train(config.replace(logdir=str(tmp_path / "parted")), listeners=[StopAfter(1)])
    resume(parted.folder)
    first, second = weights_of(whole), weights_of(parted)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    measured = [event["loss"] for event in whole.events("validation")]
    assert measured == [event["loss"] for event in parted.events("validation")]
    assert measured[-1] < measured[0]
    if "ema_decay_rate" in extra:
        averaged = weights_of(whole, "_ema")
        assert any(not torch.equal(averaged[name], first[name]) for name in averaged)


def test_settings_of_diffusion_are_refused_with_their_reasons(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        train(TrainConfig(**{**settings, "clip_skip": 2, "min_snr_gamma": 5.0, "enable_zero_terminal_snr": True}))
    for words in (
        "clip_skip: the layers of its",
        "min_snr_gamma: diffusion's noise schedule",
        "ends in pure noise already",
    ):
        assert words in str(refused.value)
    with pytest.raises(ConfigError, match=r"training_kind textual_inversion: .* is trained with full or lora"):
        train(TrainConfig(**{**settings, "training_kind": "textual_inversion", "new_tokens": {"<a>": "b"}}))


def test_settings_of_flow_matching_are_refused_for_diffusion_and_change_a_flow_run(settings: dict[str, Any]) -> None:
    plain = train(TrainConfig(**{**settings, "max_steps": 1}))
    losses = [next(plain.events("loss"))["loss"]]
    for number, changes in enumerate([{"timestep_shift": 0.2}, {"weighting_scheme": "cosmap"}]):
        config = TrainConfig(**{**settings, **changes, "max_steps": 1, "project_name": f"changed{number}"})
        losses.append(next(train(config).events("loss"))["loss"])
    assert len(set(losses)) == 3
    sd1 = {**settings, "resume_ckpt": str(tiny_folder("sd1"))}
    with pytest.raises(ConfigError, match=r"timestep_shift: it is for flow matching.*\n.*weighting_scheme: it is for"):
        train(TrainConfig(**{**sd1, "timestep_shift": 3.0, "weighting_scheme": "cosmap"}))


def test_a_distilled_base_is_warned_of(settings: dict[str, Any], family: str, tmp_path: Path) -> None:
    name = CASES[family].distilled
    distilled = Path(shutil.copytree(tiny_folder(family), tmp_path / name))
    run = train(TrainConfig(**{**settings, "resume_ckpt": str(distilled), "max_steps": 1}))
    assert any(name in event["message"] and "Train on" in event["message"] for event in run.events("warning"))


def test_captions_are_encoded_once_before_the_run_and_found_again(
    settings: dict[str, Any], family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from everydream_kit.models import encoding

    asked: list[str] = []
    encode = encoding.encode_captions
    monkeypatch.setattr(
        "everydream_kit.training.caching.encode_captions",
        lambda model, captions, *args: asked.extend(captions) or encode(model, captions, *args),
    )
    first = train(TrainConfig(**{**settings, "max_steps": 2}))
    assert sorted(asked) == sorted(["", *(f"a red square, number {10**number}" for number in range(4))])
    reports = [event["kind"] for event in first.events()]
    assert reports.index("text cache") < reports.index("loss")
    files = list((Path(settings["logdir"]) / ".edk_cache" / "texts").rglob("*.safetensors"))
    assert len(files) == 5
    kept = load_file(files[0])["encoder_hidden_states"]
    assert kept.dtype == torch.bfloat16
    assert kept.shape[1] <= CASES[family].num_tokens  # valid tokens alone, unless padding counts
    asked.clear()
    second = train(TrainConfig(**{**settings, "max_steps": 2, "project_name": "again"}))
    assert asked == []
    assert [e["loss"] for e in second.events("loss")] == [e["loss"] for e in first.events("loss")]


def test_samples_and_validation_do_without_the_text_encoder(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is known before the run is encoded then; at a prompt that is not, the text encoder comes for the text alone."""
    model_of: list[Any] = []
    calls: list[str] = []

    class Watched(offload.IdleModels):
        @contextmanager
        def at_work(self, modules: Any) -> Iterator[None]:
            names = {id(module): name for name, module in model_of[-1].modules().items()}
            here = {names[id(module)] for module in modules}
            calls.append("texts" if "text_encoder" in here else "others")
            with super().at_work(modules):
                yield
            calls.append("end")

    build = run_builder.build_caches
    monkeypatch.setattr(run_builder, "IdleModels", Watched)
    monkeypatch.setattr(
        run_builder,
        "build_caches",
        lambda config, model, *args, **rest: model_of.append(model) or build(config, model, *args, **rest),
    )
    monkeypatch.setattr(sampling, "encode_captions", None)  # by the cache alone
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a blue circle\n", encoding="utf-8")
    sampled = {"sample_steps": 1, "sample_prompts": str(prompts), "sample_num_inference_steps": 2, "max_steps": 2}
    measured = {"validation_config": {"auto_split_proportion": 0.25, "every_n_epochs": 0.5}}

    class Edit(Listener):
        def __call__(self, run: Run, report: StepReport) -> None:
            calls.append(f"step {report.step}")
            if report.step == 1:
                prompts.write_text("a green one\n", encoding="utf-8")

    run = train(TrainConfig(**{**settings, **sampled, **measured}), listeners=[Edit()])
    assert not list(run.events("warning"))
    assert len(list(run.samples_folder.glob("*.jpg"))) == 2
    assert any(run.events("validation"))
    first = calls.index("step 1")
    assert "texts" in calls[:first]
    after = calls[first:]
    assert after.count("texts") == 1  # for "a green one"
    assert after[after.index("texts") + 1] == "end"  # nothing else happens meanwhile


def test_samples_have_the_guidance_and_steps_that_are_usual_for_the_family(
    settings: dict[str, Any], family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, int]] = []

    def noted(model: Any, prompts: Any, **given: Any) -> list[Image.Image]:
        asked.append((prompts, given["num_inference_steps"]))
        return [Image.new("RGB", (64, 64)) for prompt in prompts for _ in prompt.cfgs]

    monkeypatch.setattr(sampling, "sample_images", noted)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a blue circle\n", encoding="utf-8")
    sampled = {"sample_steps": 1, "sample_prompts": str(prompts), "max_steps": 1}
    own: dict[str, Any] = {"sample_cfgs": [2.0, 1.0], "sample_num_inference_steps": 3, "project_name": "own"}
    train(TrainConfig(**{**settings, **sampled}))
    train(TrainConfig(**{**settings, **sampled, **own}))
    cfg, num_steps = CASES[family].usual
    assert [(prompts[0].cfgs, steps) for prompts, steps in asked] == [((cfg,), num_steps), ((2.0, 1.0), 3)]


def test_a_plan_estimates_the_phase_of_the_texts_apart_from_the_steps(settings: dict[str, Any], tmp_path: Path) -> None:
    from everydream_kit.preflight.memory_estimate import estimate_memory

    config = TrainConfig(**{**settings, "training_kind": "lora", "lora_rank": 4, "sample_steps": 2})
    estimate = estimate_memory(config, device="cuda", cache_folder=tmp_path / "kept")
    phases = {phase.name: phase.by_category for phase in estimate.phases}
    model = load_model(settings["resume_ckpt"])

    def allocated(name: str, num_bytes: int) -> int:  # of each number; the allocator gives multiples of 512
        own = model.modules()[name].named_parameters()
        sizes = [
            (4 if "embedding" in key else num_bytes) * p.numel() for key, p in own
        ]  # CLIP's, which is mostly words
        return sum(-(-size // 512) * 512 for size in sizes)

    texts, vae = (
        sum(allocated(slot.folder, 4 if slot.folder in EXACT else 2) for slot in model.family.text_encoders),
        allocated("vae", 4),
    )  # what is frozen is in half precision, the VAE excepted
    assert 0 <= phases["text caching"]["weights"] - (texts + vae) < texts / 4
    kept = allocated("transformer", 2) + vae + 4 * estimate.num_trained_parameters
    for name in ("training step", "sampling", "saving"):
        assert 0 <= phases[name]["weights"] - kept < texts / 4, name
    assert estimate.host_bytes >= texts


def test_a_gpu_without_bfloat16_is_refused_in_words(settings: dict[str, Any], tmp_path: Path) -> None:
    from everydream_kit.preflight.memory_estimate import estimate_memory

    config = TrainConfig(**{**settings, "training_kind": "lora"})
    with pytest.raises(ConfigError, match=r"exceed float16.*T4"):
        estimate_memory(config, device="cuda", has_bf16=False, cache_folder=tmp_path / "kept")
