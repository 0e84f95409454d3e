"""Who owns a run directory: live and dead owners, here and on other hosts, with and without file locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from understudy.errors import StoppedError, UserError
from understudy.launch import run_lock
from understudy.launch.run_lock import MARKER, Owner, RunLock, lock_run, read_owner, still_owned
from understudy.launch.signals import noted_signals
from understudy.recipe.source_map import SourceMap

pytestmark = pytest.mark.unit

SOURCES = SourceMap("recipe.yaml", {"output_dir": 3})
HOLDER = """
import sys
from pathlib import Path
from understudy.launch.run_lock import lock_run
from understudy.recipe.source_map import SourceMap
with lock_run(Path(sys.argv[1]), SourceMap(), print) as lock:
    sys.stdout.write(lock.token + "\\n"); sys.stdout.flush(); sys.stdin.read()
    lock.release()
"""
BROKEN = "import fcntl, errno\ndef broken(*_): raise OSError(errno.ENOLCK, 'none')\nfcntl.flock = broken\n"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(run_lock, "SETTLE_SECONDS", 0.1)


def broken_flock(*arguments: Any) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.fixture(params=["locks", "no locks"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With and without locks of the file system, here and in `holder`."""
    if request.param == "no locks":
        monkeypatch.setattr(fcntl, "flock", broken_flock)
    return bool(request.param == "locks")


@contextmanager
def holder(path: Path, *, locks: bool = True) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that owns `path` until its standard input ends, and its token."""
    arguments = [sys.executable, "-c", ("" if locks else BROKEN) + HOLDER, str(path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@contextmanager
def held(path: Path, report: Callable[[str], None] = lambda line: None) -> Iterator[RunLock]:
    with lock_run(path, SOURCES, report) as lock:
        try:
            yield lock
        finally:
            lock.release()


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught, held(path):
        pass
    assert (caught.value.file, caught.value.line) == ("recipe.yaml", 3)
    return caught.value.message


def write_owner(path: Path, **changes: Any) -> Owner:
    """An owner that was this process, but for `changes`."""
    owner = replace(run_lock._this_process(), **changes)
    (path / MARKER).write_bytes(owner.encode())
    return owner


def dead_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_a_live_owner_is_named_and_stays_the_owner(tmp_path: Path, locks: bool) -> None:
    with holder(tmp_path, locks=locks) as (process, token):
        assert f"in use by a running job (process {process.pid} on {socket.gethostname()}, since" in refusal(tmp_path)
        assert still_owned(tmp_path, token)


def test_an_owner_that_is_killed_is_taken_over_at_once(tmp_path: Path, locks: bool) -> None:
    lines: list[str] = []
    with holder(tmp_path, locks=locks) as (process, token):
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # its parent has not asked yet how it ended
        assert still_owned(tmp_path, token), "nobody has taken over yet"
        with held(tmp_path, lines.append) as lock:
            assert still_owned(tmp_path, lock.token)
            assert not still_owned(tmp_path, token)
    assert lines == []


def test_an_owner_that_released_it_owns_it_no_more(tmp_path: Path, locks: bool) -> None:
    with holder(tmp_path, locks=locks) as (process, token):
        process.communicate("")
        assert not still_owned(tmp_path, token)
        assert read_owner(tmp_path) is None
        with held(tmp_path):
            pass


def test_a_later_process_of_the_same_id_is_not_the_owner(tmp_path: Path) -> None:
    started = run_lock._this_process().started
    assert started is not None
    write_owner(tmp_path)
    assert f"process {os.getpid()} " in refusal(tmp_path)
    write_owner(tmp_path, started=started - 1)
    with held(tmp_path):
        pass


@contextmanager
def beating(path: Path, owner: Owner) -> Iterator[None]:
    done = threading.Event()

    def beat() -> None:
        count = 0
        while not done.wait(run_lock.BEAT_SECONDS):
            count += 1
            (path / MARKER).write_bytes(replace(owner, beat=count).encode())

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


# Where its process id, start and container mean nothing to us: another host, this one before it was started anew.
ELSEWHERE = pytest.mark.parametrize("elsewhere", [{"host": "elsewhere"}, {"boot": "before"}])


@ELSEWHERE
def test_an_owner_elsewhere_whose_count_moves_is_alive(tmp_path: Path, elsewhere: dict[str, str]) -> None:
    owner = write_owner(tmp_path, process=dead_process(), **elsewhere)
    with beating(tmp_path, owner):
        assert f"in use by a running job (process {owner.process} on {owner.host}, since" in refusal(tmp_path)
        assert still_owned(tmp_path, owner.token)


@ELSEWHERE
def test_an_owner_elsewhere_that_stands_still_is_taken_over_after_a_while(
    tmp_path: Path, elsewhere: dict[str, str]
) -> None:
    owner = write_owner(tmp_path, **elsewhere)
    lines: list[str] = []
    began = time.monotonic()
    with held(tmp_path, lines.append) as lock:
        assert time.monotonic() - began >= 2 * run_lock.BEAT_SECONDS
        assert still_owned(tmp_path, lock.token)
    [line] = lines
    assert f"was held by process {owner.process} on {owner.host}; waiting " in line


def test_an_owner_elsewhere_that_ends_while_it_is_watched_is_followed_at_once(tmp_path: Path) -> None:
    owner = write_owner(tmp_path, host="elsewhere")
    end = threading.Timer(0.1, lambda: (tmp_path / MARKER).write_bytes(run_lock._released(owner)))
    end.start()
    began = time.monotonic()
    with held(tmp_path):
        assert time.monotonic() - began < run_lock.BEATS_WATCHED * run_lock.BEAT_SECONDS
    end.join()


def test_an_owner_counts_so_that_others_see_it_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(tmp_path):
        monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
        monkeypatch.setattr(fcntl, "flock", broken_flock)
        assert f"process {os.getpid()} " in refusal(tmp_path)


def test_of_two_that_take_over_in_the_same_instant_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have found the owner dead before either signs, and one of them is slow."""
    monkeypatch.setattr(run_lock, "SETTLE_SECONDS", 1.0)
    monkeypatch.setattr(fcntl, "flock", broken_flock)
    write_owner(tmp_path, process=dead_process())
    together, sign, outcomes = threading.Barrier(2, timeout=30), run_lock._sign, []

    def sign_together(*arguments: Any) -> None:
        if together.wait() == 0:
            time.sleep(0.2)
        sign(*arguments)

    monkeypatch.setattr(run_lock, "_sign", sign_together)

    def take() -> None:
        try:
            with held(tmp_path) as lock:
                outcomes.append(lock.token)
                together.wait()  # until the other one has been refused
        except UserError:
            outcomes.append("refused")
            together.wait()

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("refused") == 1


