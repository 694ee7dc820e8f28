"""LoRA, DoRA and new tokens on tiny models of every family: training them, and every way out and back in."""

from functools import cache

import numpy as np
import pytest
import torch
from tiny_models import FAMILY_NAMES, draw, tiny_folder

from everydream_kit.demo import base_model_path
from everydream_kit.errors import ConfigError, ModelError
from everydream_kit.export.lora_files import export_token
from everydream_kit.export.single_file_export import export_checkpoint
from everydream_kit.models.encoding import encode_captions
from everydream_kit.models.family import text_tower
from everydream_kit.models.loading import assemble, load_model, open_model
from everydream_kit.models.lora.files import apply_lora, read_lora, write_lora
from everydream_kit.models.lora.injection import add_lora, lora_of, lora_parameters
from everydream_kit.models.model_saving import save_model
from everydream_kit.models.tensors import open_safetensors
from everydream_kit.models.tokens import add_tokens


@pytest.fixture(params=FAMILY_NAMES)
def family(request):
    return request.param


@cache
def with_learned_lora(family, dora=False):
    """A model with an adapter that changes its images. Do not change it: tests share it."""
    model = load_model(tiny_folder(family))
    for index, parameter in enumerate(add_lora(model, 4, alpha=8, text_encoder=True, dora=dora)):
        with torch.no_grad():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return model


@cache
def learned_image(family, dora=False):
    """What it generates."""
    return draw(with_learned_lora(family, dora))


@cache
def image_without(family):
    """What its base generates."""
    return draw(load_model(tiny_folder(family)))


