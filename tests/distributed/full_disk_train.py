"""`understudy train` whose disk fills up while it trains: the command of the tests of a full disk."""

from __future__ import annotations

from typing import Any

from understudy.launch.local import launch_local
from understudy.training import start


def fill_disk_while_training() -> None:
    """Has this process, which trains then, start workers that do."""
    start.launch_local = launch_filling_workers


def launch_filling_workers(arguments: tuple[str, ...], *others: Any, **named: Any) -> None:
    module = "tests.distributed.full_disk_worker"
    launch_local(
        tuple(module if part == "understudy.training.worker" else part for part in arguments), *others, **named
    )
