"""What is trained, and what is frozen. Real classes, on the meta device where no numbers are needed."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from everydream_kit.config.part_settings import TextEncoderGroup
from everydream_kit.errors import ConfigError
from everydream_kit.training.parameters import select_parameters


def select(model, **changes):
    """With the settings' defaults where a test says nothing."""
    plain = {"train_unet": True, "train_text_encoder": True, "unet_patterns": None, "unet_frozen_patterns": None}
    return select_parameters(model, **{**plain, "freezing": TextEncoderGroup(), **changes})


def frozen(**values):
    return TextEncoderGroup(**{f"text_encoder_{name}": value for name, value in values.items()})


def text_config():
    return CLIPTextConfig(
        vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2, projection_dim=8
    )


def make_model(text_encoders=1):
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    encoders = [CLIPTextModel(text_config()), CLIPTextModelWithProjection(text_config())]
    return SimpleNamespace(denoiser=unet, vae=vae, text_encoders=encoders[:text_encoders])


class OldShape(torch.nn.Module):
    """As transformers 4 has it: everything below `text_model`."""

    def __init__(self, new):
        super().__init__()
        self.text_model = new


def layers_of(part):
    return sorted({int(name.split("layers.")[1].split(".")[0]) for name, _ in part.parameters if "layers." in name})


def names_of(part):
    return {name.removeprefix("text_model.") for name, _ in part.parameters}


def test_by_default_everything_but_the_vae_is_trained():
    model = make_model()
    unet, text = select(model)
    assert (unet.name, text.name) == ("unet", "text encoder")
    assert len(unet.parameters) == len(list(model.denoiser.parameters()))
    assert len(text.parameters) == len(list(model.text_encoders[0].parameters()))
    assert unet.num_parameters == sum(p.numel() for p in model.denoiser.parameters())
    assert not any(p.requires_grad for p in model.vae.parameters())


@pytest.mark.parametrize(("frozen", "trained"), [("train_unet", "text encoder"), ("train_text_encoder", "unet")])
def test_a_disabled_part_is_left_out_and_asks_for_no_gradient(frozen, trained):
    model = make_model()
    parts = select(model, **{frozen: False})
    assert [part.name for part in parts] == [trained]
    module = model.denoiser if frozen == "train_unet" else model.text_encoders[0]
    assert not any(p.requires_grad for p in module.parameters())


def test_both_parts_disabled_is_an_error():
    with pytest.raises(ConfigError, match="nothing is left to train"):
        select(make_model(), train_unet=False, train_text_encoder=False)


@pytest.mark.parametrize("old_shape", [False, True], ids=["transformers 5", "transformers 4"])
def test_layers_are_frozen_from_the_front(old_shape):
    model = make_model()
    if old_shape:
        model.text_encoders = [OldShape(model.text_encoders[0])]
    freezing = frozen(freeze_embeddings=True, unfreeze_last_n_layers=2, freeze_final_layer_norm=True)
    text = select(model, freezing=freezing)[1]
    assert layers_of(text) == [2, 3]
    assert not any(name.startswith(("embeddings.", "final_layer_norm.")) for name in names_of(text))
    trained = {id(p) for _, p in text.parameters}
    assert all(p.requires_grad == (id(p) in trained) for p in model.text_encoders[0].parameters())


def test_each_kind_of_freezing_stands_alone():
    everything = names_of(select(make_model())[1])
    embeddings = names_of(select(make_model(), freezing=frozen(freeze_embeddings=True))[1])
    norm = names_of(select(make_model(), freezing=frozen(freeze_final_layer_norm=True))[1])
    assert everything - embeddings == {"embeddings.token_embedding.weight", "embeddings.position_embedding.weight"}
    assert everything - norm == {"final_layer_norm.weight", "final_layer_norm.bias"}
    assert layers_of(select(make_model(), freezing=frozen(unfreeze_last_n_layers=0))[1]) == []


def test_two_text_encoders_are_one_part_with_names_of_their_own():
    text = select(make_model(2), freezing=frozen(unfreeze_last_n_layers=1))[1]
    names = [name for name, _ in text.parameters]
    assert len(names) == len(set(names))
    assert {name.split(".")[0] for name in names} == {"0", "1"}
    assert any(name.endswith("text_projection.weight") for name in names)


def test_regular_expressions_choose_unet_parameters():
    model = make_model()
    unet = select(model, unet_patterns=["attn2", r"^conv_out\."], unet_frozen_patterns=["to_q"])[0]
    names = {name for name, _ in unet.parameters}
    assert "conv_out.weight" in names
    assert any("attn2.to_k" in name for name in names)
    assert all("attn2" in name or name.startswith("conv_out") for name in names)
    assert not any("to_q" in name for name in names)
    assert {name for name, p in model.denoiser.named_parameters() if p.requires_grad} == names


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["atn2"], r"unet_train_layers: 'atn2' is found in no parameter of the denoiser; one of them"),
        (["(attn"], r"unet_train_layers: '\(attn' is not a regular expression"),
    ],
)
def test_a_pattern_that_cannot_work_is_refused(patterns, message):
    with pytest.raises(ConfigError, match=message):
        select(make_model(), unet_patterns=patterns)


def test_selecting_again_undoes_the_first_choice():
    model = make_model()
    select(model, train_unet=False)
    assert len(select(model)[0].parameters) == len(list(model.denoiser.parameters()))


def test_a_frozen_parameter_loses_a_gradient_that_it_has():
    model = make_model()
    weight = model.denoiser.conv_in.weight
    weight.grad = torch.ones_like(weight)
    select(model, train_unet=False)
    assert weight.grad is None
