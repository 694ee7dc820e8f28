"""The host does not wait for the device within a step, and a step that is not finite changes nothing nevertheless."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rehearsals import prepared
from small_architecture import SMALL
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from everydream_kit.config import TrainConfig
from everydream_kit.data.records import StepBatches
from everydream_kit.errors import NonFiniteLossError
from everydream_kit.models.encoding import encode_captions
from everydream_kit.models.families import FAMILIES
from everydream_kit.models.family import Model, Sizes
from everydream_kit.models.random_models import build_tiny_model
from everydream_kit.preflight.rehearsal import make_batch, stand_in_dataset
from everydream_kit.preflight.skeleton import build_skeleton, shipped_architecture
from everydream_kit.runs import RunFolder
from everydream_kit.training.control import StopSignal
from everydream_kit.training.journal import Journal
from everydream_kit.training.loop import train_loop
from everydream_kit.training.ranks import Ranks
from everydream_kit.training.reports import Listener
from everydream_kit.training.run import Run
from everydream_kit.training.run_builder import assemble_run

READING_OPERATORS = {"aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero", "aten.masked_select"}
"""What gives the host a value, or a shape that depends on values: a GPU's queue has to be empty first."""
READING_METHODS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}
"""What reads without an operator where the tensor is on the CPU already."""


class Reads(TorchDispatchMode):
    """The values that the host asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func.overloadpacket) in READING_OPERATORS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


class Readings(TorchFunctionMode):
    def __init__(self, reads: Reads) -> None:
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READING_METHODS:
            self.reads.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def settings(tmp_path: Path, tiny_model_folder: Path, image_folder: Path) -> dict[str, Any]:
    return {
        "resume_ckpt": str(tiny_model_folder),
        "data_root": str(image_folder),
        "resolution": 64,
        "batch_size": 4,
        "lr": 1e-3,
        "max_steps": 4,
        "logdir": str(tmp_path / "logs"),
        "sample_steps": None,
        "seed": 7,
        "num_workers": 0,
        "cache_variants": 1,
    }


class CountsUntilUpdated(Listener):
    """How many values were read in each step until its update was under way."""

    def __init__(self, run: Run, reads: Reads) -> None:
        self.reads, self.counts = reads, list[int]()
        self.update_weights = run.learner.update_weights
        run.learner.update_weights = self.update  # type: ignore[method-assign]

    def before_step(self, run: Run, work: StepBatches) -> None:
        self.reads.found.clear()

    def update(self, step: int) -> Any:
        result = self.update_weights(step)
        self.counts.append(len(self.reads.found))
        return result


TWO_OPTIMIZERS = {"optimizer_config": {"text_encoder_overrides": {"optimizer": "adam"}}}


@pytest.mark.parametrize(
    ("changes", "num_reads"),
    [
        ({}, 0),
        ({"flat_weights": "on"}, 0),
        ({"clip_grad_norm": 0.5, "grad_accum": 2}, 0),
        ({"amp_dtype": "fp16"}, 0),
        ({"flat_weights": "on", "amp_dtype": "fp16"}, 0),
        (TWO_OPTIMIZERS, 0),
        ({"optimizer": "lion8bit", "flat_weights": "on"}, 1),  # whether to step
        ({"optimizer": "sgd"}, 1),
    ],
)
def test_a_step_reads_nothing_between_forward_and_update(
    settings: dict[str, Any], changes: dict[str, Any], num_reads: int
) -> None:
    with prepared(**{**settings, **changes}) as rehearsal:
        reads = Reads()
        counter = CountsUntilUpdated(rehearsal.run, reads)
        with reads, Readings(reads):
            train_loop(rehearsal.run, [counter], StopSignal())
    assert counter.counts[1:] == [num_reads] * 3  # the first step makes the optimizer's states


class Copies(TorchDispatchMode):
    """Copies from the host to the device that wait for the device's queue."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []
        self.num_queued = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default and (args[0].device.type, result.device.type) == ("cpu", "meta"):
            self.num_queued += bool(kwargs.get("non_blocking"))
            if not kwargs.get("non_blocking"):
                self.waiting.append(f"{args[0].dtype} {tuple(args[0].shape)}")
        return result


class Numbers(TorchFunctionMode):
    """Tensors that are made on the device of numbers of the host: copies that no operator shows."""

    def __init__(self) -> None:
        self.made = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made += func in {torch.tensor, torch.as_tensor} and result.device.type == "meta"
        return result


