"""A pulse in its file."""

from __future__ import annotations

from pathlib import Path

from understudy.launch.pulses import TRAINING, Collective, Pulse, read_pulse, write_pulse


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
