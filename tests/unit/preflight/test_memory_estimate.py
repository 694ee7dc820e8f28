"""Estimating memory: what is counted, what follows from a setting, and that asking again is cheap."""

import pytest
import torch
from small_architecture import SMALL, small_architecture

from everydream_kit.config import TrainConfig, facts
from everydream_kit.errors import ConfigError
from everydream_kit.models.family import SamplerSpec
from everydream_kit.models.random_models import build_model, write_model
from everydream_kit.preflight import memory_estimate, rehearsal
from everydream_kit.preflight.memory_estimate import estimate_memory, sampled_together
from everydream_kit.preflight.memory_records import MemoryEstimate, Phase

MIB = 2**20


@pytest.fixture(scope="session")
def kept(tmp_path_factory):
    """Where this session's estimates are kept, so that no two tests go through the same run."""
    return tmp_path_factory.mktemp("estimates")


@pytest.fixture
def estimate(kept):
    def ask(device="cuda", **changes):
        base = {"resume_ckpt": "none", "resolution": 64, "batch_size": 1, "sample_steps": None, "optimizer": "adamw"}
        config = TrainConfig(**{**base, **changes})
        return estimate_memory(config, device=device, architecture=small_architecture(), cache_folder=kept)

    return ask


@pytest.fixture(scope="session")
def real_model():
    return build_model("sd1", **SMALL)


def phase(found, name="training step"):
    return next(one for one in found.phases if one.name == name)


def numbers(*modules):
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def test_weights_and_optimizer_states_are_those_of_the_real_modules(estimate, real_model):
    found = estimate(device="cpu")
    trained = numbers(real_model.unet, *real_model.text_encoders)
    assert found.num_trained_parameters == trained
    assert found.num_parameters == trained + numbers(real_model.vae)
    by_category = phase(found).by_category
    held = sum(t.nbytes for m in real_model.modules().values() for t in [*m.parameters(), *m.buffers()])
    assert by_category["weights"] == held
    # AdamW keeps two float32 numbers for each weight, and a step count for each tensor.
    tensors = sum(1 for m in (real_model.unet, *real_model.text_encoders) for _ in m.parameters())
    assert by_category["optimizer states"] == 8 * trained + 4 * tensors


def test_a_checkpoint_is_the_weights_and_its_resume_state_the_optimizers(estimate, real_model):
    found = estimate(device="cpu")
    state = sum(t.nbytes for module in real_model.modules().values() for t in module.state_dict().values())
    assert found.weight_bytes_written == state
    assert found.state_bytes_written == phase(found).by_category["optimizer states"]


def test_the_files_of_a_checkpoint_are_as_large_as_estimated(estimate, real_model, tmp_path):
    write_model(real_model, tmp_path)
    written = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    found = estimate(device="cpu")
    assert found.weight_bytes_written + found.side_bytes_written == pytest.approx(written, abs=20_000)
    assert found.side_bytes_written > 1_000_000  # the tokenizer's words
    lora = estimate(device="cpu", training_kind="lora")
    assert lora.side_bytes_written == 0
    assert estimate(device="cpu", ema_decay_rate=0.999).side_bytes_written == 2 * found.side_bytes_written


def test_8_bit_states_are_those_that_bitsandbytes_makes(estimate, real_model):
    from bitsandbytes.optim import AdamW8bit

    parameters = [p for m in (real_model.unet, *real_model.text_encoders) for p in m.parameters()]
    optimizer = AdamW8bit(parameters)
    for index, parameter in enumerate(parameters):
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
    made = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    real = {value.untyped_storage()._cdata: value.nbytes for value in made}
    # On the CPU: the GPU's allocator rounds every tensor up to 512 bytes.
    found = estimate(device="cpu", optimizer="adamw8bit")
    assert phase(found).by_category["optimizer states"] == sum(real.values())


