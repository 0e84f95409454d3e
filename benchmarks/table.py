"""Tables of figures beside the goals they were set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import rich.box
from rich.console import Console
from rich.table import Table

__all__ = ["Row", "print_figures", "print_table"]

GIBIBYTE = 2**30


@dataclass(frozen=True)
class Row:
    """One comparison. `ours` and `reference` are shown as they are; `reached` is None where no goal was set."""

    name: str
    ours: str
    reference: str = ""
    ratio: float | None = None
    goal: str = ""
    reached: bool | None = None

    @property
    def verdict(self) -> str:
        return "" if self.reached is None else "reached" if self.reached else "MISSED"


def print_table(title: str, reference: str, rows: Sequence[Row]) -> None:
    cells = [
        (row.name, row.ours, row.reference, f"{row.ratio:.3f}" if row.ratio is not None else "", row.goal, row.verdict)
        for row in rows
    ]
    _print(title, ("", "understudy", reference, "ratio", "goal", "verdict"), cells, left=("", "goal", "verdict"))


def print_figures(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Figures that nothing is compared with. `columns` names those after the first, which says what is measured."""
    _print(title, ("", *columns), rows, left=("",))


def _print(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str]) -> None:
    table = Table(title=title, box=rich.box.ASCII2, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.width = max(console.width, 140)
    console.print(table)
    console.print()
