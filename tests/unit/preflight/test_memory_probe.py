"""Measuring on a device: a real small model on the CPU, and a meter that reads from a list."""

import pytest
import torch
from small_architecture import SMALL

from everydream_kit.config import TrainConfig
from everydream_kit.data.buckets import largest_bucket
from everydream_kit.models.random_models import build_model
from everydream_kit.preflight.probe import NO_GPU, Meter, Probe, probe
from everydream_kit.preflight.rehearsal import stand_in_dataset
from everydream_kit.runs import RunFolder
from everydream_kit.training.journal import Journal
from everydream_kit.training.ranks import Ranks
from everydream_kit.training.run_builder import assemble_run


class ListMeter(Meter):
    """Says 100, 200 ... bytes for the phases, and counts seconds."""

    def __init__(self):
        self.phases = self.clock = 0

    def begin(self):
        self.phases += 1

    def peak_bytes(self):
        return 100 * self.phases

    def seconds(self):
        self.clock += 1
        return float(self.clock)


def build_on_cpu(config, folder):
    return assemble_run(
        config.replace(cache_latents="off"),
        RunFolder(folder),
        Journal(RunFolder(folder), writes=False),
        Ranks(0, 1, torch.device("cpu")),
        model=build_model("sd1", **SMALL),
        dataset=stand_in_dataset(config, largest_bucket(config.resolutions)),
        seed=1,
    )


def config_of(**changes):
    base = {"resume_ckpt": "none", "resolution": 64, "batch_size": 1, "validation_split_mode": "automatic"}
    base["validation_batch_size"] = 2
    return TrainConfig(**{**base, **changes})


@pytest.mark.parametrize(
    ("cache_latents", "names"),
    [
        ("disk", ["latent caching", "training step", "validation", "sampling"]),
        ("memory", ["training step", "latent caching", "validation", "sampling"]),  # next to the optimizer's states
        ("off", ["training step", "validation", "sampling"]),
    ],
)
def test_every_phase_is_gone_through_for_real_and_measured(cache_latents, names):
    runs = []

    def build(config, folder):
        runs.append(build_on_cpu(config, folder))
        return runs[0]

    found = probe(config_of(optimizer="adamw", cache_latents=cache_latents), build=build, meter=ListMeter())
    assert [phase.name for phase in found.phases] == names
    assert [phase.peak_bytes for phase in found.phases] == [100, 200, 300, 400][: len(names)]
    assert found.seconds_per_step == 1.0
    assert found.fits is True
    assert "2 steps of 1 images of the largest bucket" in found.reason
    steps = {float(state["step"]) for state in runs[0].learner.optimizer.state.values()}
    assert steps == {2.0}


def test_running_out_of_memory_is_a_finding_that_names_the_phase():
    class Full(ListMeter):
        def seconds(self):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    found = probe(config_of(cache_latents="disk"), build=build_on_cpu, meter=Full())
    assert found.fits is False
    assert found.stopped_in == "training step"
    assert [phase.name for phase in found.phases] == ["latent caching"]


def test_another_error_is_no_finding():
    class Broken(ListMeter):
        def begin(self):
            raise RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM")

    with pytest.raises(RuntimeError, match="cuDNN error"):
        probe(config_of(), build=build_on_cpu, meter=Broken())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_loads_nothing():
    assert probe(config_of()) == Probe(reason=NO_GPU)
