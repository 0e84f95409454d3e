"""`understudy train` against a bare PyTorch loop over the same batches.

Each side runs in processes of its own, in turn, and the one that went first goes second in the next round (A B, B A),
with the same weights, data, dtype and threads. A figure is the median over all steps but the first of each process.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.bare_loop import Example
from benchmarks.process import measure, run
from benchmarks.table import GIBIBYTE, Row

__all__ = ["STREAM", "Extent", "Method", "Outcome", "Workload", "compare_sides", "comparison_rows", "cores"]

LEARNING_RATE = 1e-5
FIRST_LOSSES_AGREE = {"fp32": 1e-3, "bf16": 1e-2}
"""Most relative difference, by precision."""


@dataclass(frozen=True)
class Extent:
    """How much is measured. The first step of a process counts for nothing, so there are two at least."""

    steps: int = 3
    rounds: int = 2


@dataclass(frozen=True)
class Workload:
    name: str
    source: str
    """File of the data directory."""
    batch: int
    """Examples a step."""
    length: int
    """Most tokens of an example."""


STREAM = Workload("fully supervised stream", "c4_demo.jsonl", batch=2, length=512)
"""Examples that are all as long as they may be, so that the bare loop has nothing to pad."""


@dataclass(frozen=True)
class Method:
    """What both sides train of the model, each in its own words; the whole model where nothing is said."""

    name: str
    precision: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Sections beside the usual ones."""
    bare: Mapping[str, Any] = field(default_factory=lambda: {"adapter": None, "quantized": False})
    """Settings of `benchmarks.bare_loop`."""


@dataclass(frozen=True)
class Side:
    """What one side did, over all rounds."""

    tokens_per_second: float
    memory_peak_bytes: int
    first_loss: float


@dataclass(frozen=True)
class Outcome:
    ours: Side
    bare: Side
    tokens_per_step: float

    @property
    def speed_ratio(self) -> float:
        return self.ours.tokens_per_second / self.bare.tokens_per_second

    @property
    def memory_ratio(self) -> float:
        return self.ours.memory_peak_bytes / self.bare.memory_peak_bytes


def compare_sides(
    workload: Workload, method: Method, model: Path, data: Path, scratch: Path, extent: Extent
) -> Outcome:
    """Measures both sides in `scratch`, a directory that is made. Ends the program where they do not compute the same
    loss before anything is learned."""
    scratch.mkdir()
    recipe = _write_recipe(workload, method, model, data, scratch, extent.steps)
    steps = list(_batches(recipe, model, extent.steps))
    tokens = [sum(len(ids) for ids, _ in examples) for examples in steps]
    (scratch / "batches.json").write_text(json.dumps(steps))
    settings = {
        "model": str(model),
        "batches": str(scratch / "batches.json"),
        "learning_rate": LEARNING_RATE,
        "precision": method.precision,
        **method.bare,
    }
    environment = {"OMP_NUM_THREADS": str(cores())}
    rounds: dict[str, list[dict[str, Any]]] = {"bare": [], "ours": []}
    for number in range(extent.rounds):
        for name in list(rounds)[:: -1 if number % 2 else 1]:
            rounds[name].append(
                measure("benchmarks.bare_loop", settings, environment)
                if name == "bare"
                else _train(recipe, scratch / "run", environment)
            )
    ours, bare = _side(rounds["ours"], tokens), _side(rounds["bare"], tokens)
    if abs(ours.first_loss / bare.first_loss - 1) > FIRST_LOSSES_AGREE[method.precision]:
        sys.exit(f"the two sides do not compute the same: first losses {ours.first_loss} and {bare.first_loss}")
    return Outcome(ours, bare, statistics.mean(tokens))


def comparison_rows(
    name: str, outcome: Outcome, *, speed_goal: float | None = None, memory_goal: float | None = None
) -> list[Row]:
    """Speed, of which the ratio is to be at least the goal, and memory, of which it is to be at most the goal."""
    speed, memory = outcome.speed_ratio, outcome.memory_ratio
    return [
        Row(
            f"{name}: tokens/s",
            f"{outcome.ours.tokens_per_second:,.0f}",
            f"{outcome.bare.tokens_per_second:,.0f}",
            speed,
            "" if speed_goal is None else f"at least {speed_goal}",
            None if speed_goal is None else speed >= speed_goal,
        ),
        Row(
            f"{name}: peak memory",
            f"{outcome.ours.memory_peak_bytes / GIBIBYTE:.2f} GiB",
            f"{outcome.bare.memory_peak_bytes / GIBIBYTE:.2f} GiB",
            memory,
            "" if memory_goal is None else f"at most {memory_goal}",
            None if memory_goal is None else memory <= memory_goal,
        ),
    ]


