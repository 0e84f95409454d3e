"""Requests to stop: noted, never lost, and obeyed where nothing is left half done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.tiny_data import write_lines, write_tokenizer
from understudy.errors import StoppedError, UserError
from understudy.launch import signals
from understudy.launch.run_claim import claim_run_directory
from understudy.launch.signals import StopRequests, check_stop_requests, noted_signals
from understudy.recipe.source_map import SourceMap

pytestmark = pytest.mark.distributed

EACH = pytest.mark.parametrize("number", signals.SIGNALS)


def ask(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@EACH
def test_a_request_is_noted_and_does_nothing_else(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with noted_signals() as requests:
        ask(number)
        assert requests.received == [number]
    assert signal.getsignal(number) is before


def test_a_request_is_not_lost_on_the_way_to_who_looks_at_it() -> None:
    with noted_signals():
        ask()
        with noted_signals() as inner:
            assert inner.received == [signal.SIGTERM]
        with pytest.raises(StoppedError):
            check_stop_requests()
    check_stop_requests()


def test_one_request_that_arrives_twice_at_once_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `timeout` and job schedulers send it: to the process, then to its group."""
    monkeypatch.setattr(signals, "SAME_REQUEST_SECONDS", 60.0)
    with noted_signals() as requests:
        ask()
        ask()
        assert requests.received == [signal.SIGTERM]
        ask(signal.SIGINT)
        assert requests.received == [signal.SIGTERM, signal.SIGINT]


def test_a_later_request_counts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "SAME_REQUEST_SECONDS", 0.0)
    with noted_signals() as requests:
        ask()
        ask()
    assert len(requests.received) == 2


def wait_while_asked(requests: StopRequests) -> None:
    with requests.interruptible():
        ask()
        time.sleep(60)


def hide_it_while_asked(requests: StopRequests) -> None:
    with requests.interruptible(), suppress(BaseException):
        ask()


def fail_while_asked(requests: StopRequests) -> None:
    """As when a Ctrl-C has ended the processes that one waits for."""
    with requests.interruptible():
        try:
            ask()
        finally:
            raise UserError("a process was lost")


def be_asked_before(requests: StopRequests) -> None:
    ask()
    with requests.interruptible():
        pytest.fail("it should not have begun")


@pytest.mark.parametrize("work", [wait_while_asked, hide_it_while_asked, fail_while_asked, be_asked_before])
def test_long_work_is_interrupted_by_a_request(work: object) -> None:
    assert callable(work)
    with noted_signals() as requests:
        with pytest.raises(StoppedError, match="stopped by SIGTERM before training began; run again") as caught:
            work(requests)
        assert not caught.value.begun
        ask(signal.SIGINT)  # whoever clears up after it is left alone


def test_what_fails_before_any_request_is_told_as_it_is() -> None:
    def fail() -> None:
        with noted_signals() as requests, requests.interruptible():
            raise UserError("bad data")

    with pytest.raises(UserError, match="bad data"):
        fail()


# The command

RECIPE = """\
output_dir: out/run
model: {init: random, tokenizer: model, config: {model_type: llama, vocab_size: 320, hidden_size: 16,
  intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}}
data: {train: [{path: rows.jsonl}], num_workers: 2}
training: {max_steps: 2, global_batch_size: 4}
"""


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


UNDER_A_LAUNCHER = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


@contextmanager
def training(
    directory: Path, *arguments: str, rows: int = 100, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[str]]:
    """`understudy train`, leading a process group as in a terminal."""
    (directory / "r.yaml").write_text(RECIPE)
    write_tokenizer(directory / "model")
    write_lines(directory / "rows.jsonl", [{"instruction": f"number {i}", "output": "fine"} for i in range(rows)])
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "understudy", "train", "r.yaml", *arguments],
        cwd=directory,
        env={**os.environ, "UNDERSTUDY_CACHE": str(directory / "cache"), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as command:
        yield command


def stop_once_it_owns_its_directory(command: subprocess.Popen[str], directory: Path, number: signal.Signals) -> str:
    marker = directory / "out/run/.understudy-run.json"
    while not (marker.exists() and f'"process": {command.pid},' in marker.read_text()):
        assert command.poll() is None, command.communicate()
        time.sleep(0.02)
    os.killpg(command.pid, number)
    return command.communicate(timeout=60)[1]


@pytest.mark.parametrize(
    ("number", "environment"),
    [(number, {}) for number in signals.SIGNALS] + [(signal.SIGTERM, UNDER_A_LAUNCHER)],
)
def test_a_request_while_preparing_is_one_sentence_status_75_and_leaves_nothing(
    tmp_path: Path, number: signal.Signals, environment: dict[str, str]
) -> None:
    with training(tmp_path, environment=environment) as command:
        errors = stop_once_it_owns_its_directory(command, tmp_path, number)
    assert errors == f"stopped by {number.name} before training began; run again to train.\n"
    assert command.returncode == 75
    assert not (tmp_path / "out").exists()


def test_an_interrupt_of_the_terminal_is_one_sentence_while_other_processes_tokenise(tmp_path: Path) -> None:
    with training(tmp_path, rows=100_000, environment={}) as command:
        assert command.stdout is not None
        assert "recognised the format" in command.stdout.readline()
        time.sleep(0.5)  # they are being started
        os.killpg(command.pid, signal.SIGINT)
        _, errors = command.communicate(timeout=60)
    assert errors == "stopped by SIGINT before training began; run again to train.\n"
    assert command.returncode == 75


def test_a_request_while_preparing_to_overwrite_a_run_leaves_that_run(tmp_path: Path) -> None:
    with claim_run_directory(tmp_path / "out/run", SourceMap(), overwrite=False) as claim:
        claim.begin("name: x\n").model.mkdir()
        (claim.directory.model / "weights").write_text("mine")
    before = files(tmp_path / "out")
    with training(tmp_path, "--overwrite", environment={}) as command:
        stop_once_it_owns_its_directory(command, tmp_path, signal.SIGTERM)
    assert command.returncode == 75
    assert files(tmp_path / "out") == before