def run_on_meta(family: str, folder: Path, **changes: Any) -> Run:
    """A run on torch's device without values: what the host would have to read of it is an error."""
    config = TrainConfig(
        resume_ckpt="none", optimizer="lion", resolution=64, batch_size=2, cache_latents="off", **changes
    )
    model: Model = build_skeleton(shipped_architecture(family, **(SMALL if family == "sd1" else {})), torch.float32)
    run_folder = RunFolder(folder)
    return assemble_run(
        config,
        run_folder,
        Journal(run_folder, writes=False),
        Ranks(0, 1, torch.device("meta")),
        model=model,
        dataset=stand_in_dataset(config, (64, 64)),
        seed=1,
        device_type="cpu",
    )


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("sd1", {"input_perturbation": 0.1, "embedding_perturbation": 1.0}),
        ("sdxl", {}),
    ],
)
def test_what_a_step_sends_to_the_device_is_queued_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)  # it does not know "meta"
    run, copies = run_on_meta(family, tmp_path, **changes), Copies()
    batch = make_batch((64, 64), 2, with_moments=True)
    batch.mask, batch.captions[0] = torch.ones(2, 1, 8, 8), ""
    with copies:
        run.learner.backward(batch, StepBatches(0, 0, 1, 2, 2, [batch]), 0)
    assert copies.waiting == []
    assert copies.num_queued >= 6  # latents, posterior's noise, noise, timesteps, tokens, mask, weights of images


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prediction_takes_nothing_from_the_host(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph captures: by then tables of positions and the like have been sent. Reading a value is an error here.

    A family that takes something is not captured.
    """
    model = build_tiny_model(family, seed=0)
    with torch.no_grad():
        conditioning = encode_captions(model, ["a cat", "a dog on a hill"]).to("meta")
    conditioning.guidance = torch.ones(2, device="meta")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)  # it does not know "meta"
    model.denoiser.to("meta")
    sizes = Sizes.uncropped(64, 64, 2)
    if model.family.size_numbers is not None:
        sizes = Sizes((), (), (64, 64), model.family.size_numbers(sizes, 2).to("meta"))
    latents = torch.zeros(2, *model.family.latent_space.shape(model, 64, 64), device="meta")
    with torch.no_grad():
        for copies, numbers in ((Copies(), Numbers()), (Copies(), Numbers())):
            with copies, numbers:
                model.family.predict(model, latents, torch.zeros(2, device="meta"), conditioning, sizes)
    assert (copies.waiting, copies.num_queued) == ([], 0)
    assert (numbers.made > 0) == bool(model.family.not_captured)


Fault = Callable[[Run], Any]


@contextmanager
def infinite_loss(run: Run) -> Iterator[None]:
    """The square overflows; its derivative does not, and what becomes of it in the model is small here."""

    def far_off(module: Any, args: Any, output: Any) -> Any:
        output.sample = output.sample + 3e19
        output.sample.register_hook(lambda gradient: gradient * 1e-12)
        return output

    handle = run.learner.model.unet.register_forward_hook(far_off)
    yield
    handle.remove()


@contextmanager
def gradient_of_nan(run: Run) -> Iterator[None]:
    """In one weight alone, while all losses are finite."""
    weight = next(iter(run.learner.model.unet.parameters()))
    handle = weight.register_hook(lambda gradient: gradient * float("nan"))
    yield
    handle.remove()


class FaultAt(Listener):
    """Notes what there is before a step, and lets the step go wrong."""

    def __init__(self, step: int, fault: Fault, note: Callable[[], None]) -> None:
        self.step, self.fault, self.note = step, fault, note
        self.stack = ExitStack()

    def before_step(self, run: Run, work: StepBatches) -> None:
        if run.position.step == self.step:
            self.note()
            self.stack.enter_context(self.fault(run))


def assert_equal(one: Any, other: Any) -> None:
    """To the bit, nested containers."""
    leaves, others = tree_flatten(one), tree_flatten(other)
    assert leaves[1] == others[1]
    for leaf, other_leaf in zip(leaves[0], others[0], strict=True):
        assert torch.equal(leaf, other_leaf) if isinstance(leaf, torch.Tensor) else leaf == other_leaf


FAULTS = {infinite_loss: "step 2: loss is NaN or infinite for .*png", gradient_of_nan: "step 2: gradients are NaN"}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"flat_weights": "on", "clip_grad_norm": 1.0},
        {"flat_weights": "on", "optimizer": "adamw8bit"},
        {"optimizer": "adamw8bit"},
        {"flat_weights": "on", "optimizer": "sgd"},
        {"optimizer": "adafactor"},
        {"weight_dtype": "bfloat16"},
        TWO_OPTIMIZERS,
    ],
)
def test_a_step_that_is_not_finite_changes_nothing(
    settings: dict[str, Any], changes: dict[str, Any], fault: Any
) -> None:
    average = {"ema_decay_rate": 0.5, "ema_update_interval": 1}
    with prepared(**{**settings, **changes, **average}) as rehearsal:
        run, before = rehearsal.run, {}
        learner = run.learner

        def state() -> dict[str, Any]:
            everything = {
                "weights": learner.trained_weights(),
                "optimizer": learner.optimizer.state_dict(),
                "averages": learner.ema.state_dict(),
                "position": vars(run.position),
            }
            return copy.deepcopy(everything)

        listener = FaultAt(2, fault, lambda: before.update(state()))
        with listener.stack, pytest.raises(NonFiniteLossError, match=FAULTS[fault]):
            train_loop(run, [listener], StopSignal())
        assert before["position"]["step"] == 2
        assert_equal(state(), before)


class Operators(TorchDispatchMode):
    """What is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not str(func).startswith("profiler."):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def operators_of_update(settings: dict[str, Any], **changes: Any) -> tuple[list[str], int]:
    """What an update dispatches after the first, and how many tensors it updates."""
    with prepared(**{**settings, **changes}) as rehearsal:
        learner, batches = rehearsal.run.learner, rehearsal.run.batches()
        for step in range(2):
            work = next(batches)
            learner.set_learning_rates(step)
            for batch in work.batches:
                learner.backward(batch, work, step)
            with Operators() as operators:
                learner.update_weights(step)
        batches.close()
        return operators.found, len(learner.parameters())


def test_an_update_of_flat_weights_is_some_twenty_operators_however_many_tensors_there_are(
    settings: dict[str, Any],
) -> None:
    flat, num_tensors = operators_of_update(settings, flat_weights="on")
    clipped, _ = operators_of_update(settings, flat_weights="on", clip_grad_norm=1.0)
    assert num_tensors == 260
    assert len(flat) <= 20, flat  # two buffers, one for each part
    assert len(clipped) <= 30, clipped
