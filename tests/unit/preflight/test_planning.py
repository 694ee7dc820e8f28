"""The plan: its line, its report, its JSON; what it corrects, what it says it assumed, and what it refuses."""

import json
import logging
import re

import pytest
from memory_stand_in import LinearMemory

from everydream_kit import TrainConfig
from everydream_kit import plan as public_plan
from everydream_kit import train as public_train
from everydream_kit.cli import main
from everydream_kit.errors import ConfigError, JobError, ModelError
from everydream_kit.preflight.planning import corrected, plan


@pytest.fixture
def settings(tmp_path, image_folder):
    """Twelve images of four buckets at 512 px, forty epochs."""
    return {
        "resume_ckpt": "base",
        "data_root": str(image_folder),
        "logdir": str(tmp_path / "logs"),
        "save_ckpt_dir": str(tmp_path / "models"),
        "sample_prompts": str(tmp_path / "none.txt"),
        "max_epochs": 40,
        "batch_size": 4,
        "gradient_checkpointing": True,
    }


def planned(settings, gpu="T4", price=None, **options):
    return plan(TrainConfig(**settings), gpu, price, estimate=options.pop("estimate", LinearMemory()), **options)


def test_the_line_says_steps_time_memory_disk_and_cost(settings):
    made = planned(settings, price=0.35)
    assert re.fullmatch(
        r"40 epochs → 160 steps → about (\d+ min|\d+ min \d\d s) on a T4 · 8\.6 of 14\.6 GiB · [\d.]+ GB disk · about 0\.\d+ USD",
        made.line,
    )
    assert made.cost == pytest.approx(0.35 * made.seconds / 3600)
    assert made.to_json()["idle_usd_per_hour"] == 0.35


def test_steps_are_the_trainers_own(settings):
    """Twelve images of four shapes make four batches of three each, and not three of four."""
    made = planned(settings)
    assert (made.steps.num_images, made.steps.per_epoch, made.steps.num_steps) == (12, 4, 160)
    assert made.steps.basis == "planned"
    assert planned({**settings, "max_steps": 50}).steps.num_steps == 50


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("z_image", {"clip_skip": 2, "min_snr_gamma": 5.0}, r"clip_skip: .*\nmin_snr_gamma: .*weighting_scheme"),
        ("flux1", {"attn_type": "slice"}, "attn_type: transformers have torch's own attention only"),
        ("sd1", {"timestep_shift": 3.0}, "timestep_shift: it is for flow matching"),
        (
            "anima",
            {"training_kind": "textual_inversion", "new_tokens": {"<a>": "b"}},
            r"training_kind textual_inversion: Anima is trained with full or lora\.\nnew_tokens: it learns no new words",
        ),
    ],
    indirect=["family"],
)
def test_a_plan_refuses_what_training_refuses_in_the_same_words(family, changes, words, family_folder, settings):
    changes = {"sample_prompts": "sample_prompts.txt", "resume_ckpt": str(family_folder), **changes}
    asked = TrainConfig(**{**settings, **changes})
    with pytest.raises(ConfigError, match=words) as planned_error:
        plan(asked, "L4")
    with pytest.raises(ConfigError) as trained_error:
        public_train(asked)
    assert str(planned_error.value) == str(trained_error.value)


@pytest.mark.parametrize("family", ["sd1", "z_image"], indirect=True)
def test_a_family_is_planned_from_its_own_configs(family, family_folder, settings):
    """Without a stand-in: a step holds the weights, their gradients and Adam's two states, four times the weights."""
    made = plan(TrainConfig(**{**settings, "resume_ckpt": str(family_folder), "optimizer": "adamw"}), "L4", price=0.8)
    assert (made.steps.per_epoch, made.steps.num_steps) == (4, 160)
    assert made.fits is True and made.seconds_of.keys() >= {"training", "samples", "latents"} and made.cost > 0
    phases = {phase.name: phase.peak_bytes for phase in made.memory.phases}
    assert phases.keys() >= {"latent caching", "training step", "sampling"}
    assert ("text caching" in phases) == (family == "z_image")
    kept = {item.name: item.most_bytes for item in made.disk.items}.get("text cache", 0)
    assert kept == 13 * made.memory.text_bytes  # of twelve images, and the empty one
    if kept:  # 100 tokens in bfloat16, or more where the template alone is longer
        width = json.loads((family_folder / "text_encoder" / "config.json").read_text())["hidden_size"]
        assert made.memory.text_bytes >= 2 * 100 * width and made.memory.text_bytes % (2 * width) == 0
    assert (kept > 0) == (family == "z_image")
    files = family_folder.glob("*/diffusion_pytorch_model.safetensors")
    denoiser = next(file for file in files if file.parent.name != "vae").stat().st_size
    assert phases["training step"] > 4 * denoiser
    assert made.disk.most_bytes > denoiser


