"""`understudy train` whose disk fills up while it trains: the command of the tests of a full disk."""

from __future__ import annotations

from typing import Any

from understudy.cli.main import main
from understudy.launch.local import launch_local
from understudy.training import start


def launch_filling_workers(arguments: tuple[str, ...], *others: Any, **named: Any) -> None:
    module = "tests.distributed.full_disk_worker"
    launch_local(
        tuple(module if part == "understudy.training.worker" else part for part in arguments), *others, **named
    )


if __name__ == "__main__":
    start.launch_local = launch_filling_workers
    main()