def test_paged_states_are_host_memory(estimate):
    paged, plain = estimate(optimizer="pagedadamw8bit"), estimate(optimizer="adamw8bit")
    states = [phase(one).by_category["optimizer states"] for one in (paged, plain)]
    table = 49408 * 32  # the token table, the one tensor above 100,000 numbers
    # Without pages the weights are flat, and each tensor is padded to 256 numbers: much of such a small model.
    assert states[1] - states[0] == pytest.approx(2 * table, rel=0.05)
    assert paged.host_bytes - plain.host_bytes == pytest.approx(2 * table, rel=0.1)


def test_lora_trains_what_the_real_adapter_holds(estimate):
    from everydream_kit.models.lora.injection import add_lora

    model = build_model("sd1", **SMALL)
    real = sum(parameter.numel() for parameter in add_lora(model, 4))
    found = estimate(training_kind="lora", lora_rank=4)
    assert found.num_trained_parameters == real
    assert found.weight_bytes_written == 4 * real


def test_an_average_lives_where_the_setting_says(estimate):
    on_host = estimate(ema_decay_rate=0.99)
    on_gpu = estimate(ema_decay_rate=0.99, ema_device="cuda")
    trained = 4 * on_host.num_trained_parameters
    assert "EMA" not in phase(on_host).by_category
    assert phase(on_gpu).by_category["EMA"] == pytest.approx(trained, rel=0.02)
    assert on_host.host_bytes - on_gpu.host_bytes == pytest.approx(trained, rel=0.02)
    assert on_gpu.weight_bytes_written == 2 * estimate().weight_bytes_written


