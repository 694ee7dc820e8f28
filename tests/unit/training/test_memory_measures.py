"""Out of memory: recognized, and answered with what to lower."""

import pytest
import torch

from everydream_kit.config import TrainConfig
from everydream_kit.errors import MemoryLimitError
from everydream_kit.training.memory_measures import explain_out_of_memory, is_out_of_memory, measures_left


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_running_out_of_memory_is_recognized(error):
    assert is_out_of_memory(error)


def test_torchs_own_failure_to_allocate_is_recognized():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("out of memory"), KeyboardInterrupt()])
def test_other_errors_are_not(error):
    assert not is_out_of_memory(error)


def explain(**settings):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nlong advice")
    return explain_out_of_memory(error, TrainConfig(resume_ckpt="base", **settings))


def test_the_message_lists_what_to_lower_in_order():
    explained = explain(batch_size=4, optimizer="adamw")
    assert isinstance(explained, MemoryLimitError)
    lines = str(explained).splitlines()
    assert lines[0].startswith("The device ran out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.).")
    names = [line.split(". ", 1)[1].split(":")[0] for line in lines[1:]]
    assert [line.split(".")[0].strip() for line in lines[1:]] == [str(n) for n in range(1, len(names) + 1)]
    assert names == [
        "offload_idle_models",
        "gradient_checkpointing",
        "gradient_checkpointing",
        "batch_size, grad_accum",
        "attn_type",
        "optimizer",
        "fused_backward",
        "disable_textenc_training",
        "weight_dtype",
        "resolution",
        "training_kind",
    ]


def test_the_values_are_the_runs_own():
    text = str(explain(batch_size=6, grad_accum=2, resolution=768, optimizer="lion"))
    assert "batch_size, grad_accum: 3 and 4 instead of 6 and 2" in text
    assert "resolution: 640 instead of 768" in text
    assert "adamw8bit instead of lion" in text
    assert "fused_backward" not in text  # needs grad_accum 1


def test_what_is_lowered_already_is_not_named():
    text = str(
        explain(
            batch_size=1,
            gradient_checkpointing=True,
            offload_idle_models=True,
            fused_backward=True,
            disable_textenc_training=True,
            weight_dtype="bfloat16",
            attn_type="slice",
            resolution=256,
            training_kind="lora",
            quantization="nf4",
            blocks_to_swap="auto",
        )
    )
    assert "Everything that could be lowered is" in text


def test_settings_that_cost_memory_are_named_when_on():
    text = str(explain(disable_amp=True, cache_latents="off", ema_decay_rate=0.99, ema_device="cuda", cuda_graphs="on"))
    assert "cuda_graphs: off; gradients" in text
    for name in ("amp: switch it on", "cache_latents: auto", "ema_device: cpu instead of cuda"):
        assert name in text


def test_every_measure_can_be_taken_until_none_is_left():
    """Each leads to settings that are allowed, and is not offered again; so trying them one after the other ends."""
    config = TrainConfig(
        resume_ckpt="base",
        batch_size=8,
        optimizer="adamw",
        resolution=[512, 768],
        cache_latents="off",
        ema_decay_rate=0.9,
    )
    taken = []
    while left := list(measures_left(config)):
        taken.append(left[0].name)
        config = config.replace(**left[0].changes)
    assert taken[:2] == ["cache_latents", "offload_idle_models"]
    assert taken.count("batch_size, grad_accum") == 3
    assert (config.batch_size, config.grad_accum, config.resolutions) == (1, 8, (256,))
    assert taken[-4:] == ["training_kind", "blocks_to_swap", "quantization", "quantization"]


def test_a_smaller_batch_next_to_fused_backward_is_not_accumulated():
    config = TrainConfig(resume_ckpt="base", batch_size=4, fused_backward=True)
    (measure,) = [m for m in measures_left(config) if "batch_size" in m.name]
    assert measure.changes == {"batch_size": 2}
    assert config.replace(**measure.changes).batch_size == 2


def test_the_base_of_a_lora_is_quantized_before_anything_else_that_changes_the_result():
    lora = TrainConfig(resume_ckpt="base", training_kind="lora", batch_size=1)
    named = [(m.name, m.changes.get("quantization")) for m in measures_left(lora) if m.costs == "result"]
    assert named[0] == ("quantization", "int8")
    smaller = [(m.name, m.changes.get("quantization")) for m in measures_left(lora.replace(quantization="int8"))]
    assert smaller[-2:] == [("quantization", "nf4"), ("resolution", None)]
    assert "quantization" not in [m.name for m in measures_left(lora.replace(training_kind="full"))]


@pytest.mark.parametrize(
    ("family", "kind", "offered"),
    [
        ("sd1", "full", {"attn_type": True, "disable_textenc_training": True, "text_quantization": False}),
        ("z_image", "full", {"attn_type": False, "disable_textenc_training": False, "text_quantization": False}),
        ("flux1", "lora", {"attn_type": False, "disable_textenc_training": False, "text_quantization": True}),
        (None, "lora", {"attn_type": True, "disable_textenc_training": False, "text_quantization": False}),
    ],
)
def test_only_what_means_something_for_the_family_is_named(family, kind, offered):
    config = TrainConfig(resume_ckpt="base", training_kind=kind)
    names = [measure.name for measure in measures_left(config, family)]
    assert {name: name in names for name in offered} == offered
    assert names == [line.split(". ")[1].split(":")[0] for line in advice_lines(config, family)]


def advice_lines(config, family):
    return str(explain_out_of_memory(MemoryError(), config, family)).splitlines()[1:]


def test_only_what_works_on_a_sharded_model_is_named_for_one():
    config = TrainConfig(resume_ckpt="base", parallel="fsdp2", optimizer="adamw")
    left = list(measures_left(config))
    assert "resolution" in [measure.name for measure in left]
    for measure in left:
        config.replace(**measure.changes)
