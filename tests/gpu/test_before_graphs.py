"""What CUDA graphs of a step would stand on: nothing waits, and a replay gives what a call gives.

With `EVERYDREAM_GPU_TESTS=cpu` a call takes the replay's place, which shows that the tests are right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from everydream_kit.config import TrainConfig
from everydream_kit.data.records import StepBatches
from everydream_kit.models.captures import CudaCapture
from everydream_kit.preflight.rehearsal import make_batch, stand_in_dataset
from everydream_kit.runs import RunFolder
from everydream_kit.training.journal import Journal
from everydream_kit.training.ranks import Ranks
from everydream_kit.training.run import Run
from everydream_kit.training.run_builder import assemble_run
from everydream_kit.training.step import sizes_of
from everydream_kit.transfers import send

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_EAGER = 3
"""Passes before a capture: libraries choose their kernels and get their memory."""


@pytest.fixture(params=["sd1", "sdxl"])
def run(request: pytest.FixtureRequest, tmp_path: Any) -> Run:
    from everydream_kit.models.random_models import build_tiny_model

    config = TrainConfig(resume_ckpt="none", optimizer="adamw", resolution=64, batch_size=2, disable_amp=True)
    folder, model = RunFolder(tmp_path), build_tiny_model(request.param, seed=0)
    for module in model.modules().values():
        module.to(DEVICE)
    return assemble_run(
        config.replace(cache_latents="off"),
        folder,
        Journal(folder, writes=False),
        Ranks(0, 1, DEVICE),
        model=model,
        dataset=stand_in_dataset(config, (64, 64)),
        seed=1,
        device_type=DEVICE.type,
    )


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.needs_cuda
def test_nothing_waits_from_the_first_copy_to_the_update(run: Run) -> None:
    batch = make_batch((64, 64), 2, with_moments=True)
    batch.mask, batch.captions[0] = torch.ones(2, 1, 8, 8), ""
    work = StepBatches(0, 0, 1, 2, 2, [batch])
    for step in range(3):
        run.learner.set_learning_rates(step)
        if step < 2:  # states are made, libraries get their memory
            run.learner.backward(batch, work, step)
            run.learner.update_weights(step)
            continue
        with waiting_is_an_error():
            run.learner.backward(batch, work, step)
            update = run.learner.update_weights(step)
    assert not update.was_skipped


def capture(call: Callable[[], None]) -> Callable[[], None]:
    """A replay of what a call does on the GPU; without one, the call."""
    if DEVICE.type != "cuda":
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@pytest.mark.parametrize("run", ["sd1"], indirect=True)  # SDXL's sizes are sent from the host within its pass
def test_a_captured_pass_gives_the_losses_and_gradients_of_a_call(run: Run) -> None:
    learner = run.learner
    generator = torch.Generator().manual_seed(0)
    batch = make_batch((64, 64), 2, with_moments=True)
    conditioning = learner.encode_captions(batch.captions)
    text = conditioning.to(DEVICE, torch.float32)
    text.encoder_hidden_states.detach_()
    if text.pooled is not None:
        text.pooled.detach_()
    static = {name: torch.zeros(2, 4, 8, 8, device=DEVICE) for name in ("noisy", "target")}
    timesteps, loss = torch.zeros(2, dtype=torch.int64, device=DEVICE), torch.zeros((), device=DEVICE)
    parameters = list(learner.model.denoiser.parameters())

    def forward_and_backward() -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()
        error = learner.predict(sizes_of(batch), static["noisy"], timesteps, text) - static["target"]
        mean = error.square().mean()
        mean.backward()
        loss.copy_(mean.detach())

    def take(number: int) -> None:
        for tensor in static.values():
            tensor.copy_(send(torch.randn(2, 4, 8, 8, generator=generator), DEVICE))
        timesteps.fill_(100 * number)

    for number in range(NUM_EAGER):
        take(number)
        forward_and_backward()
    replay = capture(forward_and_backward)
    for number in (4, 5):
        take(number)
        replay()
        found = loss.item(), [p.grad.clone() for p in parameters if p.grad is not None]
        forward_and_backward()
        assert found[0] == pytest.approx(loss.item(), rel=1e-6)
        for one, other in zip(found[1], [p.grad for p in parameters if p.grad is not None], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.needs_cuda
def test_a_failed_capture_says_why_and_leaves_the_gpu_as_it_was() -> None:
    capture, number, stream = CudaCapture(), torch.ones(4, 4, device=DEVICE), torch.cuda.current_stream()

    def asks_for_a_value() -> torch.Tensor:
        return number * number.sum().item()

    with pytest.raises(RuntimeError, match="capturing"):
        capture(asks_for_a_value)
    assert torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()
    captured = capture(lambda: number @ number)
    captured.replay()
    assert captured.result.tolist() == [[4.0] * 4] * 4


@pytest.mark.needs_cuda
def test_calls_are_captured_anew_after_all_graphs_were_dropped() -> None:
    capture, number = CudaCapture(), torch.ones(4, 4, device=DEVICE)
    for _ in range(2):
        one, other = capture(lambda: number @ number), capture(lambda: number @ number + 1)
        one.replay()
        other.replay()
        assert (float(one.result[0, 0]), float(other.result[0, 0])) == (4.0, 5.0)
        del one, other
