"""Where the processes of a run meet: after each step, and when one of them needs what all of them hold.

Only the main process has listeners. While they run, the others wait in `RankSync.sync_ranks`. There they take part in putting
together what the main process needs in full (the weights, to sample, to measure or to save; the optimizer's state, to save), and
learn what the listeners decided. With one process nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from everydream_kit.models.family import has_large_texts
from everydream_kit.training.sharding import Sharding, gather

if TYPE_CHECKING:
    from everydream_kit.training.ranks import Ranks
    from everydream_kit.training.step import Learner, Weights

NOTHING, WEIGHTS, EVERYTHING = range(3)
"""What the main process asks of the others: nothing more, the trained weights, or the optimizer's state as well."""


@dataclass
class RankSync:
    """The meeting of a run's processes.

    Attributes:
        sharding: how the trained modules are divided; None where every process has the full model.
    """

    ranks: Ranks
    learner: Learner
    sharding: Sharding | None = None

    def sync_ranks(self, stop_requested: bool = False) -> bool:
        """Bring the processes together again after the listeners, which only the main one has.

        The others give what it asks for meanwhile, and learn what its listeners decided: the rate's factor, an early end.

        Returns:
            Whether any process was asked to stop.
        """
        decisions = self.learner.decisions
        while True:
            factor = decisions.lr_factor if self.ranks.is_main else 0.0
            asked, stop, ended, factor = self.ranks.largest(NOTHING, stop_requested, decisions.ended_early, factor)
            if asked == NOTHING:
                decisions.lr_factor, decisions.ended_early = factor, bool(ended)
                return bool(stop)
            self._gather(asked)

    def full_state(self) -> tuple[Weights, dict[str, Any]]:
        """The trained weights and the optimizer's state; gathered in host memory where they are divided."""
        if self.sharding is None:
            return self.learner.trained_weights(), self.learner.optimizer.state_dict()
        return self._ask_for(EVERYTHING)

    @contextmanager
    def full_model(self, *, averaged: bool = False) -> Iterator[None]:
        """While inside, all of the model is on the device: what was offloaded to host memory, and what other processes have.

        Large text encoders wait on: `Learner.encode_captions` has what they make of a text.

        Args:
            averaged: with the averaged weights, where there is an EMA.
        """
        learner, model = self.learner, self.learner.model
        texts = [] if has_large_texts(model.family) else model.text_encoders
        with learner.idle_models.at_work([model.denoiser, model.vae, *texts]):
            unsharded = nullcontext() if self.sharding is None else self.sharding.unsharded(self._ask_for(WEIGHTS)[0])
            with unsharded, learner.averaged_weights() if averaged else nullcontext():
                yield

    def _ask_for(self, what: int) -> tuple[Weights, dict[str, Any]]:
        """Have the other processes take part in gathering what they have slices of."""
        self.ranks.largest(what, False, False, 0.0)
        return self._gather(what)

    def _gather(self, what: float) -> tuple[Weights, dict[str, Any]]:
        keep = self.ranks.is_main
        optimizer_state = self.learner.optimizer.state_dict() if what == EVERYTHING else {}
        return gather(self.learner.trained_weights(), keep=keep), gather(optimizer_state, keep=keep)
