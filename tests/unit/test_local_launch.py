"""The local launcher: what it starts, and what it says when something dies. Workers here are scripts without torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from understudy.errors import LostProcessError, StoppedError
from understudy.launch.cause import Cause, Exit, FailedRunError, first_failure
from understudy.launch.launcher import Cluster, RunSpec
from understudy.launch.local import LocalLauncher, launch_local
from understudy.launch.run_directory import RunDirectory
from understudy.launch.signals import noted_signals

pytestmark = pytest.mark.unit

PREAMBLE = """
import os, signal, sys, time
from pathlib import Path
from understudy.launch.cause import Cause, write_cause
from understudy.launch.signals import SIGNALS
rank = int(os.environ["RANK"])
directory = Path(sys.argv[1])
def fail(message, status, peer_failed=False, step=7):
    write_cause(directory / f"logs/rank-{rank}.cause.json",
                Cause(rank, "a", time.time(), status, message, step, "Traceback", peer_failed))
    sys.exit(status)
"""


def worker(tmp_path: Path, body: str) -> tuple[tuple[str, ...], RunDirectory]:
    return (sys.executable, "-c", PREAMBLE + body, str(tmp_path)), RunDirectory(tmp_path)


def launch(tmp_path: Path, body: str, processes: int = 2) -> RunDirectory:
    arguments, directory = worker(tmp_path, body)
    launch_local(arguments, processes, directory, cores=4, accelerated=False)
    return directory


def commands(threads: int | None, *, accelerated: bool) -> list[dict[str, str]]:
    cluster = Cluster(cores=8, accelerated=accelerated, rendezvous=Path("/x/meet"), threads=threads)
    return [dict(c.environment) for c in LocalLauncher().commands(RunSpec(("work",), 3, 0, 3), cluster)]


def test_each_process_is_told_its_place_and_where_to_meet() -> None:
    environments = commands(None, accelerated=False)
    assert [e["RANK"] for e in environments] == ["0", "1", "2"]
    assert {e["WORLD_SIZE"] for e in environments} == {"3"}
    assert {e["UNDERSTUDY_RENDEZVOUS"] for e in environments} == {"file:///x/meet"}


def test_cores_are_shared_out_unless_the_user_chose_threads() -> None:
    assert {e["OMP_NUM_THREADS"] for e in commands(None, accelerated=False)} == {"2"}
    assert all("OMP_NUM_THREADS" not in e for e in commands(5, accelerated=False))


def test_gloo_is_kept_on_loopback_only_without_accelerators() -> None:
    assert {e["GLOO_SOCKET_IFNAME"] for e in commands(None, accelerated=False)} == {"lo"}
    assert all("GLOO_SOCKET_IFNAME" not in e for e in commands(None, accelerated=True))


def test_output_goes_to_logs_and_rank_0_reaches_the_console(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
print("out", rank); print("err", rank, file=sys.stderr)
if rank == 0: os.write(int(os.environ["UNDERSTUDY_CONSOLE"]), b"hello user\\n")
else: assert "UNDERSTUDY_CONSOLE" not in os.environ
"""
    directory = launch(tmp_path, body)
    assert directory.log(1).read_text() == "out 1\nerr 1\n"
    captured = capfd.readouterr()
    assert captured.out == "hello user\n"
    assert captured.err == ""


def test_a_failing_rank_stops_the_others_and_gives_its_cause_and_status(tmp_path: Path) -> None:
    body = "fail('the loss is not finite', 3) if rank == 1 else time.sleep(60)"
    with pytest.raises(
        FailedRunError, match=r"the loss is not finite \(rank 1 on a, after step 7; traceback in .*rank-1.log"
    ) as e:
        launch(tmp_path, body)
    assert e.value.exit_status == 3


def test_wrong_input_found_by_a_rank_is_given_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(FailedRunError) as caught:
        launch(tmp_path, "fail('recipe.yaml:3: no', 2, step=None)")
    assert (str(caught.value), caught.value.exit_status) == ("recipe.yaml:3: no", 2)


def test_what_becomes_wrong_while_a_rank_trains_names_it(tmp_path: Path) -> None:
    with pytest.raises(FailedRunError) as caught:
        launch(tmp_path, "fail('/runs: no space is left', 2) if rank == 1 else time.sleep(60)")
    assert str(caught.value) == "/runs: no space is left (rank 1 on a, after step 7)."
    assert (caught.value.exit_status, caught.value.refused) == (2, False)


