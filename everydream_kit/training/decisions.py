"""What a listener may decide about a run that is in progress; everything else of a run listeners only read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Decisions:
    """Made by listeners on the main process; `sync` sends them to the others after each step.

    Attributes:
        lr_factor: every learning rate is multiplied by it, from the next step on.
        ended_early: the run is complete although steps are left.
    """

    lr_factor: float = 1.0
    ended_early: bool = False