def test_cuda_graphs_keep_gradients_and_the_memory_of_a_pass(estimate, real_model):
    eager, graphs = estimate(), estimate(cuda_graphs="on")
    trained = [p for m in (real_model.unet, *real_model.text_encoders) for p in m.parameters()]
    gradients = sum(-(-p.numel() // 256) * 256 * 4 for p in trained)  # each begins at a multiple of 256 numbers
    step, saving = phase(graphs).by_category, phase(graphs, "saving").by_category
    assert step["gradients"] == saving["gradients"] == pytest.approx(gradients, rel=0.01)
    assert step["activations"] > 1.8 * phase(eager).by_category["activations"]
    assert saving["activations"] > 0.9 * phase(eager).by_category["activations"]
    assert estimate(device="cpu", cuda_graphs="on").peak_bytes == estimate(device="cpu").peak_bytes


def test_a_fused_backward_never_holds_all_gradients(estimate):
    fused = phase(estimate(fused_backward=True, disable_textenc_training=True))
    plain = phase(estimate(disable_textenc_training=True))
    assert fused.peak_bytes < plain.peak_bytes
    # Flat weights pad each tensor to 256 numbers, which is much of such a small model.
    assert fused.by_category["optimizer states"] == pytest.approx(plain.by_category["optimizer states"], rel=0.005)


def test_a_fused_backward_leaves_no_gradients_to_the_samples(estimate):
    settings = {"disable_textenc_training": True, "sample_steps": 5, "weight_dtype": "bfloat16"}
    fused, plain = (phase(estimate(fused_backward=flag, **settings), "sampling") for flag in (True, False))
    assert fused.peak_bytes <= plain.peak_bytes


def test_bfloat16_weights_halve_weights_and_gradients(estimate):
    half, whole = (phase(estimate("cpu", weight_dtype=dtype)) for dtype in ("bfloat16", "float32"))
    vae = 4 * numbers(build_model("sd1", device="meta", **SMALL).vae)
    assert 2 * (half.by_category["weights"] - vae) == pytest.approx(whole.by_category["weights"] - vae, rel=0.01)


def test_what_waits_in_host_memory_is_no_part_of_a_step_and_part_of_sampling(estimate):
    settings = {"disable_textenc_training": True, "sample_steps": 5}
    waiting, staying = (estimate(offload_idle_models=flag, **settings) for flag in (True, False))
    model = build_model("sd1", device="meta", **SMALL)
    idle = 4 * numbers(model.vae, *model.text_encoders)
    saved = phase(staying).by_category["weights"] - phase(waiting).by_category["weights"]
    assert saved == pytest.approx(idle, rel=0.02)
    drawn = [phase(one, "sampling").by_category["weights"] for one in (waiting, staying)]
    assert drawn[0] == drawn[1]


def test_every_phase_of_a_run_is_there(estimate):
    found = estimate(sample_steps=5, validation_split_mode="automatic", validation_batch_size=2)
    names = ["latent caching", "training step", "validation", "sampling", "saving"]
    assert [one.name for one in found.phases] == names
    assert all(one.peak_bytes == sum(one.by_category.values()) > 0 for one in found.phases)


def test_without_a_latent_cache_the_vae_works_in_every_step(estimate):
    cached, encoded = estimate(), estimate(cache_latents="off")
    assert [one.name for one in encoded.phases] == ["training step", "saving"]
    assert encoded.step_flops > cached.step_flops


def test_norms_are_computed_in_float32_on_a_gpu_and_in_the_low_format_on_a_cpu(estimate):
    on_gpu, on_cpu = (phase(estimate(device, amp_dtype="bf16", batch_size=8)) for device in ("cuda", "cpu"))
    assert on_gpu.by_category["activations"] > on_cpu.by_category["activations"]


def test_operations_grow_with_batch_and_accumulation_as_they_must(estimate):
    one, two = estimate(batch_size=1).step_flops, estimate(batch_size=2).step_flops
    assert two == pytest.approx(2 * one, rel=0.02)
    assert estimate(grad_accum=6).step_flops == pytest.approx(6 * one, rel=0.02)


def test_an_allowance_is_added_for_the_card_and_the_process_on_a_cpu(kept):
    config = TrainConfig(resume_ckpt="none", resolution=64, batch_size=1, sample_steps=None, optimizer="adamw")
    how = {"architecture": small_architecture(), "cache_folder": kept}
    found = estimate_memory(config, context_bytes=100 * MIB, fragmentation=0.5, **how)
    assert found.allowance_bytes == 100 * MIB + found.worst.peak_bytes // 2
    assert found.peak_bytes == found.worst.peak_bytes + found.allowance_bytes
    on_cpu = estimate_memory(config, device="cpu", context_bytes=100 * MIB, **how)
    assert 400 * MIB < on_cpu.allowance_bytes < 800 * MIB
    assert on_cpu.peak_bytes == on_cpu.worst.peak_bytes + on_cpu.allowance_bytes


def test_asking_again_reads_what_is_kept(monkeypatch, kept, estimate):
    first = estimate(batch_size=1)
    monkeypatch.setattr(rehearsal, "rehearse", lambda *_: pytest.fail("went through the run again"))
    assert estimate(batch_size=1, lr=1e-3, project_name="another", max_epochs=7) == first


def test_a_kept_answer_that_is_damaged_is_made_anew(tmp_path, estimate):
    config = TrainConfig(resume_ckpt="none", resolution=64, batch_size=1, sample_steps=None, optimizer="adamw")
    how = {"architecture": small_architecture(), "cache_folder": tmp_path}
    first = estimate_memory(config, **how)
    (file,) = tmp_path.glob("*.json")
    file.write_text("{")
    assert estimate_memory(config, **how) == first


def test_json_and_back_is_the_same():
    found = MemoryEstimate((Phase("training step", 3, {"weights": 1, "other": 2}),), 4, 5, 6, 7, 8, 9, 10)
    assert MemoryEstimate.from_json(found.to_json()) == found
    assert found.to_json()["peak_bytes"] == 7


def test_an_automatic_batch_size_is_refused():
    with pytest.raises(ConfigError, match="batch_size: memory can be estimated for a number only"):
        estimate_memory(TrainConfig(resume_ckpt="none", batch_size="auto"), architecture=small_architecture())


@pytest.mark.parametrize(("kind", "amp_dtype"), [("full", "bf16"), ("lora", "fp16")])
def test_more_batch_more_resolution_or_less_checkpointing_never_need_less(estimate, kind, amp_dtype):
    changes = {"training_kind": kind, "amp_dtype": amp_dtype}

    def peak(batch_size, side, checkpointing):
        found = estimate(batch_size=batch_size, resolution=side, gradient_checkpointing=checkpointing, **changes)
        return found.peak_bytes

    here = peak(2, 64, True)
    assert peak(3, 64, True) >= here
    assert peak(2, 128, True) >= here
    assert peak(2, 64, False) >= here


def test_the_key_has_what_affects_the_memory_and_nothing_else():
    kept = memory_estimate.settings_in_key()
    assert {"batch_size", "amp", "lora_rank", "optimizer", "gradient_checkpointing"} <= set(kept)
    assert not {"lr", "seed", "data_root", "logdir", "log_step", "push_to"} & set(kept)
    named = {name for name, one in facts().items() if "memory" in one.affects}
    assert named == memory_estimate.KEY_HAS_OTHERWISE | set(kept)


def test_sampling_holds_no_second_copy_of_what_is_trained(estimate, real_model):
    """Autocast's copies in half precision are for the backward pass."""
    found = phase(estimate(sample_steps=100), "sampling")
    unet = numbers(real_model.unet)
    kept = found.by_category["activations"] + found.by_category.get("other", 0)
    assert kept < 4 * unet  # 3.3 bytes for each of its numbers; a copy in bfloat16 would be 2 more


def test_large_images_go_through_the_vae_in_tiles_where_there_is_no_bfloat16(kept):
    config = TrainConfig(resume_ckpt="none", resolution=1024, batch_size=1, sample_steps=None, training_kind="lora")
    peaks = [
        phase(
            estimate_memory(config, has_bf16=has_bf16, architecture=small_architecture(), cache_folder=kept),
            "latent caching",
        ).by_category["activations"]
        for has_bf16 in (True, False)
    ]
    assert peaks[1] < peaks[0] / 2


@pytest.mark.parametrize(
    ("settings", "together"),
    [
        ({"resolution": 512}, 4),
        ({"resolution": 1024}, 1),
        ({"resolution": 1024, "batch_size": 3}, 3),
        ({"resolution": 1024, "sample_batch_size": 4}, 4),
        ({"resolution": [512, 1024], "sample_resolution": 512}, 4),
    ],
)
def test_default_samples_are_estimated_as_many_together_as_a_run_makes(tmp_path, monkeypatch, settings, together):
    monkeypatch.chdir(tmp_path)  # without a prompt file
    config = TrainConfig(resume_ckpt="none", **{"batch_size": 1, **settings})
    shape = sampled_together(config, SamplerSpec())
    assert shape is not None and shape.num_images == together


def test_blocks_that_wait_are_host_memory_and_two_of_them_are_there_in_a_step(estimate):
    base = {"training_kind": "lora", "gradient_checkpointing": True}
    plain, some, every = (estimate(**base, blocks_to_swap=count) for count in (0, 4, "auto"))
    assert (plain.copied_bytes, plain.num_blocks) == (0, every.num_blocks)
    weights = [phase(found).by_category["weights"] for found in (plain, some, every)]
    assert weights == sorted(weights, reverse=True)
    waiting = [found.host_bytes - plain.host_bytes for found in (plain, some, every)]
    assert waiting == sorted(waiting) and waiting[1] > 0
    saved = phase(plain, "saving").peak_bytes - phase(every, "saving").peak_bytes
    assert saved == pytest.approx(waiting[2], rel=0.2)  # but for the block that came last
    assert waiting[2] < every.copied_bytes < 2 * waiting[2]  # forward and backward, without the one that turns around


def test_default_samples_are_estimated_in_a_size_that_the_family_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shape = sampled_together(
        TrainConfig(resume_ckpt="none", resolution=72, batch_size=1), SamplerSpec(size_multiple=16)
    )
    assert shape is not None and shape.size == (64, 64)
