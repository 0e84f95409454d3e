"""A process of a run whose disk another file fills, right before or after a save has looked whether there is room."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from understudy.checkpoint import saving
from understudy.checkpoint.saver import CheckpointSaver
from understudy.training import worker

PLAN_VARIABLE = "FULL_DISK_PLAN"
FOR_WRITING = os.O_WRONLY | os.O_RDWR


class WriteNote:
    """Which file, of those with `part` in their path, was opened for writing last."""

    def __init__(self, part: str = "") -> None:
        self.latest = ""
        self._part = part
        self._active = True
        sys.addaudithook(self._note)

    def stop(self) -> None:
        """Python has no way to take a hook away."""
        self._active = False

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._active or event != "open" or not arguments[2] & FOR_WRITING:
            return
        if self._part in str(arguments[0]):
            self.latest = str(arguments[0])


def fill(filler: Path, leave_bytes: int) -> None:
    """Lets `filler` grow until only `leave_bytes` are free."""
    with filler.open("wb", buffering=0) as file:
        status = os.statvfs(filler)
        blocks = status.f_bavail - leave_bytes // status.f_frsize
        file.write(b"\0" * (blocks * status.f_frsize))


def fill_at_save(plan: dict[str, Any]) -> None:
    """At the `save`th save."""
    check = CheckpointSaver._require_space
    saves = 0

    def require_space(self: CheckpointSaver, needed_bytes: int) -> None:
        nonlocal saves
        saves += 1
        if saves != plan["save"]:
            check(self, needed_bytes)
            return
        if not plan["before_check"]:
            check(self, needed_bytes)
        Path(plan["notes"], "filled").write_text(str(time.time()))
        fill(Path(plan["filler"]), plan["leave_bytes"])
        if plan["before_check"]:
            check(self, needed_bytes)

    CheckpointSaver._require_space = require_space  # type: ignore[method-assign]


def note_failing_writes(plan: dict[str, Any]) -> None:
    """Writes down which file was being written when the disk was found full."""
    note, explain = WriteNote(".partial/"), saving.full_disk

    def full_disk(*arguments: Any) -> Any:
        Path(plan["notes"], f"failed-{os.environ['RANK']}").write_text(note.latest.partition(".partial/")[2])
        return explain(*arguments)

    saving.full_disk = full_disk


def main() -> None:
    plan = json.loads(os.environ[PLAN_VARIABLE])
    fill_at_save(plan)
    note_failing_writes(plan)
    worker.main()


if __name__ == "__main__":
    main()
