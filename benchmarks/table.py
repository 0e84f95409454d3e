"""Tables of figures beside the goals they were set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import rich.box
from rich.console import Console
from rich.table import Table

__all__ = ["Row", "print_table"]

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
    table = Table(title=title, box=rich.box.ASCII2, title_justify="left")
    for name in ("", "understudy", reference, "ratio", "goal", "verdict"):
        table.add_column(name, justify="left" if name in ("", "goal", "verdict") else "right", no_wrap=True)
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        table.add_row(row.name, row.ours, row.reference, ratio, row.goal, row.verdict)
    console = Console()
    console.width = max(console.width, 140)
    console.print(table)
    console.print()
