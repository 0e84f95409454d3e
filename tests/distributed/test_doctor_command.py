"""`understudy doctor`, as it is run: on this machine as it is, and on one with faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.distributed

# `compile` compiles anew each time, and so takes longer than all the others.
CHECKS = ("python", "torch", "threads", "devices", "matrix-product", "collectives", "compiled-operators", "hub")


def doctor(checks: tuple[str, ...], *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    only = [word for name in checks for word in ("--only", name)]
    command = [sys.executable, "-m", "understudy", "doctor", *only, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


def test_this_machine_is_well_and_two_processes_reach_each_other() -> None:
    done = doctor(CHECKS, "--json", "--processes", "2")
    report: dict[str, Any] = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    checks = {check["name"]: check for check in report["checks"]}
    assert set(checks) == set(CHECKS)
    assert {name: check["found"] for name, check in checks.items() if check["status"] == "broken"} == {}
    assert report["status"] in ("ok", "warning")
    rates = checks["collectives"]["details"]["bytes_per_second"]
    assert set(rates) == {"all-reduce", "all-gather", "reduce-scatter"}
    assert all(rate > 0 for rate in rates.values())
    assert checks["compiled-operators"]["details"]["difference"] < 1e-6
    assert checks["devices"]["details"]["devices"][0]["total_bytes"] > 0


def test_a_machine_without_a_compiler_says_so_beside_its_other_faults(tmp_path: Path) -> None:
    """Each line is for a reader: the status, what was found, and the fix."""
    (tmp_path / "file").touch()
    done = doctor(
        ("compiled-operators", "cache-directory", "launcher-variables", "python"),
        PATH=str(tmp_path),
        TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"),
        UNDERSTUDY_CACHE=str(tmp_path / "file" / "cache"),
        RANK="0",
        WORLD_SIZE="2",
    )
    assert (done.returncode, done.stderr) == (1, "")
    lines = {line.split()[1]: line for line in done.stdout.splitlines()[:-1]}
    assert {name: line.split()[0] for name, line in lines.items()} == {
        "compiled-operators": "broken",
        "cache-directory": "broken",
        "launcher-variables": "broken",
        "python": "ok",
    }
    assert "could not be compiled" in lines["compiled-operators"]
    assert "ds_opt_adam" not in lines["compiled-operators"]
    assert "C++ compiler" in lines["compiled-operators"].partition("→")[2]
    assert "UNDERSTUDY_CACHE" in lines["cache-directory"].partition("→")[2]
    assert "unset RANK" in lines["launcher-variables"].partition("→")[2]
    assert done.stdout.splitlines()[-1].startswith("broken: ")
