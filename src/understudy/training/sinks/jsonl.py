"""metrics.jsonl: one JSON object a row."""

from __future__ import annotations

import json
import math

from understudy.training.sinks.registry import Row, RunFacts, Sink

__all__ = ["make"]


class JsonLinesSink(Sink):
    """Appends each row and flushes it, so that a reader sees every row that was ever logged."""

    def __init__(self, facts: RunFacts) -> None:
        self._file = facts.directory.metrics.open("a", encoding="utf-8")

    def row(self, row: Row) -> None:
        # JSON has no NaN and no infinity.
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def make(facts: RunFacts) -> Sink:
    return JsonLinesSink(facts)
