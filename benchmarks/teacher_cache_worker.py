"""Measures a teacher cache of one kind: `python -m benchmarks.teacher_cache_worker JSON`."""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.teacher_cache import Case, Measured
from understudy.models.head import LossHead
from understudy.objectives.teachers.cache_contents import Contents, Hidden, Rows, Samples, TopK
from understudy.objectives.teachers.cache_format import CacheDescription, example_keys
from understudy.objectives.teachers.cache_reader import TeacherCache
from understudy.objectives.teachers.cache_writer import CacheWriter
from understudy.objectives.teachers.caching import keep

__all__ = ["measure_case"]

REPETITIONS = 3
SUPERVISED_SHARE = 0.75
BATCH = 8
"""Examples that are read at once."""


def measure_case(case: Case, scratch: Path, repetitions: int = REPETITIONS) -> Measured:
    """Medians over `repetitions` after one that does not count. Writes into `scratch`."""
    torch.manual_seed(0)
    contents = _contents(case)
    head = LossHead.replacing(nn.Linear(case.width, case.vocabulary, bias=False, dtype=torch.bfloat16))
    hidden = torch.randn(case.asked, case.width, dtype=torch.bfloat16)
    seeds = [(case.supervised, number) for number in range(case.asked // case.supervised)]
    keeping = []
    for _ in range(1 + repetitions):
        began = time.process_time()
        with torch.no_grad():
            rows = keep(contents, hidden, head, seeds).rows
        keeping.append(time.process_time() - began)

    examples = _Examples(case)
    written = [examples.write(scratch / str(number), contents, rows) for number in range(1 + repetitions)]
    reading = [examples.read(scratch / str(number), number) for number in range(1 + repetitions)]
    writing = [seconds for _, seconds in written]
    first_reading, reading_again = zip(*reading)
    return Measured(
        bytes_per_token=written[0][0],
        kept=case.asked / statistics.median(keeping[1:]),
        written=examples.tokens / statistics.median(writing[1:]),
        first_read=examples.tokens / statistics.median(first_reading[1:]),
        read=examples.tokens / statistics.median(reading_again[1:]),
    )


def _contents(case: Case) -> Contents:
    if case.kind == "top_k":
        return TopK(case.kept, 1.0, case.vocabulary)
    if case.kind == "samples":
        return Samples(case.drawn, 1.0, 0, case.vocabulary)
    return Hidden(case.width, "bf16")


class _Examples:
    def __init__(self, case: Case) -> None:
        generator = np.random.default_rng(0)
        length = round(case.supervised / SUPERVISED_SHARE)
        self._data = [
            (generator.integers(0, case.vocabulary, length, np.int32), generator.random(length) < SUPERVISED_SHARE)
            for _ in range(case.examples)
        ]
        self._keys = example_keys(self._data)
        self.tokens = int(self._keys.num_supervised.sum())

    def write(self, directory: Path, contents: Contents, rows: Rows) -> tuple[float, float]:
        """Bytes a token, and seconds on the clock, as it waits for the disk. The teacher's `rows` are written over and
        over."""
        began, paused = time.perf_counter(), 0.0
        writer = CacheWriter(directory, CacheDescription("teacher", "tokenizer", contents), 0, 1, self._keys)
        for shard in writer.pending():
            stopped = time.perf_counter()
            count = int(self._keys.num_supervised[writer.examples(shard)].sum())
            content = type(rows)(*(tensor[torch.arange(count) % len(tensor)] for tensor in rows))
            paused += time.perf_counter() - stopped
            writer.write(shard, content)
        size = writer.commit()
        return size.bytes_per_token, time.perf_counter() - began - paused

    def read(self, directory: Path, seed: int) -> tuple[float, float]:
        """The core's own seconds, with opening and verifying, and then without. The pages are in memory: they were just
        written."""
        order = np.random.default_rng(seed).permutation(len(self._data))
        began = time.process_time()
        cache = TeacherCache.open(directory)
        taken = []
        for _ in range(2):
            for start in range(0, len(order), BATCH):
                cache.batch_targets([self._data[i] for i in order[start : start + BATCH]])
            taken.append(time.process_time() - began)
        return taken[0], taken[1] - taken[0]


def main() -> None:
    settings = json.loads(sys.argv[1])
    print(json.dumps(asdict(measure_case(Case(**settings["case"]), Path(settings["scratch"])))))


if __name__ == "__main__":
    main()
