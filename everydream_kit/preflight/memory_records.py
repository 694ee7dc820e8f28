"""The memory model's questions and answers. `memory_estimate` asks; a rehearsal (`rehearsal`) answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everydream_kit.config import TrainConfig
    from everydream_kit.data.cache_room import CacheMode
    from everydream_kit.data.dataset import Dataset
    from everydream_kit.data.records import Size
    from everydream_kit.preflight.skeleton import Architecture

CATEGORIES = ("weights", "gradients", "optimizer states", "activations", "EMA", "other")


@dataclass(frozen=True)
class SampleShape:
    """The largest batch of sample images: how many go through the UNet together, and their size in pixels."""

    num_images: int
    size: Size


@dataclass(frozen=True)
class Question:
    """A run that is gone through, and where.

    Attributes:
        config: `batch_size` is a number.
        device: "cuda" or "cpu": what is estimated.
        has_bf16: the GPU computes in bfloat16 (and has flash attention).
        bucket: of the images.
        latents: off, where the VAE encodes in every step; disk, where it does before the run; memory, where it does
            between the steps of the first epochs.
        texts_known: the steps do without text encoders that are not trained.
        validates: images measured together, or None.
        samples: images generated together, or None.
        dataset: of the run; None: one image stands for it.
    """

    config: TrainConfig
    architecture: Architecture
    device: str
    has_bf16: bool
    bucket: Size
    latents: CacheMode
    texts_known: bool
    validates: int | None
    samples: SampleShape | None
    dataset: Dataset | None


@dataclass(frozen=True)
class Phase:
    """One phase of a run at its worst moment.

    Attributes:
        name: "text caching", "latent caching", "training step", "validation", "sampling" or "saving".
        peak_bytes: alive on the device at that moment.
        by_category: of these, by `CATEGORIES`.
    """

    name: str
    peak_bytes: int
    by_category: dict[str, int]


@dataclass(frozen=True)
class MemoryEstimate:
    """What a run needs.

    Attributes:
        phases: in the order in which a run meets them.
        allowance_bytes: context and fragmentation of the GPU; on a CPU the process itself.
        step_flops: floating-point operations of one optimizer step, all of its micro-batches.
        num_trained_parameters, num_parameters: numbers, not tensors.
        num_file_parameters: those in one single file; a flow family's holds neither text encoders nor VAE.
        weight_bytes_written: the weights of one checkpoint, the averaged ones of an EMA included.
        state_bytes_written: its resume state.
        side_bytes_written: what its folders hold next to weights: tokenizers and headers.
        host_bytes: host memory that the run takes next to a GPU's: paged states, averages and modules that are kept
            there, and the copy that is written in the background. On a CPU only the copy, which is made where there is
            space for it.
        pass_launches: kernels that the forward and backward passes of one optimizer step launch, all micro-batches
            together.
        update_launches: kernels that its update launches. Both are weighed by what each costs the host.
        copied_bytes: of blocks that wait in host memory, to the device, in one optimizer step.
        num_blocks: blocks of the denoiser that could wait there.
        text_bytes: of one encoded caption in the cache on disk; 0 where none is kept there.
        text_flops: floating-point operations of encoding one for it.
        family: the model's, by name.
    """

    phases: tuple[Phase, ...]
    allowance_bytes: int
    step_flops: int
    num_trained_parameters: int
    num_parameters: int
    weight_bytes_written: int
    state_bytes_written: int
    host_bytes: int = 0
    pass_launches: int = 0
    update_launches: int = 0
    side_bytes_written: int = 0
    copied_bytes: int = 0
    num_blocks: int = 0
    text_bytes: int = 0
    text_flops: int = 0
    num_file_parameters: int = 0
    family: str | None = None

    @property
    def worst(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        """What the device must have: the greatest phase and the allowance."""
        return self.worst.peak_bytes + self.allowance_bytes

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "phases": [asdict(phase) for phase in self.phases], "peak_bytes": self.peak_bytes}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> MemoryEstimate:
        kept = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        return cls(**{**kept, "phases": tuple(Phase(**phase) for phase in values["phases"])})