def test_a_rank_that_ends_with_status_0_while_it_trains_is_lost(tmp_path: Path) -> None:
    body = """
from understudy.launch.pulses import TRAINING, Pulse, write_pulse
write_pulse(directory / f"logs/rank-{rank}.pulse.json", Pulse(rank, "a", os.getpid(), 1, TRAINING, 7, 8, ()))
"""
    with pytest.raises(LostProcessError, match=r"rank 0 on \S+ ended with status 0 after step 7 without saying why"):
        launch(tmp_path, body, processes=1)


def test_where_all_that_ranks_saw_is_a_failed_collective_a_connection_was_lost(tmp_path: Path) -> None:
    with pytest.raises(FailedRunError, match="a connection between ranks was lost, and none of them failed") as caught:
        launch(tmp_path, "fail('Connection closed by peer', 5, peer_failed=True)")
    assert caught.value.exit_status == 5


def test_a_cause_that_was_cut_short_tells_nothing(tmp_path: Path) -> None:
    body = """
if rank == 1: (directory / "logs/rank-1.cause.json").write_text('{"rank": 1, "ho'); sys.exit(1)
time.sleep(60)
"""
    with pytest.raises(LostProcessError, match=r"rank 1 on \S+ ended with status 1 without saying why"):
        launch(tmp_path, body)


def test_a_killed_rank_outranks_the_peer_that_saw_its_connection_close(tmp_path: Path) -> None:
    body = """
if rank == 1: os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.1)
fail("Connection closed by peer", 1, peer_failed=True)
"""
    with pytest.raises(LostProcessError, match=r"rank 1 on \S+ was killed by SIGKILL") as caught:
        launch(tmp_path, body)
    assert caught.value.exit_status == 5


def test_a_rank_that_exits_without_a_word_is_lost(tmp_path: Path) -> None:
    with pytest.raises(LostProcessError, match=r"rank 1 on \S+ ended with status 9 without saying why"):
        launch(tmp_path, "sys.exit(9) if rank == 1 else time.sleep(60)")


def test_the_earliest_cause_wins_over_aborts_that_follow_it() -> None:
    cause = Cause(0, "a", 10.0, 1, "ValueError: boom", None, "", peer_failed=False)
    logs = {0: Path("a"), 1: Path("b")}
    error = first_failure([Exit(1, "a", -signal.SIGABRT, 10.2), Exit(0, "a", 1, 10.4)], {0: cause}, logs)
    assert str(error).startswith("ValueError: boom (rank 0 on a, before training")


@pytest.mark.parametrize(
    ("step", "saved", "said"),
    [(48, 40, "after step 60"), (48, 100, "after step 100"), (None, 100, "while loading the model")],
)
def test_a_killed_rank_is_named_with_the_newest_step_that_is_known(
    step: int | None, saved: int, said: str, tmp_path: Path
) -> None:
    """Its pulse is up to a second old, in which fast steps go on, and are saved. One that loads has done none."""
    committed = tmp_path / "checkpoints" / f"step-{saved:08}"
    committed.mkdir(parents=True)
    (committed / "COMMITTED").touch()
    body = f"""
from understudy.launch.pulses import LOADING, TRAINING, Pulse, write_pulse
def pulse(rank): return directory / f"logs/rank-{{rank}}.pulse.json"
step = (60, {step})[rank]
write_pulse(pulse(rank), Pulse(rank, "a", os.getpid(), 1, TRAINING if step else LOADING, step, 8, ()))
while rank == 0 or not pulse(0).exists(): time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with pytest.raises(LostProcessError, match=rf"rank 1 on \S+ was killed by SIGKILL {said} "):
        launch(tmp_path, body)


@pytest.mark.parametrize(("step", "refused"), [(None, True), (3, False)])
def test_wrong_input_found_before_training_leaves_nothing_to_keep(step: int | None, refused: bool) -> None:
    cause = Cause(0, "a", 10.0, 2, "recipe.yaml:3: no", step, "", peer_failed=False)
    error = first_failure([Exit(0, "a", 2, 10.1)], {0: cause}, {0: Path("a")})
    assert isinstance(error, FailedRunError)
    assert error.refused is refused


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def gone_soon(processes: list[int]) -> bool:
    deadline = time.monotonic() + 5
    while any(map(alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, processes))


LAUNCHER = """
import sys
from pathlib import Path
from understudy.launch.local import launch_local
from understudy.launch.run_directory import RunDirectory
try:
    launch_local(tuple(sys.argv[2:]), 2, RunDirectory(Path(sys.argv[1])), 4, accelerated=False)
