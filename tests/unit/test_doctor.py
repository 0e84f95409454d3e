"""`understudy doctor`: what runs the checks, what the command shows, and the checks of versions."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.planted_faults import HOST, installed
from understudy.cli.main import exit_status
from understudy.diagnosis import runner
from understudy.diagnosis.check import CHECKS, Check, Finding, Host, all_of, broken, ok, warning
from understudy.diagnosis.checks import (
    versions,
)
from understudy.diagnosis.registry import all_checks, checks_named
from understudy.diagnosis.runner import Result, run_checks
from understudy.errors import UserError

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


def named(name: str) -> Check:
    [found] = checks_named([name])
    return found


# What runs them.


def test_a_check_that_hangs_is_ended_by_its_limit_and_the_others_go_on() -> None:
    hanging = replace(named("temporary-directory"), seconds=0.01, if_lost="Do this.")
    found = {result.name: result.finding for result in run_checks([hanging, named("python")], HOST)}
    assert found["python"].status == "ok"
    assert found["temporary-directory"].status == "broken"
    assert "not over after" in found["temporary-directory"].found
    assert found["temporary-directory"].fix == "Do this."


def test_a_check_that_crashes_is_a_finding_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crashing = tmp_path / "crashing"
    crashing.write_text("#!/bin/sh\necho loading\necho 'cannot open device' >&2\nkill -ILL $$\n")
    crashing.chmod(0o755)
    monkeypatch.setattr(runner.sys, "executable", str(crashing))
    [result] = run_checks([replace(named("devices"), lost_is="warning")], HOST)
    assert result.finding.status == "warning"
    assert "SIGILL" in result.finding.found
    assert "cannot open device" in result.finding.found


def test_where_no_process_can_be_started_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.sys, "executable", "/nowhere/python")
    found = {
        result.name: result.finding for result in run_checks([named("hub"), named("devices"), named("python")], HOST)
    }
    assert {name: finding.status for name, finding in found.items()} == {
        "python": "ok",
        "hub": "warning",
        "devices": "broken",
    }
    assert "no process can be started" in found["devices"].found


def test_what_a_check_raises_is_what_it_found() -> None:
    def fails(host: Host) -> Finding:
        raise ValueError("no such thing\nmore")

    [result] = run_checks([Check("fails", fails, None, False, "Look.", "broken")], HOST)
    assert (result.finding.status, result.finding.found, result.finding.fix) == (
        "broken",
        "ValueError: no such thing",
        "Look.",
    )


def test_no_process_of_a_check_outlives_the_one_who_asked() -> None:
    running = run_checks([named("temporary-directory"), named("python")], HOST)
    assert next(running).name == "python"
    running.close()
    done = subprocess.run(["ps", "-eo", "ppid=,args="], capture_output=True, text=True, check=True).stdout
    ours = [line for line in done.splitlines() if line.split()[0] == str(os.getpid()) and "diagnosis.child" in line]
    assert ours == []


def test_checks_have_names_of_their_own_and_say_what_to_do_when_they_are_lost() -> None:
    checks = all_checks()
    assert max(Counter(check.name for check in checks).values()) == 1
    assert all(check.if_lost.endswith(".") for check in checks)
    assert len(checks) == len(CHECKS) >= 25


def test_a_check_that_does_not_exist_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean collectives"):
        checks_named(["colectives"])


def test_the_worst_of_several_findings_comes_first_and_all_fixes_stay() -> None:
    whole = all_of([ok("a", one=1), warning("b", "Do b."), broken("c", "Do c.", two=2)])
    assert (whole.status, whole.found, whole.fix) == ("broken", "c; b; a", "Do c. Do b.")
    assert whole.details == {"one": 1, "two": 2}


# The command.


def show(monkeypatch: pytest.MonkeyPatch, *findings: Finding, arguments: tuple[str, ...] = ()) -> int:
    results = [Result(name, finding, 0.5) for name, finding in zip(("python", "torch", "numpy"), findings)]
    monkeypatch.setattr(runner, "run_checks", lambda checks, host, watch: iter(reversed(results)))
    return exit_status(["doctor", "--only", "python", "--only", "torch", "--only", "numpy", *arguments])


def test_lines_are_plain_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(monkeypatch, ok("fine"), warning("so\x1b[2J", "Do [b]this[/b].")) == 0
    assert capsys.readouterr().out.splitlines() == [
        "warning  torch                so [2J → Do [b]this[/b].",
        "ok       python               fine",
        "warning: torch.",
    ]


def test_something_broken_is_status_1_and_the_json_says_which(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(monkeypatch, ok("fine", a=1), broken("gone", "Get it."), warning("w", "f"), arguments=("--json",)) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["status"] == "broken"
    assert [(each["name"], each["status"], each["fix"]) for each in said["checks"]] == [
        ("python", "ok", None),
        ("torch", "broken", "Get it."),
        ("numpy", "warning", "f"),
    ]
    assert said["checks"][0]["details"] == {"a": 1}


def test_the_command_imports_neither_torch_nor_what_may_be_missing() -> None:
    script = """
