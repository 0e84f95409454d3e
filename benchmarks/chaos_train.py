"""`understudy train` whose workers keep a ledger and kill themselves where the plan says: the command of `chaos`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from understudy.cli.main import main
from understudy.launch.local import launch_local
from understudy.training import start


def launch_ledger_keepers(arguments: tuple[str, ...], *others: Any, **named: Any) -> None:
    replaced = tuple("benchmarks.chaos_worker" if part == "understudy.training.worker" else part for part in arguments)
    launch_local(replaced, *others, **named)


if __name__ == "__main__":
    start.launch_local = launch_ledger_keepers
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