except Exception as problem:
    sys.stderr.write(str(problem)); sys.exit(getattr(problem, "exit_status", 99))
"""
WAITING = """
import subprocess
from understudy.launch.parent import die_with_parent
die_with_parent(int(os.environ["UNDERSTUDY_LAUNCHER"]))
signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
(directory / f"pid-{rank}.part").write_text(str(os.getpid()))
(directory / f"pid-{rank}.part").rename(directory / f"pid-{rank}")
time.sleep(60)  # goes on after a signal that is handled
"""


def started_launcher(tmp_path: Path, body: str = "") -> tuple[subprocess.Popen[bytes], list[int]]:
    """A launcher of two processes that do `body` and then wait for ever, and these processes."""
    arguments, _ = worker(tmp_path, body + WAITING)
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(tmp_path), *arguments], stderr=subprocess.PIPE)
    files = [tmp_path / f"pid-{rank}" for rank in range(2)]
    while not all(file.exists() for file in files):
        assert launcher.poll() is None
        time.sleep(0.05)
    return launcher, [int(file.read_text()) for file in files]


SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
COMMITTING = """
def stop(number, frame):
    (directory / f"asked-{rank}").touch()
    time.sleep(0.5 * rank)
    (directory / f"committed-{rank}").touch()
    fail(f"stopped by {signal.Signals(number).name} after step 7", 75)
for each in SIGNALS:
    signal.signal(each, stop)
"""
DEAF = "[signal.signal(each, lambda *_: (directory / f'asked-{rank}').touch()) for each in SIGNALS]\n"


def wait_for(*files: Path) -> None:
    deadline = time.monotonic() + 15
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ended(launcher: subprocess.Popen[bytes]) -> tuple[int, str]:
    with launcher:
        _, errors = launcher.communicate(timeout=15)
    return launcher.returncode, errors.decode()


@SIGNALS
def test_a_request_to_stop_is_passed_on_and_waited_for(tmp_path: Path, number: signal.Signals) -> None:
    launcher, workers = started_launcher(tmp_path, COMMITTING)
    launcher.send_signal(number)
    assert ended(launcher) == (75, f"stopped by {number.name} after step 7")
    assert all((tmp_path / f"committed-{rank}").exists() for rank in range(2))
    assert gone_soon(workers)


def test_a_request_to_stop_reaches_no_child_of_a_worker(tmp_path: Path) -> None:
    body = """
signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # or the child would inherit it
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
def stop(number, frame):
    time.sleep(0.3)
    fail("stopped" if child.poll() is None else "its child was stopped first", 75)
for each in SIGNALS:
    signal.signal(each, stop)
"""
    launcher, workers = started_launcher(tmp_path, "import subprocess" + body)
    launcher.send_signal(signal.SIGINT)
    assert ended(launcher) == (75, "stopped")
    assert gone_soon(workers)


def test_a_request_to_stop_a_run_that_is_just_ending_is_no_error(tmp_path: Path) -> None:
    launcher, _ = started_launcher(tmp_path, "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n")
    launcher.send_signal(signal.SIGTERM)
    assert ended(launcher) == (0, "")


def test_the_second_signal_kills_everything_with_status_1(tmp_path: Path) -> None:
    launcher, workers = started_launcher(tmp_path, DEAF)
    launcher.send_signal(signal.SIGINT)
    wait_for(*(tmp_path / f"asked-{rank}" for rank in range(2)))
    time.sleep(0.5)
    assert launcher.poll() is None, "it waits without limit"
    launcher.send_signal(signal.SIGINT)
    assert ended(launcher) == (1, "stopped by SIGINT, SIGINT before a checkpoint was committed.")
    assert gone_soon(workers)


def test_a_request_waits_for_a_process_that_cannot_note_it_yet(tmp_path: Path) -> None:
    body = "(directory / f'starting-{rank}').touch(); time.sleep(1)\n" + COMMITTING
    arguments, _ = worker(tmp_path, body + WAITING)
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(tmp_path), *arguments], stderr=subprocess.PIPE)
    wait_for(*(tmp_path / f"starting-{rank}" for rank in range(2)))
    launcher.send_signal(signal.SIGTERM)
    assert ended(launcher) == (75, "stopped by SIGTERM after step 7")


def test_a_request_that_ends_a_process_before_training_stops_the_run(tmp_path: Path) -> None:
    """Rank 0 would wait for rank 1 for ever: it obeys when it can, and rank 1 at once."""
    launcher, workers = started_launcher(tmp_path, "if rank == 0: " + DEAF)
    launcher.send_signal(signal.SIGTERM)
    assert ended(launcher) == (75, "stopped by SIGTERM before training began; run again to train.")
    assert gone_soon(workers)


@pytest.mark.parametrize(
    ("checkpoint", "end"),
    [
        (False, (1, "stopped by SIGTERM before a checkpoint was committed.")),
        (True, (75, "stopped by SIGTERM; run again to go on from the last checkpoint.")),
    ],
)
def test_training_that_a_request_cut_off_can_go_on_only_from_a_checkpoint(
    tmp_path: Path, checkpoint: bool, end: tuple[int, str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    if checkpoint:
        (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
        (tmp_path / "checkpoints" / "step-00000003" / "COMMITTED").touch()
    launcher, _ = started_launcher(tmp_path)
    launcher.send_signal(signal.SIGTERM)
    assert ended(launcher) == end


def test_a_failure_while_stopping_is_the_failure(tmp_path: Path) -> None:
    body = """
