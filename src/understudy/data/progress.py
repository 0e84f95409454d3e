"""Shows how far long work is: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["TokenisingProgress"]

_SECONDS_BETWEEN_LINES = 10.0


class TokenisingProgress:
    """Use as a context. `total_bytes` is what reading adds up to; None when it cannot be known."""

    def __init__(self, title: str, total_bytes: int | None, report: Callable[[str], None]) -> None:
        self._title = title
        self._total = total_bytes or None
        self._report = report
        self._read = self._rows = self._tokens = 0
        self._started = self._reported = time.monotonic()
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._live = console.is_terminal
        self._task = self._bar.add_task(title, total=self._total, rate="")

    def __enter__(self) -> TokenisingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def read(self, count: int) -> None:
        """Notes `count` more bytes read."""
        self._read += count

    def tokenised(self, rows: int, tokens: int) -> None:
        """Notes finished rows and shows the new state."""
        self._rows += rows
        self._tokens += tokens
        now = time.monotonic()
        rate = self._tokens / max(now - self._started, 1e-9)
        self._bar.update(self._task, completed=self._read, rate=f"{self._rows:,} rows, {rate:,.0f} tokens/s")
        if not self._live and now - self._reported >= _SECONDS_BETWEEN_LINES:
            self._reported = now
            self._report(f"{self._title}: {self._rows:,} rows, {rate:,.0f} tokens/s{self._left(now)}")

    def _left(self, now: float) -> str:
        if self._total is None or not self._read:
            return ""
        share = min(self._read / self._total, 1.0)
        return f", {share:.0%}, {(now - self._started) * (1 - share) / share:,.0f} s left"
