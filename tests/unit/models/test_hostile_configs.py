"""Model folders of strangers: what their configs may say, and that everything else is one ModelError, soon."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from everydream_kit.errors import ModelError
from everydream_kit.models.components import build_component
from everydream_kit.models.families import FAMILIES
from everydream_kit.models.family import Component
from everydream_kit.models.loading import load_model, training_scheduler
from everydream_kit.models.lora.adapter_settings import LoraSettings
from everydream_kit.models.model_files import open_folder
from everydream_kit.models.tokenizer import load_tokenizer, read_vocabulary

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 100}
HUGE = 10**30
UNET, VAE, TEXT_ENCODER = FAMILIES["sd1"].components
DEEP = json.loads("[" * 200 + "]" * 200)


@pytest.fixture
def folder(tmp_path: Path, tiny_model_folder: Path) -> Path:
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model", copy_function=link))


def link(source: str, target: str) -> None:
    """Weights are linked, small files copied, since the tests change these."""
    if source.endswith(".safetensors"):
        Path(target).hardlink_to(source)
    else:
        shutil.copy(source, target)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("value", ["stranger/kernel", "stranger/kernel@main:evil", "eager", {"": "stranger/kernel"}])
def test_a_config_does_not_choose_the_attention(key: str, value: Any) -> None:
    module: Any = build_component(TEXT_ENCODER, {**TINY, key: value})
    assert module.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "extra",
    [
        {"auto_map": {"AutoModel": "stranger/x--evil.Model"}},
        {"quantization_config": {"quant_method": "stranger"}},
        {"torch_dtype": "evil", "dtype": 3},
        {"_name_or_path": "stranger/x", "trust_remote_code": True},
        {"tp_plan": {"layers": "evil"}, "use_kernels": True},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_keys_that_do_not_shape_the_module_do_not_reach_the_library(extra: dict[str, Any]) -> None:
    values = build_component(TEXT_ENCODER, {**TINY, **extra}).config.to_dict()
    assert not [key for key in extra if values.get(key) not in (None, "", torch.float32, "float32")]
    shape = {"block_out_channels": [32], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    unet = build_component(UNET, {**shape, "mid_block_type": None, "cross_attention_dim": 8, **extra})
    assert not [key for key in extra if key in unet.config and key != "_name_or_path"]


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": "12"},
        {"hidden_size": HUGE},
        {"hidden_size": 0},
        {"hidden_size": None},
        {"hidden_size": []},
        {"num_attention_heads": 0},
        {"num_attention_heads": 1.5},
        {"hidden_act": "evil"},
        {"hidden_act": 3},
        {"vocab_size": -5},
        {"layer_norm_eps": "tiny"},
        {"max_position_embeddings": HUGE},
        {"architectures": "EvilModel"},
        {"architectures": [["CLIPTextModel"]]},
        {"architectures": ["..CLIPTextModel"]},
    ],
    ids=str,
)
def test_a_text_encoder_that_cannot_be_built_is_one_error(values: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"text.encoder"):
        build_component(TEXT_ENCODER, {**TINY, **values})


@pytest.mark.parametrize("component", [UNET, VAE], ids=lambda component: component.folder)
@pytest.mark.parametrize(
    "values",
    [
        {"layers_per_block": 10**9},
        {"layers_per_block": -3},
        {"layers_per_block": "many"},
        {"block_out_channels": [64] * 10_000},
        {"block_out_channels": [HUGE]},
        {"block_out_channels": DEEP},
        {"block_out_channels": "evil"},
        {"block_out_channels": [[]]},
        {"down_block_types": ["os.system"]},
        {"down_block_types": 3},
        {"norm_num_groups": 0},
        {"act_fn": "evil"},
        {"act_fn": 7},
        {"_class_name": "..Evil"},
        {"_class_name": ["UNet2DConditionModel"]},
    ],
    ids=lambda values: str(values)[:40],
)
def test_a_unet_or_vae_that_cannot_be_built_is_one_error(component: Component, values: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"AutoencoderKL|UNet2DConditionModel"):
        build_component(component, values)


def test_many_layers_are_refused_before_they_are_built() -> None:
    with pytest.raises(ModelError, match="at most 2000 in all"):
        build_component(UNET, {"layers_per_block": [90] * 4, "transformer_layers_per_block": [90] * 4})


@pytest.mark.parametrize(
    "values",
    [
        {"num_train_timesteps": HUGE},
        {"num_train_timesteps": 0},
        {"num_train_timesteps": "1000"},
        {"num_train_timesteps": True},
        {"beta_start": -1},
        {"beta_start": None},
        {"beta_end": "evil"},
        {"beta_schedule": "evil"},
        {"beta_schedule": []},
        {"trained_betas": "evil"},
        {"trained_betas": ["a"] * 1000},
        {"trained_betas": [0.1]},
        {"trained_betas": [2.0] * 1000},
        {"prediction_type": ["epsilon"]},
    ],
    ids=lambda values: str(values)[:40],
)
def test_a_noise_schedule_that_cannot_be_computed_is_one_error(folder: Path, values: dict[str, Any]) -> None:
    change(folder / "scheduler" / "scheduler_config.json", **values)
    with pytest.raises(ModelError):
        open_folder(folder)


def test_the_schedules_of_published_models_are_accepted(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    for values in (
        {},
        {"trained_betas": None},
        {"trained_betas": [0.01] * 1000},
        {"_class_name": "EulerDiscreteScheduler"},
    ):
        change(path, **values)
        assert training_scheduler(open_folder(folder).scheduler_config, "epsilon", False) is not None


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"a": 1e999}', '{"a": ' + "9" * 6000 + "}", "\xff", "null"])
@pytest.mark.parametrize("name", ["unet/config.json", "model_index.json", "scheduler/scheduler_config.json"])
def test_json_that_is_none_is_one_error(folder: Path, name: str, text: str) -> None:
    (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=Path(name).name):
        open_folder(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", []),
        ("vocab.json", {"a": "b"}),
        ("vocab.json", {"a": 10**9}),
        ("vocab.json", {"a": -1}),
        ("vocab.json", {"a": 1, "b": 1}),
        ("vocab.json", "[" * 100_000),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["stranger/x--evil.Tokenizer", None]}}),
        ("tokenizer_config.json", {"vocab_file": "/etc/passwd"}),
        ("tokenizer_config.json", {"model_max_length": 10**40}),
        ("tokenizer_config.json", "["),
        ("special_tokens_map.json", {"pad_token": 7}),
        ("special_tokens_map.json", {"pad_token": {"content": []}}),
        ("special_tokens_map.json", []),
        ("added_tokens.json", ["a"]),
        ("tokenizer.json", {"model": 3}),
        ("tokenizer.json", {"model": {"vocab": 3, "merges": [["a"]]}}),
    ],
    ids=lambda one: str(one)[:50],
)
def test_a_tokenizer_that_is_none_is_one_error(folder: Path, name: str, content: Any) -> None:
    place = folder / "tokenizer"
    if name == "tokenizer.json":
        (place / "vocab.json").unlink()
    (place / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(place)
    if name in ("vocab.json", "tokenizer.json"):
        with pytest.raises(ModelError, match="tokenizer"):
            read_vocabulary(place)


@pytest.mark.parametrize("length", [10**30 + 19884624838656, "evil", None, 5])
def test_a_tokenizer_reads_a_window_whatever_its_config_says(folder: Path, length: Any) -> None:
    change(folder / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    assert load_tokenizer(folder / "tokenizer").model_max_length == 77


@pytest.mark.parametrize(
    "values",
    [
        None,
        [],
        {"rank": HUGE},
        {"rank": 0},
        {"rank": "evil"},
        {"rank": True},
        {"alpha": "evil"},
        {"dropout": 2},
        {"dropout": None},
        {"targets": "evil"},
        {"targets": [3]},
        {"text_encoder": "yes"},
        {"dora": 1},
    ],
    ids=str,
)
def test_lora_settings_that_are_none_are_one_error(values: Any) -> None:
    with pytest.raises(ModelError, match="adapter: its LoRA settings"):
        LoraSettings.from_json(values)


@pytest.mark.parametrize(
    "base",
    [None, [], {}, {"source": 3}, {"source": "."}, {"source": "x", "token": "hf_x"}, {"source": "x", "revision": []}],
    ids=str,
)
def test_an_adapter_whose_base_is_none_is_one_error(tmp_path: Path, base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # "." is then the adapter itself, which would be loaded forever
    (tmp_path / "adapter.json").write_text(json.dumps({"version": 1, "base": base}))
    with pytest.raises(ModelError, match=r"adapter\.json"):
        load_model(tmp_path)


def test_a_persons_own_base_stands_in_for_the_adapters(tmp_path: Path, tiny_model_folder: Path) -> None:
    (tmp_path / "adapter.json").write_text(json.dumps({"version": 1, "base": {"source": "stranger/base"}}))
    model = load_model(tmp_path, adapter_base={"source": str(tiny_model_folder)})
    assert model.origin == {"source": str(tiny_model_folder)}
