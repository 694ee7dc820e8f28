"""Modules that are offloaded to host memory: which ones, and when they come back. (A GPU is not needed: the moves are
noted.)"""

from types import SimpleNamespace

import pytest
import torch

from everydream_kit.config import TrainConfig
from everydream_kit.models.families import FAMILIES
from everydream_kit.training.base_model import choose_idle_modules
from everydream_kit.training.offload import IdleModels


class Noted(torch.nn.Module):
    """Writes down where it is asked to go."""

    def __init__(self):
        super().__init__()
        self.moves = []

    def to(self, device):
        self.moves.append(device)
        return self


def test_a_module_waits_in_host_memory_except_while_it_works():
    vae, unet = Noted(), Noted()
    idle = IdleModels([vae], "cuda")
    assert vae.moves == ["cpu"]
    with idle.at_work([vae, unet]):
        assert vae.moves == ["cpu", "cuda"]
        with idle.at_work([vae]):
            pass
        assert vae.moves == ["cpu", "cuda"]  # the outer work continues
    assert vae.moves == ["cpu", "cuda", "cpu"]
    assert unet.moves == []


def test_it_goes_back_after_an_error():
    vae = Noted()
    idle = IdleModels([vae], "cuda")
    with pytest.raises(RuntimeError), idle.at_work([vae]):
        raise RuntimeError
    assert vae.moves[-1] == "cpu"


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, ["vae", "text"]),
        ({"latents_cached": False}, ["text"]),
        ({"trains_text": True}, ["vae"]),
        ({"texts_known": False}, ["vae"]),
    ],
)
def test_only_what_the_steps_do_without_waits(facts, expected):
    facts = {"latents_cached": True, "texts_known": True, **facts}
    vae, text = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1).requires_grad_(facts.pop("trains_text", False))
    model = SimpleNamespace(vae=vae, text_encoders=[text], family=FAMILIES["sd1"])
    config = TrainConfig(resume_ckpt="base", offload_idle_models=True)
    found = choose_idle_modules(config, model, None, device_type="cuda", **facts)
    assert found == [{"vae": vae, "text": text}[name] for name in expected]
