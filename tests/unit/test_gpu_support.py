"""Which torch runs on which GPU, by the rules of CUDA's binary and PTX compatibility."""

import pytest
import torch

from everydream_kit.errors import HostError
from everydream_kit.gpu_support import describe_unsupported, has_code_for

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
CUDA_126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.mark.parametrize(
    ("gpu", "capability", "architectures", "runs"),
    [
        ("T4", (7, 5), CUDA_13, True),
        ("RTX 4090: code for 8.6 runs on 8.9", (8, 9), CUDA_13, True),
        ("H100", (9, 0), CUDA_13, True),
        ("P100", (6, 0), CUDA_13, False),
        ("V100", (7, 0), CUDA_13, False),
        ("P100", (6, 0), CUDA_126, True),
        ("V100", (7, 0), CUDA_126, True),
        ("B200 with an old build", (10, 0), CUDA_126, False),
        ("B200 with PTX for 9.0", (10, 0), [*CUDA_126, "compute_90"], True),
        ("code for 9.0 with extensions", (9, 0), ["sm_90a"], True),
        ("a build that does not say", (6, 0), [], True),
    ],
)
def test_a_gpu_runs_where_torch_has_code_for_it(gpu, capability, architectures, runs):
    assert has_code_for(capability, architectures) is runs


def test_an_old_gpu_is_answered_with_the_build_that_supports_it():
    text = describe_unsupported("Tesla P100", (6, 0), CUDA_13, "2.11.0+cu130")
    assert "no code for this GPU: Tesla P100 has compute capability 6.0" in text
    assert "whl/cu126" in text


def test_a_gpu_newer_than_torch_is_answered_with_a_later_torch():
    assert "pip install --upgrade torch" in describe_unsupported("B200", (10, 0), CUDA_126, "2.7.0")


def test_nothing_is_said_where_it_runs():
    assert describe_unsupported("T4", (7, 5), CUDA_13, "2.11.0") == ""


def test_a_run_refuses_such_a_gpu_before_it_loads_anything(monkeypatch):
    from everydream_kit.training.ranks import refuse_unsupported

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CUDA_13)
    with pytest.raises(HostError, match=r"Tesla V100 has compute capability 7.0.*cu126"):
        refuse_unsupported(torch.device("cuda", 0))