def test_one_that_was_taken_over_leaves_the_next_owner_alone(tmp_path: Path) -> None:
    for give_up in (RunLock.release, RunLock.undo):
        (tmp_path / MARKER).unlink(missing_ok=True)
        with lock_run(tmp_path, SOURCES, print) as lock:
            later = write_owner(tmp_path, host="elsewhere")
            time.sleep(3 * run_lock.BEAT_SECONDS)
            assert read_owner(tmp_path) == later, "it counted in a record that is not its own"
            give_up(lock)
            assert read_owner(tmp_path) == later


def test_a_count_written_late_leaves_the_next_owners_record_readable(tmp_path: Path) -> None:
    owner = write_owner(tmp_path, host="another.example.org", process=1)
    with (tmp_path / MARKER).open("r+b") as file:
        file.write(run_lock._COUNT.format(123).encode())
    assert read_owner(tmp_path) == replace(owner, beat=123)


def test_the_owner_can_be_read_while_its_record_is_rewritten(tmp_path: Path) -> None:
    owner = write_owner(tmp_path)
    records = [replace(owner, host="h" * length).encode() for length in (1, 2000, 50)]
    done = threading.Event()
    descriptor = os.open(tmp_path / MARKER, os.O_RDWR)

    def rewrite() -> None:
        while not done.is_set():
            for record in records:
                run_lock._write(descriptor, record)

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        assert all(still_owned(tmp_path, owner.token) for _ in range(300))
    finally:
        done.set()
        writer.join()
        os.close(descriptor)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"process": 1, "host": "x", "since": "y"}', '{"proc', "\xff"])
def test_a_marker_that_names_no_owner_is_nobodys_and_is_put_back(
    tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "READ_SECONDS", 0.1)
    (tmp_path / MARKER).write_text(content, encoding="latin-1")
    with lock_run(tmp_path, SOURCES, print) as lock:
        assert still_owned(tmp_path, lock.token)
        lock.undo()
    assert (tmp_path / MARKER).read_text(encoding="latin-1") == content


def test_undoing_a_takeover_does_not_bring_the_dead_owner_back(tmp_path: Path) -> None:
    owner = write_owner(tmp_path, process=dead_process())
    with lock_run(tmp_path, SOURCES, print) as lock:
        lock.undo()
    assert read_owner(tmp_path) is None
    assert json.loads((tmp_path / MARKER).read_text())["process"] == owner.process


def test_a_directory_that_is_gone_is_not_owned(tmp_path: Path) -> None:
    assert not still_owned(tmp_path / "gone", "token")


def test_a_request_to_stop_ends_the_watching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 60.0)
    owner = write_owner(tmp_path, host="elsewhere")
    with (
        pytest.raises(StoppedError, match="stopped by SIGTERM before training began"),
        noted_signals(),
        held(tmp_path, lambda line: os.kill(os.getpid(), signal.SIGTERM)),
    ):
        pass
    assert read_owner(tmp_path) == owner
