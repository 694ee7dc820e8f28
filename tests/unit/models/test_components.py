"""Modules are built without values for their parameters, and with everything else as their constructors make it."""

import pytest
import torch

from everydream_kit.errors import ModelError
from everydream_kit.models.components import fill, parameters_on_meta
from everydream_kit.models.model_saving import own_state
from everydream_kit.models.tensors import LazyTensor


def qwen3():
    from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

    config = Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return Qwen3Model(config)


def t5():
    from transformers.models.t5.configuration_t5 import T5Config
    from transformers.models.t5.modeling_t5 import T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_heads=2, num_layers=1))


@pytest.mark.parametrize("held", ["shared.weight", "encoder.embed_tokens.weight"])
def test_a_weight_of_two_modules_is_read_once_under_either_name_and_written_under_one(held):
    whole = t5()
    tensors = {name: LazyTensor.of(value) for name, value in whole.state_dict().items()}
    tensors.pop(({"shared.weight", "encoder.embed_tokens.weight"} - {held}).pop())
    with parameters_on_meta():
        module = t5()
    fill(module, tensors, lambda name: torch.float32, "here")
    assert module.shared.weight is module.encoder.embed_tokens.weight
    assert torch.equal(module.shared.weight, whole.shared.weight)
    assert own_state(module).keys() == whole.state_dict().keys() - {"encoder.embed_tokens.weight"}


def qwen_image():
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=8,
        axes_dims_rope=(8, 4, 4),
    )


def run_qwen3(model):
    return model(torch.arange(6)[None]).last_hidden_state


def run_qwen_image(model):
    return model(
        hidden_states=torch.linspace(-1, 1, 4 * 16).reshape(1, 4, 16),
        encoder_hidden_states=torch.linspace(-1, 1, 3 * 8).reshape(1, 3, 8),
        encoder_hidden_states_mask=torch.ones(1, 3, dtype=torch.bool),
        timestep=torch.tensor([0.5]),
        img_shapes=[[(1, 2, 2)]],
        return_dict=False,
    )[0]


@pytest.mark.parametrize(("build", "run"), [(qwen3, run_qwen3), (qwen_image, run_qwen_image)])
def test_buffers_and_plain_tensors_that_no_file_holds_are_computed_by_the_constructor(build, run):
    torch.manual_seed(0)
    original = build().eval()
    state = torch.get_rng_state()
    with parameters_on_meta():
        model = build()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    tensors = {name: LazyTensor.of(value) for name, value in original.state_dict().items()}
    fill(model, tensors, lambda name: torch.float32, "memory")
    with torch.no_grad():
        assert torch.equal(run(model), run(original))


def test_each_weight_has_its_own_format_and_saved_buffers_keep_theirs():
    with parameters_on_meta():
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    values = {name: torch.ones(value.shape, dtype=torch.float64) for name, value in model.state_dict().items()}
    half = lambda name: torch.float16 if name.startswith("0.") else torch.float32  # noqa: E731
    fill(model, {name: LazyTensor.of(value) for name, value in values.items()}, half, "memory")
    found = {name: value.dtype for name, value in model.state_dict().items()}
    assert found == {
        "0.weight": torch.float16,
        "0.bias": torch.float16,
        "1.weight": torch.float32,
        "1.bias": torch.float32,
        "1.running_mean": torch.float32,
        "1.running_var": torch.float32,
        "1.num_batches_tracked": torch.int64,
    }


def test_a_saved_buffer_that_the_file_lacks_is_missing():
    with parameters_on_meta():
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    tensors = {name: LazyTensor.of(torch.ones(2)) for name in ("0.weight", "0.bias", "0.running_mean")}
    with pytest.raises(ModelError, match="2 missing, such as 0"):
        fill(model, tensors, lambda name: torch.float32, "memory")


def test_parameters_without_values_are_not_initialized(monkeypatch):
    """Torch goes through its reference code for each of them, which was a third of what building a model took."""
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel

    drawn = []
    monkeypatch.setattr(torch.Tensor, "normal_", lambda tensor, *_, **__: drawn.append(tensor.is_meta) or tensor)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda tensor, *_, **__: drawn.append(tensor.is_meta) or tensor)
    small = CLIPTextConfig(hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=1, vocab_size=9)
    with parameters_on_meta():
        CLIPTextModel(small)
        torch.nn.Linear(2, 2)
    assert not any(drawn)
    drawn.clear()
    torch.nn.Linear(2, 2)
    assert drawn == [False, False]
