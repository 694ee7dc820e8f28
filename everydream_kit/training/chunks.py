"""Cutting a list where the sizes of its items add up: buffers, chunks and pieces of tensors, groups of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def cut(items: Iterable[T], size: Callable[[T], int], limit: int, *, at_most: bool = False) -> Iterator[list[T]]:
    """Runs of items, in order.

    Args:
        limit: a run ends with the item that reaches it.
        at_most: a run ends before the item that would exceed it; a larger item is a run of its own.
    """
    run: list[T] = []
    total = 0
    for item in items:
        if run and (total + size(item) > limit if at_most else total >= limit):
            yield run
            run, total = [], 0
        run.append(item)
        total += size(item)
    if run:
        yield run