def distance(one, other):
    return np.abs(one - other).max()


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_survives_saving_merging_and_export(family, dora, tmp_path):
    model, image = with_learned_lora(family, dora), learned_image(family, dora)
    assert distance(image, image_without(family)) > 10
    save_model(model, tmp_path / "checkpoint")
    size = sum(path.stat().st_size for path in (tmp_path / "checkpoint").iterdir())
    assert size < 1_000_000  # the adapter alone, not its base
    live = load_model(tmp_path / "checkpoint")
    pairs = zip(lora_parameters(model), lora_parameters(live), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert live.lora == model.lora
    assert np.array_equal(draw(live), image)
    merged = assemble(open_model(tmp_path / "checkpoint"))
    assert merged.lora is None
    assert distance(draw(merged), image) <= 1
    single = export_checkpoint(tmp_path / "checkpoint", tmp_path / "merged.safetensors", "fp32")
    assert distance(draw(load_model(single)), image) <= 1


def test_a_fresh_adapter_changes_nothing_and_trains_alone(family):
    model = load_model(tiny_folder(family))
    parameters = add_lora(model, 4)
    assert distance(draw(model), image_without(family)) <= 1
    trained = [p for module in model.modules().values() for p in module.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in parameters}


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_lora_files_of_both_layouts_come_back(family, layout, tmp_path):
    model = with_learned_lora(family)
    base = open_model(tiny_folder(family))
    path = tmp_path / "lora.safetensors"
    write_lora(path, lora_of(model), model.family, base.configs["unet"], layout=layout)
    again = read_lora(path, base)
    assert distance(draw(assemble(apply_lora(base, again))), learned_image(family)) <= 1
    assert open_safetensors(path)[1]["modelspec.architecture"] == f"{model.family.modelspec_architecture}/lora"


def test_kohya_files_have_the_names_that_uis_know(tmp_path):
    names = {}
    for family in ("sd1", "sdxl"):
        model = with_learned_lora(family)
        path = tmp_path / f"{family}.safetensors"
        write_lora(path, lora_of(model), model.family, dict(model.unet.config), layout="kohya")
        names[family] = open_safetensors(path)[0]
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight" in names["sd1"]
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha" in names["sd1"]
    assert "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_out_0.lora_up.weight" in names["sdxl"]
    assert "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight" in names["sdxl"]


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_diffusers_loads_our_lora_files_to_the_same_image(family, layout, tmp_path):
    import diffusers

    model = with_learned_lora(family)
    write_lora(tmp_path / "a.safetensors", lora_of(model), model.family, dict(model.unet.config), layout=layout)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tiny_folder(family), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(tmp_path / "a.safetensors")
    settings = {"width": 64, "height": 64, "num_inference_steps": 3, "guidance_scale": 3.0}
    generator = torch.Generator("cpu").manual_seed(4)
    theirs = pipeline("a red square", generator=generator, **settings).images[0]
    assert distance(np.asarray(theirs).astype(int), learned_image(family)) <= 1


def test_a_lora_of_another_family_is_refused(tmp_path):
    model = with_learned_lora("sdxl")
    write_lora(tmp_path / "a.safetensors", lora_of(model), model.family, dict(model.unet.config), layout="kohya")
    with pytest.raises(ModelError, match="made for another model family"):
        read_lora(tmp_path / "a.safetensors", open_model(tiny_folder("sd1")))


def test_targets_are_names_or_expressions_and_must_fit_something():
    model = load_model(tiny_folder("sd1"))
    add_lora(model, 2, targets=["to_q", r"mid_block\..*\.conv1"])
    adapted = set(lora_of(model)["unet"])
    assert "mid_block.resnets.0.conv1" in adapted
    assert not any(name.endswith("to_k") for name in adapted)
    with pytest.raises(ConfigError, match="'banana' fits no layer"):
        add_lora(load_model(tiny_folder("sd1")), 2, targets=["banana"])
    with pytest.raises(ConfigError, match="not a regular expression"):
        add_lora(load_model(tiny_folder("sd1")), 2, targets=["("])


def test_new_tokens_start_as_their_words_and_train_alone(family, tmp_path):
    model = load_model(tiny_folder(family))
    rows = add_tokens(model, {"<cat>": "striped house"})
    new, words = (encode_captions(model, [f"a {text} here"]) for text in ("<cat>", "striped house"))
    assert torch.equal(new.encoder_hidden_states, words.encoder_hidden_states)
    if words.pooled is not None:
        assert torch.equal(new.pooled, words.pooled)
    frozen = {name: value.clone() for name, value in model.text_encoders[0].state_dict().items()}
    optimizer = torch.optim.AdamW(rows, lr=0.1, weight_decay=0.5)
    encode_captions(model, ["a <cat>"]).encoder_hidden_states.square().sum().backward()
    optimizer.step()
    changed = {
        name for name, value in model.text_encoders[0].state_dict().items() if not torch.equal(value, frozen[name])
    }
    assert {name.rpartition(".")[2] for name in changed} == {"new"}
    save_model(model, tmp_path / "checkpoint")
    again = load_model(tmp_path / "checkpoint")
    captions = ["a <cat> and a dog"]
    assert torch.equal(
        encode_captions(again, captions).encoder_hidden_states, encode_captions(model, captions).encoder_hidden_states
    )
    export_token(tmp_path / "checkpoint", tmp_path / "cat.safetensors")
    expected = {"clip_l", "clip_g"} if family == "sdxl" else {"emb_params"}
    assert open_safetensors(tmp_path / "cat.safetensors")[0].keys() == expected


def test_an_ordinary_word_cannot_be_a_new_token():
    with pytest.raises(ConfigError, match="'cat' is an ordinary word"):
        add_tokens(load_model(tiny_folder("sd1")), {"cat": "dog"})


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_second_call_keeps_the_words_of_the_first(family, tmp_path):
    model = load_model(tiny_folder(family))
    add_tokens(model, {"<cat>": "striped house"})
    with torch.no_grad():
        for rows in add_tokens(model, {}):
            rows.add_(1.0)
    before = encode_captions(model, ["a <cat> here"]).encoder_hidden_states
    later = add_tokens(model, {"<cat>": "dog", "<jet>": "<cat> plane"})
    assert all(len(rows) == 2 + 3 and rows.requires_grad for rows in later)
    assert torch.equal(encode_captions(model, ["a <cat> here"]).encoder_hidden_states, before)
    for rows in later:
        assert torch.equal(rows[2:4], rows[:2])  # <jet> starts from what <cat> has learned
    captions = ["a <cat> and a <jet>"]
    wanted = encode_captions(model, captions).encoder_hidden_states
    save_model(model, tmp_path / "checkpoint")
    assert torch.equal(encode_captions(load_model(tmp_path / "checkpoint"), captions).encoder_hidden_states, wanted)


def test_a_model_with_a_small_vocabulary_learns_words_too(tmp_path):
    model = load_model(base_model_path())
    (rows,) = add_tokens(model, {"<cat>": "cat"})
    with torch.no_grad():
        rows.add_(1.0)
    save_model(model, tmp_path / "checkpoint")
    again = load_model(tmp_path / "checkpoint")
    assert len(text_tower(again.text_encoders[0]).embeddings.token_embedding.weight) < 4000
    assert torch.equal(*(encode_captions(each, ["a <cat>"]).encoder_hidden_states for each in (model, again)))
