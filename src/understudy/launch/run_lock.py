"""Who owns a run directory: one run at a time, on whatever file system. Imports no torch.

The marker file names the owner and is locked (`flock`), where the file system can; that alone is not enough: some
shared file systems refuse locks, and some keep them to one host. So the owner also counts up in its record, every
`BEAT_SECONDS`. An owner on this host is known by its process; one on another host is alive when its count moves.

Without locks, two that take over the same dead owner at the same instant both write their record, and the second one
stays. Everyone therefore reads back what it wrote, and `still_owned` tells later whether it is still there; it is to be
asked before anything is committed into the directory.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from understudy.errors import UserError
from understudy.launch.signals import check_stop_requests
from understudy.recipe.source_map import SourceMap

__all__ = ["MARKER", "Owner", "RunLock", "in_use", "lock_run", "read_owner", "still_owned", "write_errors"]

MARKER = ".understudy-run.json"
BEAT_SECONDS = 10.0
"""Between two counts of an owner."""
BEATS_WATCHED = 2.5
"""So long an owner on another host must stand still to be taken for dead."""
SETTLE_SECONDS = 1.0
"""From writing a record that a lock does not protect until it is read back."""
POLL_SECONDS = 0.2
READ_SECONDS = 1.0
"""A record that makes no sense for so long is not just being written."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
_COUNT = '{{"beat": {:>12}'
"""The same bytes of every record, so that a count written late cannot break the record of the next owner."""


@dataclass(frozen=True)
class Owner:
    """The process that owns a run directory."""

    process: int
    host: str
    boot: str
    """Of the host's system since it started, and of the container within it; empty where the system has no such
    identity."""
    started: int | None
    """Clock ticks from the start of the system to that of the process; tells a process from a later one of its id."""
    since: str
    token: str
    """Of this ownership; no other has it."""
    beat: int = 0

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"

    def encode(self) -> bytes:
        fields = asdict(self)
        fields.pop("beat")
        return f"{_COUNT.format(self.beat)}, {json.dumps(fields)[1:]}\n".encode()


class RunLock:
    """The ownership of a run directory by this process, until it is released or another takes it over."""

    def __init__(self, path: Path, descriptor: int, owner: Owner, before: bytes | None) -> None:
        self._path = path
        self._descriptor = descriptor
        self._owner = owner
        self._before = before
        self._released = threading.Event()
        # A daemon: it must not keep a process alive whose main thread has ended.
        self._beating = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._beating.start()

    @property
    def token(self) -> str:
        """For `still_owned`, in any process."""
        return self._owner.token

    def release(self) -> None:
        """Leaves a marker that says nobody owns the directory any more."""
        self._give_up(_released(self._owner))

    def undo(self) -> None:
        """Leaves the marker as it was before, except that it names no owner."""
        self._give_up(self._before)

    def _give_up(self, content: bytes | None) -> None:
        self._stop()
        if not still_owned(self._path, self.token):
            return
        if content is None:
            (self._path / MARKER).unlink()
        else:
            _write(self._descriptor, content)

    def _stop(self) -> None:
        self._released.set()
        self._beating.join()

    def _beat(self) -> None:
        beat = 0
        while not self._released.wait(BEAT_SECONDS):
            beat += 1
            # A shared disk may not answer for a while. What is committed is guarded by `still_owned`, not by this.
            with suppress(OSError):
                if not still_owned(self._path, self.token):
                    return
                os.pwrite(self._descriptor, _COUNT.format(beat).encode(), 0)
                os.fsync(self._descriptor)  # or other hosts would not see it


@contextmanager
def lock_run(path: Path, sources: SourceMap, report: Callable[[str], None]) -> Iterator[RunLock]:
    """Makes this process the owner of the directory `path`. Who enters calls `release` or `undo` before leaving.

    Takes over from an owner that is dead: at once when it was on this host; otherwise after having watched it for
    `BEATS_WATCHED` beats, told of by `report`. Raises `UserError` at the recipe's `output_dir` when another process
    owns the directory or it cannot be written to, and `StoppedError` when a request to stop comes while it watches.
    """
    marker = path / MARKER
    with write_errors(path, sources):
        created, descriptor = _open(marker)
    try:
        exclusive = _flock(descriptor, path, sources)
        # The holder before us may have removed the marker between our opening and locking it.
        if os.fstat(descriptor).st_nlink == 0:
            raise in_use(path, None, sources)
        previous = None if created else read_owner(path)
        before = None if created else _released(previous) if previous else marker.read_bytes()
        here = _this_process()
        near = previous is None or _is_near(previous, here)
        if previous is not None:
            _refuse_living(previous, path, sources, report, near=near)
        with write_errors(path, sources):
            _sign(marker, descriptor, here, before)
        if not (near and exclusive):
            time.sleep(SETTLE_SECONDS)
            if not still_owned(path, here.token):
                raise in_use(path, read_owner(path), sources)
        lock = RunLock(path, descriptor, here, before)
        try:
            yield lock
        finally:
            lock._stop()
    finally:
        os.close(descriptor)


