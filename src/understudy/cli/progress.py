"""Progress of long work on stderr: a bar on a terminal, a line for each part elsewhere. Not a command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

__all__ = ["ShownProgress", "shown_progress"]


class ShownProgress:
    """One part of the work after the other."""

    def __init__(self, console: Console, bar: Progress) -> None:
        self._console = console
        self._bar = bar
        self._task: TaskID | None = None

    def begin(self, what: str, total: int) -> None:
        """From now on `advance` counts to `total` of `what`."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(what, total=total)
        if not self._console.is_terminal:
            self._console.print(f"{what}: {total:,}", highlight=False)

    def advance(self) -> None:
        assert self._task is not None, "begin comes first"
        self._bar.advance(self._task)


@contextmanager
def shown_progress() -> Iterator[ShownProgress]:
    """The bar is gone on leaving."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _RateColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield ShownProgress(console, bar)


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.2f}/s")
