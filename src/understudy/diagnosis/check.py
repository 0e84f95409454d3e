"""What a check of this machine is, and what it finds. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from understudy.devices.detect import detect_machine
from understudy.plan.machine import Machine

__all__ = [
    "CHECKS",
    "STATUSES",
    "Check",
    "Find",
    "Finding",
    "Host",
    "Status",
    "all_of",
    "broken",
    "check",
    "ok",
    "warning",
    "worst",
]

Status = Literal["ok", "warning", "broken"]
STATUSES: tuple[Status, ...] = ("ok", "warning", "broken")
"""From good to bad."""


@dataclass(frozen=True)
class Finding:
    status: Status
    found: str
    """What is there, on one line."""
    fix: str | None = None
    """What to do, in sentences; None when all is well."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """The same as JSON values, for programs."""


def ok(found: str, **details: Any) -> Finding:
    return Finding("ok", found, None, details)


def warning(found: str, fix: str, **details: Any) -> Finding:
    return Finding("warning", found, fix, details)


def broken(found: str, fix: str, **details: Any) -> Finding:
    return Finding("broken", found, fix, details)


def worst(statuses: Sequence[Status]) -> Status:
    return max(statuses, key=STATUSES.index, default="ok")


def all_of(findings: Sequence[Finding]) -> Finding:
    """Several findings about one thing as one, what is worst first."""
    ordered = sorted(findings, key=lambda finding: STATUSES.index(finding.status), reverse=True)
    fixes = [finding.fix for finding in ordered if finding.fix]
    details = {name: value for finding in findings for name, value in finding.details.items()}
    return Finding(ordered[0].status, "; ".join(finding.found for finding in ordered), " ".join(fixes) or None, details)


@dataclass(frozen=True)
class Host:
    """The machine that is looked at."""

    root: Path = Path("/")
    """Of its file system."""
    processes: int | None = None
    """To try collectives with; None for one a device, and 2 where there is none."""

    @cached_property
    def machine(self) -> Machine:
        """Asking for it may run a vendor's tool, and so take seconds."""
        return detect_machine(self.root)


Find = Callable[[Host], Finding]


@dataclass(frozen=True)
class Check:
    name: str
    find: Find
    seconds: float | None
    """It runs in a process of its own, which is ended when it takes longer; None for what cannot hang, crash or need
    torch, and runs at once."""
    alone: bool
    """It measures, so nothing else may run meanwhile."""
    if_lost: str
    """The fix when it takes too long, crashes or raises."""
    lost_is: Status


CHECKS: list[Check] = []


def check(
    name: str,
    *,
    seconds: float | None = None,
    alone: bool = False,
    if_lost: str | None = None,
    lost_is: Status = "broken",
) -> Callable[[Find], Find]:
    """Has `understudy doctor` do what it decorates; the arguments are those of `Check`."""
    assert seconds is None or if_lost is not None, f"{name} can be lost; what is to be done then?"
    lost = if_lost or "Run `understudy doctor --json`, and see this check's details for where it failed."

    def add(find: Find) -> Find:
        CHECKS.append(Check(name, find, seconds, alone, lost, lost_is))
        return find

    return add
