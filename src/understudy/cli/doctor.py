"""Say what this machine can do and what on it is broken, with the fix."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from understudy.diagnosis.check import Status
    from understudy.diagnosis.runner import Result

STYLES: dict[Status, str] = {"ok": "green", "warning": "yellow", "broken": "bold red"}
STATUS_WIDTH, NAME_WIDTH = 9, 21


@click.command
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines, when all is done.")
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    help="Processes to try collectives with.  [default: one a device; 2 on a machine without]",
)
@click.option("--only", multiple=True, metavar="CHECK", help="Run this check alone, such as `collectives`; repeatable.")
def command(as_json: bool, processes: int | None, only: tuple[str, ...]) -> int:
    """Look at everything on this machine that a run needs, and say of each thing whether it is ok, deserves a warning,
    or is broken, with the fix.

    It takes half a minute or less, and some minutes once, while DeepSpeed's operators are compiled. Nothing is changed
    but their cache. Lines appear as checks end.

    Exit status 0 when nothing is broken, warnings or not; 1 when something is; 2 for wrong input.

    Example: understudy doctor --processes 4
    """
    from understudy.diagnosis.check import Host, worst
    from understudy.diagnosis.checks.collectives import refuse_too_many
    from understudy.diagnosis.registry import checks_named
    from understudy.diagnosis.runner import run_checks

    checks = checks_named(only)
    host = Host(processes=processes)
    refuse_too_many(host)
    console = Console(highlight=False, quiet=as_json)
    results = []
    with _shown_running(console) as watch:
        for result in run_checks(checks, host, watch):
            results.append(result)
            _print(console, result)
    status = worst([result.finding.status for result in results])
    if as_json:
        order = [check.name for check in checks]
        results.sort(key=lambda result: order.index(result.name))
        click.echo(json.dumps({"status": status, "checks": [_row(result) for result in results]}))
    else:
        console.print(_summary(results), soft_wrap=True)
    return 1 if status == "broken" else 0


@contextmanager
def _shown_running(console: Console) -> Iterator[Callable[[Sequence[str]], None]]:
    """On a terminal, what is under way stands below the lines."""
    if not console.is_terminal or console.quiet:
        yield lambda names: None
        return
    with console.status("") as spinner:
        yield lambda names: spinner.update(Text(f"checking {', '.join(names)} …" if names else ""))


def _print(console: Console, result: Result) -> None:
    """One line; on a terminal the fix has its own, and both are wrapped beside the name."""
    finding = result.finding
    found, fix = _printable(finding.found), _printable(finding.fix or "")
    if not console.is_terminal:
        line = f"{finding.status:<{STATUS_WIDTH}}{result.name:<{NAME_WIDTH}}{found}" + (f" → {fix}" if fix else "")
        console.print(Text(line), soft_wrap=True)
        return
    grid = Table.grid()
    grid.add_column(width=STATUS_WIDTH)
    grid.add_column(width=NAME_WIDTH)
    grid.add_column()
    told = Text.assemble(found, (f"\n→ {fix}" if fix else "", "cyan"))
    grid.add_row(Text(finding.status, STYLES[finding.status]), Text(result.name, "bold"), told)
    console.print(grid)


def _row(result: Result) -> dict[str, Any]:
    finding = result.finding
    return {
        "name": result.name,
        "status": finding.status,
        "found": finding.found,
        "fix": finding.fix,
        "seconds": round(result.seconds, 3),
        "details": dict(finding.details),
    }


def _summary(results: Sequence[Result]) -> Text:
    named = {
        status: [result.name for result in results if result.finding.status == status]
        for status in ("broken", "warning")
    }
    if not any(named.values()):
        return Text(f"{len(results)} of {len(results)} checks are ok.")
    parts = [f"{status}: {', '.join(names)}" for status, names in named.items() if names]
    return Text("; ".join(parts) + ".")


def _printable(text: str) -> str:
    """What compilers and drivers say must not steer the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)
