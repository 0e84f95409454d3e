"""Throughput of preparing data on one core against the tokenizer library's own batch encoding of the finished texts.

Ours reads rows, parses and renders them, tokenises, and finds the supervised tokens; the reference only tokenises.
Seconds are the core's own, so that other work on the machine does not count.
`python -m benchmarks.tokenizing JSON` measures one file, in a process of its own.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.process import measure
from benchmarks.table import Row, print_table

__all__ = ["compare"]

REPETITIONS = 5
ROWS_AT_ONCE = 512
GOAL = 0.8
FILES = (("Alpaca", "alpaca_en_demo.json", "alpaca"), ("C4", "c4_demo.jsonl", "text"))
ONE_CORE = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def compare(model: Path, data: Path) -> None:
    rows = []
    for name, file, format_name in FILES:
        settings = {"model": str(model.resolve()), "file": str((data / file).resolve()), "format_name": format_name}
        with tempfile.TemporaryDirectory() as cache:
            rates = measure("benchmarks.tokenizing", {**settings, "cache": cache}, ONE_CORE)
        ratio = rates["ours"] / rates["library"]
        rows.append(
            Row(
                f"{name}: tokens/s",
                f"{rates['ours']:,.0f}",
                f"{rates['library']:,.0f}",
                ratio,
                f"at least {GOAL}",
                ratio >= GOAL,
            )
        )
    print_table(f"Tokenising, one core, median of {REPETITIONS}", "encode_batch", rows)


def _measure(model: str, file: str, format_name: str, cache: str) -> dict[str, float]:
    from tokenizers import Tokenizer

    from understudy.data.row import Row as RowOfFile
    from understudy.data.sources import find_source
    from understudy.data.tokenisation import RowReader, Tokeniser
    from understudy.data.tokenizer_settings import tokeniser_settings
    from understudy.recipe.schema import Data, DataSource, Model, Recipe

    source = DataSource(path=file, format=format_name)
    # No example is cut, so that both sides count the same tokens.
    data = Data(train=(source,), max_length=1_000_000)
    recipe = Recipe(name="bench", output_dir="bench", model=Model(path=model), data=data)
    settings = tokeniser_settings(recipe, Path(model))

    tokeniser, reader = Tokeniser(settings), RowReader(format_name, {})

    def chunks() -> Iterator[list[RowOfFile]]:
        rows = find_source(source, cache_dir=Path(cache)).rows(lambda consumed: None)
        while chunk := list(islice(rows, ROWS_AT_ONCE)):
            yield chunk

    def ours() -> int:
        return sum(len(tokeniser.tokenise(chunk, reader, source=0).chunk.tokens) for chunk in chunks())

    texts = [tokeniser.text(row, reader) for chunk in chunks() for row in chunk]
    library_tokenizer = Tokenizer.from_str(settings.tokenizer)

    def library() -> int:
        batches = (texts[start : start + ROWS_AT_ONCE] for start in range(0, len(texts), ROWS_AT_ONCE))
        encoded = (library_tokenizer.encode_batch(batch, add_special_tokens=False) for batch in batches)
        return sum(len(encoding.ids) for batch in encoded for encoding in batch)

    seconds: dict[str, list[float]] = {"ours": [], "library": []}
    counts: dict[str, int] = {}
    for _ in range(1 + REPETITIONS):
        for name, side in (("ours", ours), ("library", library)):
            seconds[name].append(_seconds(side, counts, name))
    # Ours ends each plain text with a token that the library is not asked for.
    assert 0 <= counts["ours"] - counts["library"] <= len(texts), counts
    return {name: counts["library"] / statistics.median(taken[1:]) for name, taken in seconds.items()}


def _seconds(side: Callable[[], int], counts: dict[str, int], name: str) -> float:
    began = time.process_time()
    counts[name] = side()
    return time.process_time() - began


if __name__ == "__main__":
    settings: dict[str, Any] = json.loads(sys.argv[1])
    print(json.dumps(_measure(**settings)))
