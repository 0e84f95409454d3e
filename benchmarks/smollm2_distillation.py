"""Distils SmolLM2-135M-Instruct into ten of its own layers: `python -m benchmarks.smollm2_distillation`.

First, that a teacher in memory, its cached hidden states and its cached top 64 tokens give the same losses under ddp,
fsdp and zero3. Then, what the student has of its teacher, against the same steps on the data alone. All in fp32, with
two processes; an hour on two slow processor cores.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.process import ROOT, run
from benchmarks.smollm2 import require_model
from benchmarks.table import print_figures

RECIPE = ROOT / "recipes" / "smollm2-distill.yaml"
STRATEGIES = ("ddp", "fsdp", "zero3")
TEACHERS = {"resident": ("resident", ""), "hidden states": ("cache", "hidden"), "top 64": ("cache", "top_k")}


class Runs:
    def __init__(self, model: Path, data: Path, root: Path) -> None:
        self._root = root
        self._common = [
            str(RECIPE),
            f"model.path={model}",
            f"data.train.0.path={data / 'alpaca_en_demo.json'}",
            "data.max_length=256",
            "data.eval_fraction=0.032",
            "training.global_batch_size=8",
            "training.precision=fp32",
            "cluster.processes=2",
            "logging.sinks=[jsonl]",
        ]

    def recipe(self, objective: dict[str, Any] | str, *overrides: str) -> list[str]:
        return [*self._common, f"objective={json.dumps(objective)}", *overrides]

    def command(self, *arguments: str) -> str:
        return run([sys.executable, "-m", "understudy", *arguments]).stdout

    def train(self, name: str, objective: dict[str, Any] | str, *overrides: str) -> list[dict[str, Any]]:
        """The rows of its metrics."""
        directory = self._root / name
        self.command("train", *self.recipe(objective, *overrides, f"output_dir={directory}"))
        return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]

    def evaluate(self, name: str, objective: dict[str, Any]) -> dict[str, Any]:
        told = self.command("evaluate", str(self._root / name), *self.recipe(objective), "--json")
        scores: dict[str, Any] = json.loads(told)
        return scores


def taught(model: Path, kind: str, targets: str) -> dict[str, Any]:
    teacher = {"kind": kind, "path": str(model)} | ({"targets": targets} if targets else {})
    return {"kind": "distillation", "teacher": teacher}


def compare_teachers(runs: Runs, model: Path, steps: int, samples: int) -> None:
    few = (f"training.max_steps={steps}", f"data.train.0.max_samples={samples}")
    rows, reference = [], []
    for name, (kind, targets) in TEACHERS.items():
        objective, said = taught(model, kind, targets), ""
        if kind == "cache":
            said = runs.command("teacher", "cache", *runs.recipe(objective, *few))
        for strategy in STRATEGIES:
            logged = runs.train(f"{kind}-{targets}-{strategy}", objective, *few, f"strategy={strategy}")
            losses = [row["loss"] for row in logged if "loss" in row]
            reference = reference or losses
            apart = max(abs(a - b) / b for a, b in zip(losses, reference, strict=True))
            nats = max(abs(a - b) for a, b in zip(losses, reference, strict=True))
            rows.append((f"{name}, {strategy}", f"{losses[0]:.5f} … {losses[-1]:.5f}", f"{apart:.1e}", f"{nats:.1e}"))
        for line in said.splitlines():
            if found := re.search(r"[\d.]+ bytes a token|at most \S+ apart in each of \d+ examples", line):
                rows.append((f"  {name}: {found[0]}", "", "", ""))
    columns = ("losses", "largest relative difference", "in nats a token")
    print_figures(f"the same student from each teacher, {steps} steps of 8 examples, fp32, 2 processes", columns, rows)


def compare_students(runs: Runs, model: Path, steps: int) -> None:
    objective = taught(model, "resident", "")
    runs.train("distilled", objective, f"training.max_steps={steps}")
    runs.train("from-data", "causal_lm", f"training.max_steps={steps}")
    rows = []
    for name in ("from-data", "distilled"):
        scores = runs.evaluate(name, objective)
        rows.append(
            (
                name,
                f"{scores['cross_entropy']:.4f}",
                f"{scores['divergence']:.4f}",
                f"{scores['token_accuracy']:.1%}",
                f"{scores['teacher_agreement']:.1%}",
                f"{scores['calibration_error']:.3f}",
            )
        )
    columns = ("cross-entropy", "divergence", "token accuracy", "teacher agreement", "calibration error")
    print_figures(f"ten of thirty layers after {steps} steps of 8 examples, held-out data", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smollm2_distillation")
    parser.add_argument("--model", type=Path, default=ROOT / "build" / "smollm2")
    parser.add_argument("--data", type=Path, default=ROOT / ".." / "shared" / "data")
    parser.add_argument("--steps", type=int, default=60, help="of the two students")
    parser.add_argument("--few", type=int, default=3, help="steps with each teacher under each strategy; 0: none")
    arguments = parser.parse_args()
    require_model(arguments.model)
    with tempfile.TemporaryDirectory(prefix="understudy-bench-") as root:
        runs = Runs(arguments.model, arguments.data, Path(root))
        if arguments.few:
            compare_teachers(runs, arguments.model, arguments.few, samples=64)
        compare_students(runs, arguments.model, arguments.steps)


if __name__ == "__main__":
    main()
