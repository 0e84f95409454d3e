"""The user's terminal, as rank 0 of a run reaches it: beside the process's own output, which goes to a log."""

from __future__ import annotations

import os
from io import TextIOWrapper
from typing import TextIO

import rich.console

__all__ = ["Console", "duration", "open_console", "silent_console"]

STDOUT = 1


class Console:
    """Plain text for the user, above whatever progress is shown on the same `screen`."""

    def __init__(self, screen: rich.console.Console) -> None:
        self.screen = screen

    def say(self, text: str) -> None:
        """One or more lines as they are: no markup, no colour of numbers, no wrapping."""
        self.screen.print(text, markup=False, highlight=False, soft_wrap=True)


def open_console(descriptor: int) -> Console:
    """The console behind a file descriptor, which stays open. On a terminal its width is taken from it."""
    stream = TextIOWrapper(os.fdopen(os.dup(descriptor), "wb", buffering=0), encoding="utf-8", write_through=True)
    return Console(rich.console.Console(file=stream, width=_terminal_width(stream)))


def silent_console() -> Console:
    """For ranks that have nothing to say."""
    return Console(rich.console.Console(quiet=True))


def duration(seconds: float) -> str:
    """`4:05`, or `1:02:03` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _terminal_width(stream: TextIO) -> int | None:
    """rich asks this process's own standard streams, which are a log here. A terminal may not know: it says 0."""
    return (os.get_terminal_size(stream.fileno()).columns or None) if stream.isatty() else None
