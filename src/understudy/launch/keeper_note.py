"""What the keeper of a connection and the launcher that it started tell each other. Imports no torch.

It is a file that has no name, the launcher's standard input: either may be asked at any time, and neither waits. Times
are of a clock that all processes of a host share.
"""

from __future__ import annotations

import os
import struct
import tempfile
import time

from understudy.recipe.environment import is_kept

__all__ = ["ALIVE_SECONDS", "SILENT_SECONDS", "KeeperNote", "cut_off_from_launch", "tell_of_restart"]

ALIVE_SECONDS = 2.0
"""From one sign of life to the next, on every connection and in both directions."""
SILENT_SECONDS = 5.0
"""A connection on which there was none for so long is most likely broken. ssh itself takes longer to say so; that alone
ends nothing, but it tells a host that is cut off from one whose peers are lost."""
STDIN = 0
_HEARD, _RESTARTS = struct.Struct("d"), struct.Struct("q")


class KeeperNote:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @staticmethod
    def new() -> KeeperNote:
        with tempfile.TemporaryFile() as file:
            note = KeeperNote(os.dup(file.fileno()))
        note.note_heard()
        os.pwrite(note._descriptor, _RESTARTS.pack(0), _HEARD.size)
        return note

    def fileno(self) -> int:
        return self._descriptor

    def note_heard(self) -> None:
        """The keeper's: `understudy launch` has given a sign of life."""
        os.pwrite(self._descriptor, _HEARD.pack(time.monotonic()), 0)

    @property
    def silent_seconds(self) -> float:
        """Since it gave the last one."""
        [heard] = _HEARD.unpack(os.pread(self._descriptor, _HEARD.size, 0))
        return time.monotonic() - float(heard)

    @property
    def restarts(self) -> int:
        """How often the launcher has started its processes again for a loss."""
        return int(_RESTARTS.unpack(os.pread(self._descriptor, _RESTARTS.size, _HEARD.size))[0])

    def note_restart(self) -> None:
        """The launcher's: it does so once more."""
        os.pwrite(self._descriptor, _RESTARTS.pack(self.restarts + 1), _HEARD.size)


def cut_off_from_launch() -> bool:
    """Whether `understudy launch` started this launcher and has fallen silent: then it is this host that is cut off,
    where others seem lost, and they may be going on elsewhere."""
    return is_kept() and KeeperNote(STDIN).silent_seconds > SILENT_SECONDS


def tell_of_restart() -> None:
    """Has `understudy launch`, where that started this launcher, count a restart for a loss."""
    if is_kept():
        KeeperNote(STDIN).note_restart()
