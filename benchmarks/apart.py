"""Calls of one function, each in a process of its own that has imported what it needs already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing import get_context
from typing import TypeVar

__all__ = ["each_apart"]

SECONDS = 300.0
"""For one call at most; a pool waits for a process that has crashed."""
Given = TypeVar("Given")
Found = TypeVar("Found")


def each_apart(
    function: Callable[[Given], Found], values: Iterable[Given], *, imports: list[str], processes: int = 2
) -> Iterator[Found]:
    """`function` of each of `values`, in their order. DeepSpeed keeps the first process group that it meets for good,
    so two simulations cannot share a process."""
    context = get_context("forkserver")
    context.set_forkserver_preload(imports)
    with context.Pool(processes, maxtasksperchild=1) as pool:
        found = pool.imap(function, values)
        with suppress(StopIteration):
            while True:
                yield found.next(SECONDS)