@pytest.mark.parametrize(
    ("family", "values", "predictions"),
    [
        ("sd1", 8, 4 * 3 * 30 * 2),  # values kept for a cell; prompts, guidance scales, steps, and two predictions each
        ("z_image", 32, 4 * 1 * 30 * 2),
        ("flux2_klein", 32, 4 * 1 * 50 * 2),
        ("flux1", 32, 4 * 1 * 28 * 1),  # its guidance is an input
        ("anima", 32, 4 * 1 * 30 * 2),
    ],
    indirect=["family"],
)
def test_latents_and_samples_are_counted_as_the_family_has_them(family, values, predictions, family_folder, settings):
    changes = {"resume_ckpt": str(family_folder), "cache_latents": "disk", "optimizer": "adamw"}
    made = plan(TrainConfig(**{**settings, **changes}), "L4")
    kept = {item.name: item.most_bytes for item in made.disk.items}["latent cache"]
    assert kept == 48 * (128 + 2 * values * 3_904)  # four crops of twelve images, in float16
    encoded = made.seconds_of.get("captions", 0.0)  # twelve and the empty one, by a language model of some operations
    assert encoded == pytest.approx(13 * made.memory.text_flops / made.memory.step_flops * made.step.seconds)
    assert (encoded > 0) == (family != "sd1")
    measured = corrected(made, 2 * made.step.seconds)
    assert measured.seconds_of.get("captions", 0.0) == pytest.approx(2 * encoded)
    assert made.seconds_of["samples"] == pytest.approx(predictions * made.step.seconds / 16)


def test_time_is_training_samples_and_latents(settings):
    made = planned(settings)
    assert set(made.seconds_of) == {"training", "samples", "latents"}
    assert made.seconds_of["training"] == pytest.approx(160 * made.step.seconds)
    # one drawing of 4 prompts × 3 cfgs × 30 steps × 2 passes; a step is 4 images × 4 passes
    assert made.seconds_of["samples"] == pytest.approx(720 * made.step.seconds / 16)
    # 12 images with 4 crops each, at 1.4 passes; two steps of four never draw more than 8 of them
    assert made.seconds_of["latents"] == pytest.approx(48 * 1.4 * made.step.seconds / 16)
    short = {**settings, "max_steps": 2}
    assert planned(short).seconds_of["latents"] == pytest.approx(8 * 1.4 * made.step.seconds / 16)
    on_disk = planned({**short, "cache_latents": "disk"})
    assert on_disk.seconds_of["latents"] == pytest.approx(48 * 1.4 * made.step.seconds / 16)
    changed = planned({**settings, "plugins": ["somebodys.Plugin"]})  # which may change images at every use
    assert "latents" not in changed.seconds_of
    without = planned({**settings, "sample_steps": None, "cache_latents": "off"})
    assert set(without.seconds_of) == {"training"}


def test_the_report_says_what_is_computed_published_and_assumed(settings):
    text = planned(settings).text
    assert "s a step, computed: the GPU needs 1.6 s for 9.6 teraflops in fp16, the host" in text
    assert "for 4,500 kernels at 50 \u00b5s (assumed)" in text
    assert "fits: estimated 8.62 GiB, room 13.54 of 14.56 GiB" in text
    assert "0.196 USD an hour at Colab" in text and "read on 2022-09-30" in text
    assert "every epoch has as many steps as the first" in text
    published = planned(
        {**settings, "batch_size": 2, "disable_textenc_training": True, "amp_dtype": "fp16"}
    )  # the settings of a published row
    assert "published: ShivamShrirao/diffusers (https://github.com/" in published.text