def cores() -> int:
    return len(os.sched_getaffinity(0))


def _write_recipe(workload: Workload, method: Method, model: Path, data: Path, scratch: Path, steps: int) -> Path:
    """A recipe of `steps` steps over `steps · batch` examples; those of plain text are all as long as they may be."""
    count = steps * workload.batch
    rows = (
        _long_texts(data / workload.source, model, workload.length)
        if workload.source.endswith(".jsonl")
        else _rows(data, workload)
    )
    if len(rows) < count:
        sys.exit(f"{data / workload.source} has {len(rows)} examples that are long enough, and {count} are trained on.")
    (scratch / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:count]), encoding="utf-8")
    recipe = {
        "output_dir": str(scratch / "run"),
        "model": {"path": str(model)},
        "data": {
            "train": [{"path": str(scratch / "train.jsonl")}],
            "max_length": workload.length,
            "overflow": "truncate",
        },
        "optimizer": {"kind": "adamw", "learning_rate": LEARNING_RATE},
        "schedule": {"kind": "constant", "warmup_ratio": 0.0},
        "training": {"max_steps": steps, "global_batch_size": workload.batch, "precision": method.precision},
        "strategy": "ddp",
        "logging": {"sinks": ["jsonl"]},
        "cluster": {"processes": 1},
        **method.recipe,
    }
    path = scratch / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


def _rows(data: Path, workload: Workload) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((data / workload.source).read_text(encoding="utf-8"))
    return rows


def _long_texts(file: Path, model: Path, length: int) -> list[dict[str, Any]]:
    """Rows of at least `length` tokens, which truncation makes exactly that long."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if len(tokenizer.encode(row["text"]).ids) >= length]


def _batches(recipe: Path, model: Path, steps: int) -> Iterator[list[Example]]:
    """The examples of each step as Understudy trains on them: token ids, and labels as transformers takes them."""
    from understudy.contracts import IGNORED
    from understudy.data.cache import TokenCache
    from understudy.devices.detect import detect_machine
    from understudy.recipe.load import load_recipe
    from understudy.training.choosing import choose_as_usual
    from understudy.training.prepare import prepare_job
    from understudy.training.run import training_data

    loaded, sources = load_recipe(recipe, ())
    resolved = choose_as_usual(loaded, detect_machine(), 1).recipe
    job = prepare_job(resolved, sources, lambda line: None).job
    cache = TokenCache.open(job.train)
    width = json.loads((model / "config.json").read_text())["hidden_size"]
    data = training_data(resolved, cache, width, 0, 1)
    for step in range(steps):
        examples = []
        for i in data.examples(step).tolist():
            tokens, supervised = cache.tokens(i).tolist(), cache.supervised(i).tolist()
            examples.append((tokens, [token if flag else IGNORED for token, flag in zip(tokens, supervised)]))
        yield examples


def _train(recipe: Path, run_directory: Path, environment: dict[str, str]) -> dict[str, Any]:
    """What `understudy train` notes in metrics.jsonl, in the form of the bare loop's answer."""
    run([sys.executable, "-m", "understudy", "train", str(recipe), "--overwrite"], environment)
    rows = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    return {
        "step_seconds": [row["step_seconds"] for row in rows],
        "losses": [row["loss"] for row in rows],
        "memory_peak_bytes": max(row["memory_peak_bytes"] for row in rows),
    }


def _side(rounds: Sequence[Mapping[str, Any]], tokens: Sequence[int]) -> Side:
    rates = [
        count / seconds for measured in rounds for count, seconds in list(zip(tokens, measured["step_seconds"]))[1:]
    ]
    memory = statistics.median(measured["memory_peak_bytes"] for measured in rounds)
    return Side(statistics.median(rates), int(memory), rounds[0]["losses"][0])
