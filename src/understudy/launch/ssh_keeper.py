"""The far end of a connection over which a host's part of a run is started. Imports no torch.

    python -m understudy.launch.ssh_keeper DIRECTORY ARGUMENTS…

runs `understudy ARGUMENTS…` in DIRECTORY for as long as the connection lasts. On standard input comes a line of JSON,
variables that no command line may show, then a line now and then: the name of a signal to pass on, `KILL`, or
`ALIVE`. Where these cease, the connection or who held it is gone: what was started is asked to stop, then killed. Its
output goes through here, so that it need not fail when there is nobody left to read it; signs of life, and of restarts,
are single bytes among it that no text has.
"""

from __future__ import annotations

import json
import os
import select
import selectors
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial

from understudy.errors import LostProcessError
from understudy.launch.keeper_note import ALIVE_SECONDS, KeeperNote
from understudy.launch.parent import die_with_parent
from understudy.recipe.environment import KEPT_VARIABLE, child_environment

__all__ = ["ALIVE", "ALIVE_BYTE", "KILL", "RESTART_BYTE", "main"]

ALIVE, KILL = "ALIVE", "KILL"
ALIVE_BYTE, RESTART_BYTE = b"\0", b"\1"
SILENCE_SECONDS = 20.0
"""More than ssh needs to find that a connection is broken."""
STOPPING_SECONDS = 60.0
"""For a checkpoint, once the connection is gone."""
POLL_SECONDS = 0.1
STDIN, STDOUT, STDERR = 0, 1, 2


def main() -> None:
    """Ends with the status of what it started; 5 where that was killed."""
    directory, *arguments = sys.argv[1:]
    keeper = _Keeper()
    sys.exit(keeper.run([sys.executable, "-m", "understudy", *arguments], directory))


class _Keeper:
    def __init__(self) -> None:
        self._received = b""
        self._note = KeeperNote.new()
        self._alive_at = 0.0
        self._told_restarts = 0
        self._kill_at: float | None = None

    def run(self, command: list[str], directory: str) -> int:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if not (line := self._first_line()):  # it was lost before it began
            return LostProcessError.exit_status
        with subprocess.Popen(
            command,
            cwd=directory,
            env=child_environment({"PYTHONUNBUFFERED": "1", KEPT_VARIABLE: "1", **json.loads(line)}),
            stdin=self._note.fileno(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid()),  # no threads here
        ) as process:
            self._watch(process)
            status = process.wait()
        return status if status >= 0 else LostProcessError.exit_status

    def _first_line(self) -> bytes:
        while b"\n" not in self._received:
            if not (more := os.read(STDIN, 2**16)):
                return b""
            self._received += more
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Until it has ended and all that it wrote is passed on."""
        assert process.stdout is not None
        assert process.stderr is not None
        with selectors.DefaultSelector() as selector:
            selector.register(STDIN, selectors.EVENT_READ)
            selector.register(process.stdout, selectors.EVENT_READ, STDOUT)
            selector.register(process.stderr, selectors.EVENT_READ, STDERR)
            ended_at: float | None = None
            while True:
                ready = selector.select(POLL_SECONDS)
                for key, _ in ready:
                    more = os.read(key.fd, 2**16)
                    if not more:
                        selector.unregister(key.fileobj)
                    if key.fd == STDIN:
                        self._obey(more, process)
                    else:
                        _write(key.data, more)
                now = time.monotonic()
                self._tell(now)
                if self._kill_at is None and self._is_forsaken():
                    self._obey(b"", process)
                if self._kill_at is not None and now > self._kill_at:
                    _signal(process, signal.SIGKILL)
                if process.poll() is not None:
                    ended_at = ended_at or now
                    # A process that outlived it may hold its output open.
                    if not any(key.fd != STDIN for key in selector.get_map().values()) or now - ended_at > 1.0:
                        return

    def _is_forsaken(self) -> bool:
        """Whether nothing was heard for too long, and not for that we were held up ourselves, in writing for one."""
        return self._note.silent_seconds > SILENCE_SECONDS and not select.select([STDIN], [], [], 0)[0]

    def _tell(self, now: float) -> None:
        """Signs of life, and of restarts."""
        signs = b""
        if now >= self._alive_at:
            self._alive_at, signs = now + ALIVE_SECONDS, ALIVE_BYTE
        restarts = self._note.restarts
        signs += RESTART_BYTE * (restarts - self._told_restarts)
        self._told_restarts = restarts
        if signs:
            _write(STDOUT, signs)

    def _obey(self, more: bytes, process: subprocess.Popen[bytes]) -> None:
        if not more:
            self._kill_at = self._kill_at or time.monotonic() + STOPPING_SECONDS
            _signal(process, signal.SIGTERM)
            return
        self._note.note_heard()
        *lines, self._received = (self._received + more).split(b"\n")
        for line in map(bytes.decode, lines):
            if line == KILL:
                _signal(process, signal.SIGKILL)
            elif line != ALIVE:
                _signal(process, signal.Signals[line])


def _write(descriptor: int, what: bytes) -> None:
    with suppress(OSError):  # nobody reads it any more
        os.write(descriptor, what)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if process.poll() is None:
        process.send_signal(number)


if __name__ == "__main__":
    main()