import sys
BLOCKED = {"torch", "transformers", "numpy", "datasets", "deepspeed", "peft", "huggingface_hub", "httpx2", "tokenizers"}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} must not be imported here")
sys.meta_path.insert(0, Blocker())
from understudy.cli.main import exit_status
from understudy.diagnosis.registry import all_checks
names = [check.name for check in all_checks() if check.seconds is None]
sys.exit(exit_status(["doctor", "--json", *[word for name in names for word in ("--only", name)]]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["torch"]["status"] != "broken"
    assert not any("ImportError" in check["found"] for check in checks.values())


# Versions.


@pytest.mark.parametrize(
    ("name", "version", "status", "found", "fix"),
    [
        ("torch", "2.4.1+cu121", "broken", "2.4.1+cu121 is too old", "pip install --upgrade 'torch>=2.10'"),
        ("torch", None, "broken", "not installed", "pip install 'torch>=2.10'"),
        ("torch", "99.1", "warning", "newer than any that was tested", "pip install 'torch=="),
        ("torch", "2.10.0", "ok", "tested with", None),
        ("deepspeed", None, "warning", "zero0 to zero3", "pip install 'understudy[deepspeed]'"),
        ("peft", None, "warning", "LoRA", "pip install 'understudy[adapters]'"),
        ("bitsandbytes", "0.40.0", "broken", "too old", "pip install --upgrade 'bitsandbytes"),
        ("numpy", "1.20.0", "broken", "too old", "pip install --upgrade 'numpy"),
        ("deepspeed", "0.99.0", "warning", "newer", "pip install 'deepspeed=="),
    ],
)
def test_a_version_is_judged_by_what_is_needed_and_what_was_tested(
    name: str, version: str | None, status: str, found: str, fix: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with installed(monkeypatch, **{name: version}):
        finding = versions.package(name, HOST)
    assert finding.status == status
    assert found in finding.found
    assert finding.fix is None if fix is None else fix in (finding.fix or "")


def test_packages_that_cannot_be_imported_are_told_with_their_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> None:
        if name in ("torch", "peft"):
            raise OSError("libcudart.so.12: cannot open shared object file")
        if name == "deepspeed":
            raise ImportError("cannot import name X")

    monkeypatch.setattr(versions.importlib, "import_module", import_module)
    finding = versions.imports(HOST)
    assert finding.status == "broken"
    assert "torch, peft cannot be imported (OSError: libcudart.so.12" in finding.found
    assert "deepspeed cannot be imported (ImportError: cannot import name X)" in finding.found
    assert "--force-reinstall torch" in (finding.fix or "")


def test_a_check_that_needs_what_cannot_be_imported_says_where_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_installed.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)

    def needs_it(host: Host) -> Finding:
        importlib.import_module("half_installed")
        return ok("")

    [result] = run_checks([Check("needs-it", needs_it, None, False, "Restart it.", "broken")], HOST)
    assert "libcudart" in result.finding.found
    assert "`imports`" in (result.finding.fix or "")


def test_packages_without_a_line_of_their_own_are_missed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert versions.other_packages(HOST).status == "ok"
    with installed(monkeypatch, jinja2="3.0", safetensors=None):
        finding = versions.other_packages(HOST)
    assert finding.status == "broken"
    assert finding.details["wrong"] == ["safetensors>=0.5", "jinja2>=3.1.6"]
    assert "'jinja2>=3.1.6'" in (finding.fix or "")


def test_packages_that_disagree_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(monkeypatch, tokenizers="0.1.0"):
        finding = versions.package_conflicts(HOST)
    assert finding.status == "warning"
    assert any("transformers needs tokenizers" in conflict for conflict in finding.details["conflicts"])


def test_the_tested_versions_are_those_of_the_constraints() -> None:
    script = ROOT / "docs" / "make_tested_versions.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_package_that_is_asked_for_is_in_the_tested_set() -> None:
    missing = [name for name in versions.asked_for() if name != "tomli" and versions.tested_version(name) is None]
    assert missing == []


def test_more_processes_than_cores_can_start_are_wrong_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["doctor", "--processes", "100000"]) == 2
    assert "give --processes at most" in capsys.readouterr().err
