"""Addressed randomness: an address means the same number everywhere and always."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from everydream_kit.draws import derive_seed, generator, torch_generator


def test_an_address_means_the_same_seed_for_ever() -> None:
    # Literals: a changed hash would silently change every run that is resumed with a newer kit.
    assert derive_seed(555, "noise", 0, "a/b.jpg", 0) == 529041131873972510
    assert generator(555, "crop", 1, 2).integers(1000) == 848


@given(st.lists(st.tuples(st.integers(0, 9), st.text(max_size=5)), min_size=2, max_size=2, unique=True))
def test_different_addresses_give_different_seeds(addresses: list[tuple[int, str]]) -> None:
    first, second = (derive_seed(1, "noise", *address) for address in addresses)
    assert first != second
    assert 0 <= first < 2**63


def test_torch_takes_the_lower_32_bits_and_numpy_all() -> None:
    seed = derive_seed(1, "noise", 2)
    alike = torch.randn(3, generator=torch.Generator("cpu").manual_seed(seed % 2**32))
    assert torch.equal(torch.randn(3, generator=torch_generator(1, "noise", 2)), alike)
    assert generator(1, "noise", 2).integers(2**62) != np.random.Generator(np.random.Philox(seed % 2**32)).integers(
        2**62
    )


def test_no_global_generator_is_touched() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    torch.randn(3, generator=torch_generator(1, "noise", 2))
    assert torch.equal(before, torch.get_rng_state())