def test_the_json_holds_all_of_it(settings):
    reported = json.loads(json.dumps(planned(settings, price=0.35, advise=True).to_json()))
    assert reported["steps"]["num_steps"] == 160
    assert reported["fits"] is True and reported["device"] == "T4"
    assert reported["cost_usd"] > 0 and reported["idle_usd_per_hour"] == 0.35
    assert reported["memory"]["peak_bytes"] < reported["room_bytes"] < reported["device_bytes"]
    assert reported["offer"] == {"batch_size": 16, "resolution": 1536}
    assert reported["disk"]["places"][0]["free_bytes"] > 0
    assert TrainConfig(**reported["config"]).batch_size == 4


def test_what_does_not_fit_is_said_first_and_how_it_would(settings):
    made = planned({**settings, "gradient_checkpointing": False, "batch_size": 16})
    assert made.fits is False
    assert "does not fit: 16.4 of 14.6 GiB" in made.line
    assert made.advice.changes == {"gradient_checkpointing": True, "checkpointing_share": 0.5}
    assert "to make it fit (12.8 GiB):" in made.text
    assert made.warnings[0].startswith("It does not fit the T4: 16.4 GiB are estimated; 13.5 GiB are available.")


def test_auto_is_planned_with_the_largest_that_fits(settings):
    made = planned({**settings, "batch_size": "auto", "gradient_checkpointing": False})
    assert made.config.batch_size == 10  # 8 + 5 of 13.5 GiB, the context of 0.4 next to
    assert any(note.startswith("batch_size auto: 10, the largest that fits, up to 16") for note in made.assumptions)


def test_a_dataset_that_is_not_here_leaves_the_steps_open(settings, tmp_path):
    for root in ("me/images", str(tmp_path / "absent"), str(tmp_path / "images.zip")):
        made = planned({**settings, "data_root": root})
        assert made.line.startswith("40 epochs → steps are known once the dataset is there → on a T4 · 8.6 of 14.6 GiB")
        assert any(f"data_root {root}: not looked at" in note for note in made.assumptions)
        assert (made.seconds, made.cost, made.disk) == (None, None, None)
    assert planned({**settings, "data_root": "me/images", "max_steps": 100}).steps.num_steps == 100


def test_a_huge_dataset_is_counted_and_not_opened(settings, monkeypatch):
    monkeypatch.setattr("everydream_kit.preflight.planning.MOST_SCANNED", 5)
    made = planned(settings)
    assert (made.steps.per_epoch, made.steps.basis) == (3, "counted")
    assert any("12 image files were counted and not opened" in note for note in made.assumptions)


def test_an_empty_dataset_is_a_warning(settings, tmp_path):
    (tmp_path / "empty").mkdir()
    made = planned({**settings, "data_root": str(tmp_path / "empty")})
    assert any("no image can be used" in warning for warning in made.warnings)


def test_measured_steps_correct_time_cost_and_saves(settings):
    made = planned({**settings, "ckpt_every_n_minutes": 10}, price=1.0)
    slower = corrected(made, 10 * made.step.seconds, steps_done=40)
    assert slower.step.basis == "measured here"
    assert slower.seconds == pytest.approx(10 * made.seconds)
    assert slower.cost == pytest.approx(10 * made.cost)
    assert slower.cost_left == pytest.approx(0.75 * slower.cost)
    assert slower.disk.most_bytes > made.disk.most_bytes  # more is saved in the longer time
    assert "120 of 160 steps" in slower.text
    with pytest.raises(ConfigError, match=r"measured_seconds_per_step: must be above 0 \(got 0\)"):
        corrected(made, 0)


def test_a_price_without_a_date_is_said_to_be_entered_and_none_where_none_is_known(settings):
    assert "0.2 USD an hour, entered" in planned(settings, price=0.2).text
    assert "about" not in planned(settings, gpu="P100").line.split("GiB")[1]
    assert "no price is known for it; give --price" in planned(settings, gpu="P100").text


def test_without_a_gpu_it_is_this_cpu(settings, monkeypatch):
    monkeypatch.setattr("everydream_kit.preflight.planning.this_gpu", lambda device: None)
    made = planned(settings, gpu=None)
    assert made.gpu_spec is None and made.price is None
    assert "on this CPU" in made.line
    assert made.step.basis == "computed"


