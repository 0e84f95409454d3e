"""Training speed and memory of `understudy train` against a bare PyTorch loop over the same batches.

Each side runs in processes of its own, in turn (A B A B), with the same weights, data, dtype and threads. A figure is
the median over all steps but the first of each process.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.process import measure, run
from benchmarks.table import GIBIBYTE, Row, print_table

__all__ = ["compare"]

ROUNDS = 2
STEPS = 3
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Workload:
    name: str
    source: str
    """File of the data directory."""
    batch: int
    """Examples a step."""
    length: int
    """Most tokens of an example."""
    speed_goal: float
    """Least ratio of tokens per second."""
    memory_goal: float | None
    """Most ratio of peak memory."""


WORKLOADS = (
    Workload("fully supervised stream", "c4_demo.jsonl", batch=2, length=512, speed_goal=0.97, memory_goal=None),
    Workload("Alpaca", "alpaca_en_demo.json", batch=8, length=256, speed_goal=1.15, memory_goal=1.0),
)


@dataclass(frozen=True)
class Side:
    """What one side did, over all rounds."""

    tokens_per_second: float
    memory_peak_bytes: int
    first_loss: float


def compare(model: Path, data: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="understudy-bench-") as scratch:
        for workload in WORKLOADS:
            rows = _compare(workload, model.resolve(), data.resolve(), Path(scratch) / workload.source)
            title = (
                f"Training SmolLM2-135M, {workload.name}, fp32, {_cores()} CPU cores, {STEPS} steps × {ROUNDS} rounds"
            )
            print_table(title, "bare loop", rows)


def _compare(workload: Workload, model: Path, data: Path, scratch: Path) -> list[Row]:
    scratch.mkdir()
    recipe = _write_recipe(workload, model, data, scratch)
    steps = list(_batches(recipe, model))
    tokens = [sum(len(ids) for ids, _ in examples) for examples in steps]
    (scratch / "batches.json").write_text(json.dumps(steps))
    settings = {"model": str(model), "batches": str(scratch / "batches.json"), "learning_rate": LEARNING_RATE}
    environment = {"OMP_NUM_THREADS": str(_cores())}
    bare, ours = [], []
    for _ in range(ROUNDS):
        bare.append(measure("benchmarks.bare_loop", settings, environment))
        ours.append(_train(recipe, scratch / "run", environment))
    a, b = _side(ours, tokens), _side(bare, tokens)
    if abs(a.first_loss / b.first_loss - 1) > 1e-3:
        sys.exit(f"the two sides do not compute the same: first losses {a.first_loss} and {b.first_loss}")
    name = f"{workload.batch} examples, {statistics.mean(tokens):,.0f} tokens a step"
    speed, memory = a.tokens_per_second / b.tokens_per_second, a.memory_peak_bytes / b.memory_peak_bytes
    return [
        Row(
            f"{name}: tokens/s",
            f"{a.tokens_per_second:,.0f}",
            f"{b.tokens_per_second:,.0f}",
            speed,
            f"at least {workload.speed_goal}",
            speed >= workload.speed_goal,
        ),
        Row(
            f"{name}: peak memory",
            f"{a.memory_peak_bytes / GIBIBYTE:.2f} GiB",
            f"{b.memory_peak_bytes / GIBIBYTE:.2f} GiB",
            memory,
            "" if workload.memory_goal is None else f"at most {workload.memory_goal}",
            None if workload.memory_goal is None else memory <= workload.memory_goal,
        ),
    ]


def _write_recipe(workload: Workload, model: Path, data: Path, scratch: Path) -> Path:
    """A recipe of `STEPS` steps over `STEPS · batch` examples; stream examples are all as long as they may be."""
    count = STEPS * workload.batch
    rows = (
        _long_texts(data / workload.source, model, workload.length)
        if workload.source.endswith(".jsonl")
        else _rows(data, workload)
    )
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
        "training": {"max_steps": STEPS, "global_batch_size": workload.batch, "precision": "fp32"},
        "strategy": "ddp",
        "logging": {"sinks": ["jsonl"]},
        "cluster": {"processes": 1},
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


def _batches(recipe: Path, model: Path) -> Iterator[list[tuple[list[int], list[int]]]]:
    """The examples of each step as Understudy trains on them: token ids, and labels as transformers takes them."""
    from understudy.contracts import IGNORED
    from understudy.data.cache import TokenCache
    from understudy.devices.detect import detect_machine
    from understudy.plan.resolve import resolve
    from understudy.recipe.load import load_recipe
    from understudy.training.prepare import prepare_job
    from understudy.training.worker import training_data

    loaded, sources = load_recipe(recipe, ())
    resolved, _ = resolve(loaded, detect_machine(), 1)
    job = prepare_job(resolved, sources, lambda line: None).job
    cache = TokenCache.open(job.train)
    width = json.loads((model / "config.json").read_text())["hidden_size"]
    data = training_data(resolved, cache, width, 0, 1)
    for step in range(STEPS):
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


def _side(rounds: list[dict[str, Any]], tokens: list[int]) -> Side:
    rates = [
        count / seconds for measured in rounds for count, seconds in list(zip(tokens, measured["step_seconds"]))[1:]
    ]
    memory = statistics.median(measured["memory_peak_bytes"] for measured in rounds)
    return Side(statistics.median(rates), int(memory), rounds[0]["losses"][0])


def _cores() -> int:
    return len(os.sched_getaffinity(0))
