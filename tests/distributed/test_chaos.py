"""Killed three times, at random instants and inside saves, training ends as if it had been left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.chaos import INSIDE_SAVES, trial_runs

TRIALS = 3


@pytest.mark.distributed
def test_kills_lose_nothing_repeat_nothing_and_change_nothing(tmp_path: Path) -> None:
    tally = trial_runs(TRIALS, ["fsdp"], seed=3, root=tmp_path, say=False)
    assert tally.problems == []
    assert tally.trials == TRIALS
    assert tally.past_interval == 0
    assert tally.inside_saves >= INSIDE_SAVES * TRIALS