def stop(number, frame):
    if rank == 0: fail("stopped", 75)
    time.sleep(0.3)
    fail("no space is left", 2)
for each in SIGNALS:
    signal.signal(each, stop)
"""
    launcher, _ = started_launcher(tmp_path, body)
    launcher.send_signal(signal.SIGUSR1)
    assert ended(launcher) == (2, "no space is left (rank 1 on a, after step 7).")


def test_processes_that_stop_without_our_asking_stopped_on_request(tmp_path: Path) -> None:
    with pytest.raises(StoppedError) as caught:
        launch(tmp_path, "time.sleep(0.8 * (1 - rank)); fail(f'stopped, said rank {rank}', 75)")
    assert (str(caught.value), caught.value.begun) == ("stopped, said rank 0", True)


def test_a_process_that_stops_before_training_takes_the_others_along(tmp_path: Path) -> None:
    body = """
if rank == 0: time.sleep(60)
write_cause(directory / "logs/rank-1.cause.json", Cause(1, "a", time.time(), 75, "stopped early", None, "", False))
sys.exit(75)
"""
    began = time.monotonic()
    with pytest.raises(StoppedError, match="stopped early") as caught:
        launch(tmp_path, body)
    assert time.monotonic() - began < 30, "it waited for rank 0 to end"
    assert not caught.value.begun


def test_a_failing_rank_ends_the_others_at_once_even_if_they_would_finish_a_step_first(tmp_path: Path) -> None:
    waiting = WAITING.replace("time.sleep(60) ", "if rank == 0: time.sleep(60) ")
    began = time.monotonic()
    with pytest.raises(FailedRunError, match="the loss is not finite"):
        launch(tmp_path, DEAF + waiting + "fail('the loss is not finite', 3)")
    assert gone_soon([int((tmp_path / "pid-0").read_text())])
    assert time.monotonic() - began < 30, "it waited for rank 0 to end"
    assert not (tmp_path / "asked-0").exists()


def test_what_an_earlier_run_left_is_not_taken_for_this_ones_cause(tmp_path: Path) -> None:
    with pytest.raises(FailedRunError, match="first"):
        launch(tmp_path, "fail('first', 3)")
    with pytest.raises(LostProcessError):
        launch(tmp_path, "sys.exit(9)")


@SIGNALS
def test_a_request_before_the_first_process_is_started_starts_none(tmp_path: Path, number: signal.Signals) -> None:
    with noted_signals():
        os.kill(os.getpid(), number)
        with pytest.raises(StoppedError, match=f"stopped by {number.name} before training began; run again to train"):
            launch(tmp_path, "")
    assert list((tmp_path / "logs").iterdir()) == []


def test_workers_die_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    launcher, workers = started_launcher(tmp_path)
    with launcher:
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait()
    assert gone_soon(workers)


def test_children_of_a_worker_are_stopped_with_it(tmp_path: Path) -> None:
    body = """
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
(directory / f"child-{rank}").write_text(str(child.pid))
time.sleep(1)
fail('no', 1)
"""
    with pytest.raises(FailedRunError):
        launch(tmp_path, body)
    assert gone_soon([int((tmp_path / f"child-{rank}").read_text()) for rank in range(2)])
