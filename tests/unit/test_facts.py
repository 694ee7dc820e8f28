"""The facts on the declarations: every parameter states them, and what is derived from them is right."""

from __future__ import annotations

import ast
import inspect
import re
import typing
from pathlib import Path
from typing import Annotated, get_args

import pytest

from everydream_kit.config import (
    Facts,
    Group,
    TrainConfig,
    config_warnings,
    facts,
    family_warnings,
    settings_without_meaning,
)
from everydream_kit.config.declaration import Effect, FamilyName, facts_of
from everydream_kit.errors import ConfigError
from everydream_kit.foreign import ASKED, DECIDED_HERE, TRAVELS
from everydream_kit.models.families import FAMILIES
from everydream_kit.start_folder import with_paths_from

EFFECTS = set(typing.get_args(Effect))


@pytest.mark.parametrize("name", TrainConfig.model_fields)
def test_every_parameter_states_its_facts(name: str) -> None:
    stated = facts()[name]
    assert set(stated.affects) <= EFFECTS
    assert stated.kinds
    assert stated.families
    assert {*stated.needs, *stated.unless, *stated.follows} <= TrainConfig.model_fields.keys()
    if stated.fsdp2 is not None:
        assert TrainConfig.model_fields[name].default in stated.fsdp2


def test_a_parameter_without_facts_is_an_error() -> None:
    class Bare(Group):
        """Bare."""

        one: Annotated[int, Facts(("result",), "resume")] = 1
        two: int = 2

    with pytest.raises(TypeError, match=r"^two: a parameter states its Facts once"):
        facts_of(Bare.model_fields)
    assert [name for name, one in inspect.signature(Facts).parameters.items() if one.default is one.empty] == [
        "affects",
        "change",
    ]


def test_a_setting_for_another_training_kind_is_warned_about() -> None:
    given = TrainConfig(resume_ckpt="x", lora_rank=4, new_tokens={"<a>": "b"})
    assert sorted(config_warnings(given)) == [
        "lora_rank: has no effect with training_kind full, only with lora.",
        "new_tokens: has no effect with training_kind full, only with textual_inversion.",
    ]
    assert config_warnings(TrainConfig(resume_ckpt="x", training_kind="lora", lora_rank=4)) == []


def test_a_setting_without_what_it_needs_is_warned_about() -> None:
    lonely = {"ema_update_interval": 3, "rated_dataset_target_dropout_percent": 9, "run_name": "a"}
    said = config_warnings(TrainConfig(resume_ckpt="x", **lonely))
    assert sorted(said) == [
        "ema_update_interval: has no effect without ema_decay_rate or ema_strength_target.",
        "rated_dataset_target_dropout_percent: has no effect without rated_dataset.",
        "run_name: has no effect without wandb.",
    ]
    together = {**lonely, "ema_decay_rate": 0.9, "rated_dataset": True, "wandb": True}
    assert config_warnings(TrainConfig(resume_ckpt="x", **together)) == []


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_family_refuses_what_has_no_meaning_for_it_but_settings_of_text_encoders_are_a_warning(family: str) -> None:
    without_meaning = {name for name, one in facts().items() if family not in one.families}
    warned = {name for name in without_meaning if name.startswith("text_encoder_")} | {"disable_textenc_training"}
    assert set(FAMILIES[family].refuses) == without_meaning - warned
    assert all(one.families != get_args(FamilyName) for one in facts().values() if one.refusal)


