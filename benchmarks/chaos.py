"""Kills training at random instants and inside saves, resumes it, and compares with a run that was left alone.

`python benchmarks/chaos.py --trials 100` prints a table and ends with status 1 if anything was lost, repeated or other.
A trial is one kill and the resume after it. A run is killed again and again until its last step is reached; then its
ledgers (step, example ids, loss bits and learning rate, on every rank), its metrics and its final model are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS, INTERVAL = 24, 4
PROCESSES = 2
POINTS = ("shard", "fsync", "part", "manifest", "marker", "rename", "retention")
LARGEST_HIT = {"shard": 90, "fsync": 30, "part": 3, "manifest": 3, "marker": 3, "rename": 3, "retention": 2}
"""Each within the first two saves or so; all but `shard` and `fsync` count twice a save, before and after."""
ATTEMPT_SECONDS = 180.0
MOST_ATTEMPTS = 25
"""Kills of one run before it is left alone to end."""
INSIDE_SAVES = 0.6
"""Share of the kills that are to happen at a named point of a save."""


@dataclass
class Tally:
    trials: int = 0
    points: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    runs: int = 0
    longest_loss_steps: int = 0
    """Steps done again after a kill, at most."""
    past_interval: int = 0
    """Resumed from further back than one interval before the last checkpoint that was begun."""
    problems: list[str] = field(default_factory=list)

    @property
    def inside_saves(self) -> int:
        return sum(self.points[point] for point in POINTS)


class Run:
    """One run directory, its ledgers, and the attempts at it."""

    def __init__(self, root: Path, strategy: str, recipe: Path, environment: dict[str, str]) -> None:
        self.root = root
        self.strategy = strategy
        self.directory = root / "run"
        self.ledger = root / "ledger"
        self.ledger.mkdir(parents=True)
        self._recipe = recipe
        self._environment = environment
        self.attempt = 0

    def start(
        self, point: str | None = None, rank: int = 0, hit: int = 0, victims: str = "one"
    ) -> subprocess.Popen[bytes]:
        processes = self.root / "processes"
        shutil.rmtree(processes, ignore_errors=True)
        processes.mkdir()
        self.attempt += 1
        plan = {
            "point": point,
            "rank": rank,
            "hit": hit,
            "victims": victims,
            "processes": str(processes),
            "ledger": str(self.ledger),
            "attempt": self.attempt,
        }
        (self.root / "plan.json").write_text(json.dumps(plan))
        with (self.root / f"attempt-{self.attempt}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "benchmarks.chaos_train", "train", str(self._recipe),
                 f"output_dir={self.directory}", f"strategy={self.strategy}"],
                cwd=ROOT,
                env={**self._environment, "CHAOS_PLAN": str(self.root / "plan.json")},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def processes(self) -> list[int]:
        """Launcher and workers, as far as they have started."""
        return [int(path.name) for path in (self.root / "processes").iterdir()]

    def said(self) -> str:
        return (self.root / f"attempt-{self.attempt}.log").read_text(errors="replace")

    def rows(self, rank: int) -> list[dict[str, Any]]:
        path = self.ledger / f"rank-{rank}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def steps_of_attempt(self, attempt: int) -> list[int]:
        return [row["step"] for row in self.rows(0) if row["attempt"] == attempt]

    def committed_steps(self) -> list[int]:
        return sorted(int(path.name[5:]) for path in (self.directory / "checkpoints").glob("step-????????"))

    def finished(self) -> bool:
        return (self.directory / "model").exists()


def write_recipe(root: Path, *, background: bool) -> Path:
    data = ROOT / "recipes" / "quickstart"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    recipe = {
        "name": "chaos",
        "model": {
            "init": "random",
            "tokenizer": str(data / "tokenizer"),
            "config": {"model_type": "llama", "vocab_size": 384, "max_position_embeddings": 128, **sizes},
        },
        "data": {"train": [{"path": str(data / "train.jsonl")}], "max_length": 64, "num_workers": 1},
        "optimizer": {"learning_rate": 4.0e-3, "weight_decay": 0.1},
        "training": {"max_steps": STEPS, "global_batch_size": 16, "precision": "fp32", "deterministic": True},
        "checkpoint": {"every": INTERVAL, "keep": 2, "background": background},
        "logging": {"sinks": ["jsonl"]},
        "cluster": {"processes": PROCESSES},
    }
    path = root / f"recipe-{'background' if background else 'foreground'}.json"
    path.write_text(json.dumps(recipe))
    return path


def kill_once(run: Run, random_source: random.Random, seconds: float, tally: Tally) -> None:
    """One attempt that is meant to be killed, at a named point or at an instant of the `seconds` that a run takes."""
    victims = random_source.choice(("one", "all"))
    # By what has happened, not by chance: a kill that is meant for a point is not one if the run ends before it.
    if tally.inside_saves < INSIDE_SAVES * (tally.trials + 1):
        point = random_source.choice(POINTS)
        # Rank 0 alone commits and retains.
        rank = random_source.randrange(PROCESSES) if point in ("shard", "fsync", "part") else 0
        process = run.start(point, rank, random_source.randint(1, LARGEST_HIT[point]), victims)
    else:
        point = "random instant"
        process = run.start()
        _sleep_while_running(process, random_source.uniform(0.0, seconds))
        pids = run.processes() or [process.pid]
        for pid in pids if victims == "all" else [random_source.choice(pids)]:
            if process.poll() is None:
                _kill(pid)
    try:
        status = process.wait(ATTEMPT_SECONDS)
    except subprocess.TimeoutExpired:
        _kill_session(process, run)
        tally.problems.append(f"{run.root.name}: hung after a kill at {point}\n{run.said()[-1500:]}")
        return
    _wait_until_gone(run)
    if status == 0:
        return  # it ended before the kill
    if status not in (5, -signal.SIGKILL) and "killed by SIGKILL" not in run.said():
        tally.problems.append(f"{run.root.name}: status {status} after a kill at {point}\n{run.said()[-1500:]}")
    tally.trials += 1
    tally.points[point] += 1


def note_resume(run: Run, committed: Sequence[int], tally: Tally, before: int) -> None:
    """Compares where an attempt went on with what the one before had done."""
    done, now = run.steps_of_attempt(before), run.steps_of_attempt(run.attempt)
    if not now and not run.finished():
        return
    resumed = now[0] - 1 if now else STEPS
    newest = committed[-1] if committed else 0
    if resumed < newest:
        tally.problems.append(f"{run.root.name}: went on from step {resumed}, though {newest} was committed")
    last = done[-1] if done else resumed
    tally.longest_loss_steps = max(tally.longest_loss_steps, last - resumed)
    if resumed < (last // INTERVAL) * INTERVAL - INTERVAL:
        tally.past_interval += 1


def compare(run: Run, reference: Run) -> Iterator[str]:
    for rank in range(PROCESSES):
        timeline = {row["step"]: row for row in reference.rows(rank)}
        seen: dict[int, Any] = {}
        for row in run.rows(rank):
            expected = timeline[row["step"]]
            if any(row[key] != expected[key] for key in ("examples", "loss", "learning_rate")):
                yield f"rank {rank}, step {row['step']}, attempt {row['attempt']}: {row} instead of {expected}"
            seen[row["step"]] = row
        if sorted(seen) != list(range(1, STEPS + 1)):
            yield f"rank {rank}: steps {sorted(seen)}"
    mine, theirs = (
        [
            {
                key: value
                for key, value in json.loads(line).items()
                if key in ("step", "loss", "learning_rate", "grad_norm")
            }
            for line in (directory / "metrics.jsonl").read_text().splitlines()
        ]
        for directory in (run.directory, reference.directory)
    )
    if mine != theirs:
        yield f"metrics.jsonl has {len(mine)} rows, not the {len(theirs)} of the run that was left alone"
    for path in sorted((reference.directory / "model").iterdir()):
        if (run.directory / "model" / path.name).read_bytes() != path.read_bytes():
            yield f"model/{path.name} differs"


def _sleep_while_running(process: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _kill_session(process: subprocess.Popen[bytes], run: Run) -> None:
    for pid in (process.pid, *run.processes()):
        _kill(pid)
    process.wait()


def _wait_until_gone(run: Run) -> None:
    """Workers die with their launcher, a moment later."""
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in run.processes()) and time.monotonic() < deadline:
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def trial_runs(trials: int, strategies: Sequence[str], seed: int, root: Path, *, say: bool) -> Tally:
    random_source = random.Random(seed)
    environment = {
        **os.environ,
        "UNDERSTUDY_CACHE": str(root / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    tally = Tally()
    references: dict[str, tuple[Run, float]] = {}
    while tally.trials < trials and not tally.problems:
        strategy = strategies[tally.runs % len(strategies)]
        if strategy not in references:
            references[strategy] = _reference(root, strategy, environment)
        reference, seconds = references[strategy]
        # Both ways of saving; where only one strategy runs, one after the other.
        recipe = write_recipe(root, background=(tally.runs // len(strategies)) % 2 == 0)
        run = Run(root / f"run-{tally.runs}-{strategy}", strategy, recipe, environment)
        for _ in range(MOST_ATTEMPTS):
            if tally.trials == trials or run.finished() or tally.problems:
                break
            committed, before, kills = run.committed_steps(), run.attempt, tally.trials
            kill_once(run, random_source, seconds, tally)
            if before:
                note_resume(run, committed, tally, before)
            if say and tally.trials > kills:
                print(f"\r{tally.trials} of {trials} kills", end="", file=sys.stderr, flush=True)
        if not run.finished() and not tally.problems:
            committed, before = run.committed_steps(), run.attempt
            if (status := run.start().wait(ATTEMPT_SECONDS)) != 0:
                tally.problems.append(f"{run.root.name}: status {status}\n{run.said()[-1500:]}")
                break
            note_resume(run, committed, tally, before)
        tally.problems += (
            [f"{run.root.name}: {problem}" for problem in compare(run, reference)] if run.finished() else []
        )
        tally.runs += 1
    return tally


def _reference(root: Path, strategy: str, environment: dict[str, str]) -> tuple[Run, float]:
    run = Run(root / f"alone-{strategy}", strategy, write_recipe(root, background=True), environment)
    for directory in (run.directory, run.ledger):  # the first time prepares data and compiles
        if (status := run.start().wait(ATTEMPT_SECONDS * 3)) != 0:
            sys.exit(f"the run that was left alone ended with status {status}:\n{run.said()}")
        if directory is run.directory:
            shutil.rmtree(run.directory)
            shutil.rmtree(run.ledger)
            run.ledger.mkdir()
            began = time.monotonic()
    return run, time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100, help="kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategies", default="ddp,fsdp,zero2,zero3", help="run in turn")
    parser.add_argument("--keep", type=Path, help="keep runs and logs in this directory")
    chosen = parser.parse_args()
    root = chosen.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    root.mkdir(parents=True, exist_ok=True)
    try:
        tally = trial_runs(chosen.trials, chosen.strategies.split(","), chosen.seed, root, say=True)
    finally:
        if chosen.keep is None:
            shutil.rmtree(root, ignore_errors=True)
    print(f"\nkills {tally.trials}, over {tally.runs} runs of {STEPS} steps, a checkpoint every {INTERVAL}")
    for point, count in sorted(tally.points.items()):
        print(f"  {point:<16}{count:>5}")
    print(f"inside a save    {tally.inside_saves / max(1, tally.trials):>8.0%}")
    print(f"most steps done again after a kill: {tally.longest_loss_steps}")
    print(f"resumed more than one interval before the last checkpoint due: {tally.past_interval}")
    for problem in tally.problems:
        print(f"PROBLEM {problem}")
    if tally.problems or tally.past_interval or tally.trials < chosen.trials:
        sys.exit(1)
    print("every run went on, and ended as the one that was left alone: ledgers, metrics and model to the bit")


if __name__ == "__main__":
    main()