def test_a_short_disk_is_a_warning(settings, monkeypatch):
    monkeypatch.setattr("everydream_kit.preflight.disk.free_disk", lambda folder: 10**9)
    assert any("1.0 GB are free there. Keep fewer checkpoints" in warning for warning in planned(settings).warnings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpu": "T5"}, "gpu: no GPU named 'T5' is known; did you mean T4"),
        ({"price": -1}, r"price: must be 0 or more US dollars an hour \(got -1\)"),
    ],
)
def test_what_is_wrong_is_one_clear_error(settings, arguments, message):
    with pytest.raises(ConfigError, match=message):
        planned(settings, **arguments)


def test_a_base_that_is_not_there_is_refused_before_anything_else(settings, tmp_path):
    with pytest.raises(ModelError, match="there is no such file or folder"):
        plan(TrainConfig(**{**settings, "resume_ckpt": str(tmp_path / "absent.safetensors")}), "T4")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(JobError, match="not a run folder"):
        plan(tmp_path)


def test_of_a_run_it_says_what_is_left(settings, tmp_path):
    folder = tmp_path / "logs" / "jets-20260101-000000"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(TrainConfig(**settings).to_json(), "utf-8")
    (folder / "status.json").write_text('{"step": 120}', "utf-8")
    made = plan(folder, "T4", 1.0, estimate=LinearMemory())
    assert made.steps_done == 120
    assert made.cost_left == pytest.approx(made.cost / 4)
    (folder / "status.json").write_text('{"step": 720, "num_steps": 800}', "utf-8")  # its batches were smaller before
    made = plan(folder, "T4", 1.0, estimate=LinearMemory())
    assert "left     80 of 800 steps" in made.text
    assert made.cost_left == pytest.approx(made.cost / 10)


def run_plan(capsys, *words):
    status = main(["plan", *map(str, words)])
    return status, capsys.readouterr()


@pytest.fixture
def embedded(tmp_path, image_folder, monkeypatch):
    """A settings file for the model that ships with the kit; what was estimated before is not kept."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "jets.json"
    values = {
        "resume_ckpt": "embedded",
        "data_root": str(image_folder),
        "resolution": 64,
        "batch_size": 2,
        "max_epochs": 3,
        "sample_steps": None,
    }
    path.write_text(json.dumps(values), "utf-8")
    return path


def test_the_command_plans_the_embedded_model_for_a_card_and_keeps_the_answer(embedded, capsys):
    """The real memory model, once; asked again, it answers from disk, whoever asks."""
    level = logging.getLogger("everydream_kit").level
    status, out = run_plan(capsys, embedded, "--gpu", "T4", "--price", "0.35", "--json")
    assert status == 0
    assert logging.getLogger("everydream_kit").level == level  # else a run in this process would write no log
    reported = json.loads(out.out)
    assert reported["fits"] and reported["steps"]["num_steps"] == 3 * reported["steps"]["per_epoch"]
    assert 4e6 < reported["memory"]["num_parameters"] < 12e6
    assert reported["step_seconds"]["basis"] == "computed"
    kept = list((embedded.parent / "logs" / ".edk_cache" / "preflight").glob("*.json"))
    assert len(kept) == 1
    again = public_plan(embedded, gpu="T4", price=0.35)
    assert again.memory.peak_bytes == reported["memory"]["peak_bytes"]
    status, out = run_plan(capsys, embedded, "--gpu", "T4", "--max_epochs", "6")
    assert status == 0
    assert out.out.startswith(f"plan     6 epochs → {2 * reported['steps']['num_steps']} steps → about")
    assert len(list(kept[0].parent.glob("*.json"))) == 1


def test_the_command_says_what_is_wrong_in_one_line(embedded, capsys):
    for words, message in [
        ((embedded, "--gpu", "T5"), "error: gpu: no GPU named 'T5' is known; did you mean T4"),
        ((embedded, "--gpu", "T4", "--price", "-2"), "error: price: must be 0 or more"),
        (("absent.json",), "error: absent.json: there is no such settings file"),
        (("--gpu", "T4"), "error: resume_ckpt: required, and not given"),
        ((embedded, "--config", embedded), "error: --config: two settings files are given"),
        ((embedded, "--lr", "-1"), "lr: must be greater than 0"),
    ]:
        status, out = run_plan(capsys, *words)
        assert (status, out.out) == (1, "")
        assert message in out.err


def test_the_setup_of_a_machine_is_not_changed_by_planning(settings, tmp_path):
    """Nothing is written but the memory of what was estimated and scanned."""
    planned(settings)
    written = {path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*") if path.is_file()}
    assert written <= {("logs", ".edk_cache")}
