"""Runs one side of a comparison in a process of its own, so that neither warms the other's caches or memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["fresh_peak", "measure", "peak_bytes", "run"]

ROOT = Path(__file__).parents[1]


def run(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a command from the repository's root. Ends the program with its output when it fails."""
    done = subprocess.run(
        list(arguments),
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(arguments)} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


def measure(module: str, settings: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Any:
    """What `python -m MODULE` prints as JSON in its last line, given `settings` as JSON in its only argument."""
    done = run([sys.executable, "-m", module, json.dumps(settings)], environment)
    return json.loads(done.stdout.splitlines()[-1])


def fresh_peak() -> None:
    """Forgets this process's peak of memory, where the kernel allows it (Linux, proc(5))."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Most resident memory of this process since `fresh_peak`."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
