"""A process of a run that writes down every step, and is killed at a named point of a save if the plan says so."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from understudy.checkpoint import saving, store
from understudy.checkpoint.manifest import MANIFEST
from understudy.checkpoint.safetensors_writer import SafetensorsWriter
from understudy.checkpoint.saver import CheckpointSaver
from understudy.training import run, worker
from understudy.training.hooks import Hook, StepResult

PLAN_VARIABLE = "CHAOS_PLAN"
POINTS = ("shard", "fsync", "part", "manifest", "marker", "rename", "retention")


class Ledger(Hook):
    """One line a step, on every rank: what was trained on, what came of it."""

    def __init__(self, path: Path, attempt: int) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._attempt = attempt

    def after_step(self, result: StepResult) -> None:
        row = {
            "attempt": self._attempt,
            "step": result.state.step,
            "examples": list(result.batch.examples),
            "loss": float(result.loss.loss).hex(),
            "learning_rate": result.learning_rate.hex(),
        }
        os.write(self._descriptor, json.dumps(row).encode() + b"\n")


class Striker:
    """Kills at the `hit`th time that a point is passed."""

    def __init__(self, plan: dict[str, Any], rank: int) -> None:
        self._point = plan["point"] if rank == plan["rank"] else None
        self._hits_left = plan["hit"]
        self._victims = plan["victims"]
        self._processes = Path(plan["processes"])

    def passes(self, point: str) -> bool:
        """Whether this passing is the one to be killed at."""
        if point == self._point:
            self._hits_left -= 1
        return point == self._point and self._hits_left == 0

    def strike(self) -> None:
        pids = [int(path.name) for path in self._processes.iterdir()] if self._victims == "all" else []
        for pid in pids:
            if pid != os.getpid():
                with suppress(ProcessLookupError):  # it died with its launcher, a moment ago
                    os.kill(pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def around(self, point: str, function: Callable[..., Any], halfway: Callable[..., None]) -> Callable[..., Any]:
        """`function`, before, in or after which the process is killed."""

        def wrapped(*arguments: Any, **named: Any) -> Any:
            if self.passes(point):
                halfway(*arguments, **named)
                self.strike()
            result = function(*arguments, **named)
            if self.passes(point):
                self.strike()
            return result

        return wrapped


def plant(striker: Striker) -> None:
    """Puts the points into the product's functions."""
    put = SafetensorsWriter._put
    SafetensorsWriter._put = striker.around("shard", put, lambda self, content: put(self, content[: len(content) // 2]))
    os.fsync = striker.around("fsync", os.fsync, lambda descriptor: None)
    saving.write_manifest = striker.around("manifest", saving.write_manifest, half_a_manifest)
    saving.write_marker = striker.around(
        "marker", saving.write_marker, lambda directory: (directory / "COMMITTED").touch()
    )
    save_part = CheckpointSaver._write
    CheckpointSaver._write = striker.around("part", save_part, lambda *arguments: None)
    commit = store.CheckpointStore.commit
    store.CheckpointStore.commit = striker.around("rename", commit, lambda *arguments: None)
    store.shutil.rmtree = striker.around("retention", shutil.rmtree, half_a_removal)


def half_a_manifest(directory: Path, files: Any) -> None:
    (directory / MANIFEST).write_text('{"format_version": 1, "files": {')


def half_a_removal(path: Path) -> None:
    files = sorted(file for file in Path(path).rglob("*") if file.is_file())
    for file in files[: len(files) // 2]:
        file.unlink()


def main() -> None:
    plan = json.loads(Path(os.environ[PLAN_VARIABLE]).read_text())
    rank = int(os.environ["RANK"])
    for pid in (os.getpid(), os.getppid()):
        (Path(plan["processes"]) / str(pid)).touch()
    if plan["point"] is not None:
        plant(Striker(plan, rank))
    hooks = run._hooks

    def with_ledger(*arguments: Any) -> list[Hook]:
        return [*hooks(*arguments), Ledger(Path(plan["ledger"]) / f"rank-{rank}.jsonl", plan["attempt"])]

    run._hooks = with_ledger
    worker.main()


if __name__ == "__main__":
    main()
