"""A pulse in its file, and the stacks beside it."""

from __future__ import annotations

import signal
from pathlib import Path

from understudy.launch.pulses import TRAINING, Collective, Pulse, read_pulse, write_pulse
from understudy.launch.run_directory import RunDirectory
from understudy.training.headway import Headway
from understudy.training.pulse import beating


def test_a_pulse_reads_back_as_written(tmp_path: Path) -> None:
    pulse = Pulse(
        1,
        "a",
        77,
        5,
        TRAINING,
        7,
        8,
        (Collective("gloo:0", 3, "all_reduce", ((4,), (2, 3)), True),),
        1.5,
        0.25,
        {"gloo:0": ((3, 1500000),)},
    )
    assert read_pulse(tmp_path / "none") is None
    write_pulse(tmp_path / "one", pulse)
    assert read_pulse(tmp_path / "one") == pulse


def test_stacks_that_were_asked_for_outlast_the_next_start(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.logs.mkdir()
    stacks = directory.stacks(0)
    for _ in range(2):
        with beating(directory, 0, 1, Headway()):
            signal.raise_signal(signal.SIGUSR2)
    assert stacks.read_text().count("Current thread") == 2
    with beating(directory, 1, 2, Headway()):
        pass
    assert not directory.stacks(1).exists()
