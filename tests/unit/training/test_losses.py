"""A loss that is no number: refused with the cause that the step allows."""

import math

import pytest

from everydream_kit.errors import NonFiniteLossError
from everydream_kit.training.losses import ImageLosses, refuse_non_finite


@pytest.mark.parametrize(
    ("step", "words"),
    [(0, r"nothing has been trained yet\. The base model is damaged \(models/mine\)"), (1, "Lower lr")],
)
def test_before_the_first_update_a_loss_that_is_no_number_is_the_bases_fault(step, words):
    losses = ImageLosses([0], [math.nan], [1.0], ["a.png"])
    with pytest.raises(NonFiniteLossError, match=rf"step {step}: loss is NaN or infinite for a\.png.*{words}"):
        refuse_non_finite(losses, step, base="models/mine")