def test_every_setting_that_names_a_place_on_disk_follows_the_folder_that_a_run_was_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by what the declarations say that they name, so that a new one cannot be forgotten."""
    places = {
        name
        for name, one in facts().items()
        if re.search(r"\b(folders?|file|checkpoint|base model)\b", one.names) and not name.startswith("base_")
    }
    assert {"vae", "logdir", "validation_extra_data_roots"} <= places
    (tmp_path / "there" / "some").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    values = {name: {"a": "some"} if name == "validation_extra_data_roots" else "some" for name in places}
    found, notes = with_paths_from(TrainConfig(**values), tmp_path / "there")
    assert {note.partition(":")[0] for note in notes} == places
    assert Path(found.vae or "").is_dir()


def test_a_setting_for_other_families_is_named() -> None:
    class Wide(TrainConfig):
        """With a setting that one family has."""

        crop_conditioning: Annotated[bool, Facts(("result",), "resume", families=("sdxl",))] = False

    given = Wide(resume_ckpt="x", crop_conditioning=True)
    assert settings_without_meaning(given, "sdxl") == []
    assert settings_without_meaning(given, "sd1") == [
        "crop_conditioning: has no effect with a model of the family sd1, only with sdxl."
    ]


def test_a_text_encoder_that_is_never_trained_has_no_settings():
    given = TrainConfig(resume_ckpt="x", text_encoder_lr=1e-5, text_encoder_freeze_embeddings=True)
    named = [line.split(":")[0] for line in settings_without_meaning(given, "flux1")]
    assert named == ["text_encoder_lr", "text_encoder_freeze_embeddings"]
    assert settings_without_meaning(given, "sd1") == []


def test_a_weighting_without_a_bound_is_warned_of():
    given = {"resume_ckpt": "x", "weighting_scheme": "sigma_sqrt"}
    assert any("set timestep_start to 50 or more" in line for line in config_warnings(TrainConfig(**given)))
    assert config_warnings(TrainConfig(**given, timestep_start=50)) == []


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"torch_compile": True}, "torch_compile"),
        ({"weight_dtype": "bfloat16"}, "weight_dtype"),
        ({"training_kind": "lora"}, "training_kind"),
        ({"ema_decay_rate": 0.9}, "ema_decay_rate"),
        ({"amp_dtype": "fp16"}, "amp_dtype"),
        ({"amp_dtype": "fp16", "disable_amp": True}, None),
        ({"amp_dtype": "bf16", "gradient_checkpointing": True}, None),
    ],
)
def test_only_values_that_work_on_a_sharded_model_are_accepted_with_fsdp2(
    settings: dict[str, object], refused: str | None
) -> None:
    if refused is None:
        assert TrainConfig(resume_ckpt="x", parallel="fsdp2", **settings).parallel == "fsdp2"
        return
    with pytest.raises(ConfigError, match=rf"^parallel, {refused}: fsdp2 does not work with {refused} "):
        TrainConfig(resume_ckpt="x", parallel="fsdp2", **settings)


def test_what_a_fetched_run_may_bring_follows_from_the_facts() -> None:
    assert TRAVELS | ASKED.keys() | DECIDED_HERE == set(TrainConfig.model_fields)
    assert {"plugins", "optimizer", "push_to", "data_root", "wandb", "save_ckpt_dir"} <= ASKED.keys()
    assert frozenset({"logdir"}) == DECIDED_HERE


PACKAGE = Path(__file__).parents[2] / "everydream_kit"
OTHER_MEANING = {
    "data/cache.py": {"num_workers", "batch_size"},  # how many are encoded together
    "data/captioning.py": {"batch_size"},  # images that a captioning model sees together
    "data/captions.py": {"keep_tags"},  # of one caption
    "data/epoch_plan.py": {"grad_accum", "max_epochs"},  # a plan of one epoch
    "data/latent_encoding.py": {"num_workers", "batch_size"},
    "data/loader.py": {"num_workers"},
    "models/encoding.py": {"clip_skip"},
    "models/family.py": {"clip_skip", "lora_targets"},  # of one family
    "models/lora/injection.py": {"seed"},
    "models/random_models.py": {"seed"},
    "models/sampling.py": {"seed", "clip_skip", "batch_size"},  # of images without a run
    "actions/comparison.py": {"seed", "clip_skip"},
    "generation.py": {"clip_skip"},
    "training/everydream2_optimizers.py": {"lr", "eps", "weight_decay", "d0"},  # torch's form of an optimizer
    "training/dowg.py": {"lr", "d0", "weight_decay"},
    "training/ranks.py": {"gpuid"},
    "training/optimizers.py": {"fused_backward", "weight_decay"},  # a table of optimizers has its own
    "training/run_builder.py": {"plugins"},
}
"""Arguments that share a setting's name and stand for something else, or come without a run, by file."""


def arguments_with_literal_defaults(path: Path) -> set[str]:
    """Names of arguments and fields whose default is written out, None and calls excluded."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        pairs: list[tuple[str, ast.expr | None]] = []
        if isinstance(node, ast.FunctionDef):
            positional = [*node.args.posonlyargs, *node.args.args]
            names = [one.arg for one in positional[len(positional) - len(node.args.defaults) :]]
            pairs += zip(names, node.args.defaults, strict=True)
            pairs += zip([one.arg for one in node.args.kwonlyargs], node.args.kw_defaults, strict=True)
        elif isinstance(node, ast.ClassDef):
            fields = [one for one in node.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)]
            pairs += [(one.target.id, one.value) for one in fields if isinstance(one.target, ast.Name)]
        found |= {
            name
            for name, default in pairs
            if isinstance(default, (ast.Constant, ast.Tuple, ast.List)) and getattr(default, "value", 0) is not None
        }
    return found


def test_a_settings_default_stands_in_its_declaration_only() -> None:
    again = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).as_posix()
        if not place.startswith(("config/", "everydream2/", "cli/", "panels/")):
            names = arguments_with_literal_defaults(path) & TrainConfig.model_fields.keys()
            again |= {place: names} if names else {}
    assert again == OTHER_MEANING


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"zero_frequency_noise_ratio": 0.05}, "zero_frequency_noise_ratio"),
        ({"clip_grad_norm": 1.0}, None),
    ],
)
def test_what_flow_matching_makes_doubtful_is_said(settings, named):
    config = TrainConfig(resume_ckpt="m", data_root="d", **settings)
    warnings = family_warnings(config, "z_image")
    assert [warning.split(":")[0] for warning in warnings] == ([] if named is None else [named])
    assert not [w for w in family_warnings(config, "sd1") if w.startswith("zero_frequency")]