def still_owned(path: Path, token: str) -> bool:
    """Whether the run directory `path` belongs to the owner with `token`: nobody has taken it over, nor removed it.

    Raises `OSError` when the file system does not answer.
    """
    owner = read_owner(path)
    return owner is not None and owner.token == token


def read_owner(path: Path) -> Owner | None:
    """The process that the marker of the run directory `path` names as its owner, dead or alive; None when it names
    none or is missing."""
    deadline = time.monotonic() + READ_SECONDS
    while True:
        try:
            # Opened anew each time: on NFS that is what makes a client look at what others have written.
            return _decode((path / MARKER).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:  # it is just being written
            if time.monotonic() > deadline:
                return None
            time.sleep(POLL_SECONDS / 10)


def in_use(path: Path, owner: Owner | None, sources: SourceMap) -> UserError:
    """The refusal of a directory that belongs to `owner`."""
    who = "another process" if owner is None else str(owner)
    return sources.error(
        "output_dir", f"{path} is in use by a running job ({who}); wait for it, stop it, or choose another output_dir."
    )


@contextmanager
def write_errors(path: Path, sources: SourceMap) -> Iterator[None]:
    """Inside, a failing system call means that `path` cannot be written to."""
    try:
        yield
    except OSError as problem:
        raise sources.error(
            "output_dir", f"{path} cannot be written to ({problem.strerror}); choose another output_dir."
        ) from problem


def _open(marker: Path) -> tuple[bool, int]:
    """Whether it was created, and its descriptor."""
    try:
        return True, os.open(marker, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False, os.open(marker, os.O_RDWR | os.O_CREAT, 0o644)


def _flock(descriptor: int, path: Path, sources: SourceMap) -> bool:
    """Whether the file system has locks; we then hold it, until the descriptor is closed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise in_use(path, read_owner(path), sources) from None
    except OSError as problem:
        if problem.errno not in _NO_LOCKS:
            with write_errors(path, sources):
                raise
        return False
    return True


def _refuse_living(owner: Owner, path: Path, sources: SourceMap, report: Callable[[str], None], *, near: bool) -> None:
    if near:
        if _is_alive(owner):
            raise in_use(path, owner, sources)
        return
    watched_seconds = BEATS_WATCHED * BEAT_SECONDS
    report(
        f"{path} was held by process {owner.process} on {owner.host}; waiting {watched_seconds:.0f} s to see whether "
        "it is still alive"
    )
    deadline = time.monotonic() + watched_seconds
    while time.monotonic() < deadline:
        time.sleep(min(POLL_SECONDS, watched_seconds / 10))
        check_stop_requests()
        now = read_owner(path)
        if now is None:  # it ended just now
            return
        if (now.token, now.beat) != (owner.token, owner.beat):
            raise in_use(path, now, sources)


def _sign(marker: Path, descriptor: int, owner: Owner, before: bytes | None) -> None:
    try:
        _write(descriptor, owner.encode())
        os.fsync(descriptor)
    except OSError:  # a full disk
        if before is None:
            marker.unlink()
        else:
            _write(descriptor, before)
        raise


def _write(descriptor: int, content: bytes) -> None:
    # Never emptied first: a reader that sees two records mixed reads again, one that saw none would think it free.
    os.pwrite(descriptor, content, 0)
    os.ftruncate(descriptor, len(content))


def _decode(content: bytes) -> Owner | None:
    """Raises `ValueError` when `content` is half a record."""
    if not content.strip():
        return None
    record = json.loads(content)
    # A record of another form, such as one that was released, names nobody.
    if not isinstance(record, dict) or set(record) != set(Owner.__dataclass_fields__):
        return None
    owner = Owner(**record)
    return owner if isinstance(owner.process, int) and owner.process > 0 and isinstance(owner.token, str) else None


def _released(owner: Owner) -> bytes:
    """A record of whose the directory last was, which `_decode` takes for nobody's."""
    last = {"process": owner.process, "host": owner.host, "since": owner.since, "until": _now()}
    return f"{_COUNT.format(owner.beat)}, {json.dumps(last)[1:]}\n".encode()


def _this_process() -> Owner:
    process = os.getpid()
    return Owner(process, socket.gethostname(), _boot(), _started(process), _now(), secrets.token_hex(16))


def _is_near(owner: Owner, here: Owner) -> bool:
    """Whether its process, were it alive, would be among those that we see."""
    return replace(owner, host=here.host, boot=here.boot) == owner


def _is_alive(owner: Owner) -> bool:
    try:
        os.kill(owner.process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    # Where /proc does not tell, a process of that id counts as the owner.
    return owner.started is None or _started(owner.process) in (owner.started, None)


def _started(process: int) -> int | None:
    """When it started, as in `Owner`; -1 when it has ended and only waits for its parent to ask how; None where the
    system does not tell."""
    try:
        # The command's name, in parentheses, may hold anything, parentheses included.
        content = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = content.rpartition(")")[2].split()
    return -1 if state in "ZX" else int(fields[18])


def _boot() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _now() -> str:
    return datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds")
