"""A memory model that is a straight line, and counts how often it is asked: for tests of what is made of its answers."""

from __future__ import annotations

from typing import Any

from everydream_kit.config import TrainConfig
from everydream_kit.preflight.memory_records import MemoryEstimate, Phase

GIB = 1024**3


class LinearMemory:
    """Weights, gradients and states of a 1-billion model, and half a GiB of activations an image at 512 px.

    Of the weights, 1 GiB are 20 blocks, which can wait in host memory.

    Attributes:
        asked: the configs, in order.
        options: what was said about the GPU, in order.
    """

    def __init__(self) -> None:
        self.asked: list[TrainConfig] = []
        self.options: list[dict[str, Any]] = []

    def __call__(self, config: TrainConfig, **options: Any) -> MemoryEstimate:
        assert isinstance(config.batch_size, int)
        self.asked.append(config)
        self.options.append(options)
        activations = 0.5 * config.batch_size * (max(config.resolutions) / 512) ** 2
        activations *= 1 if config.amp and not config.disable_amp else 2
        activations *= 1 - 0.9 * config.checkpointing_share if config.gradient_checkpointing else 1
        standing = 4.0 * (0.5 if config.weight_dtype == "bfloat16" else 1) + 4.0 * (config.training_kind == "full")
        standing -= 0.25 * config.offload_idle_models + 0.5 * config.disable_textenc_training
        blocks = 20 if config.blocks_to_swap == "auto" else config.blocks_to_swap
        standing -= 0.05 * blocks
        peak = int((activations + standing) * GIB)
        return MemoryEstimate(
            phases=(Phase("training step", peak, {"weights": peak}),),
            allowance_bytes=int(options.get("context_bytes") or 0),
            step_flops=int(2.4e12 * config.batch_size * config.grad_accum),
            num_trained_parameters=860_000_000,
            num_parameters=1_066_000_000,
            weight_bytes_written=4_000_000_000,
            state_bytes_written=2_000_000_000,
            pass_launches=4_500 * config.grad_accum,
            update_launches=2_600,
            copied_bytes=int(0.1 * blocks * GIB),
            num_blocks=20,
            num_file_parameters=1_066_000_000,
        )
