"""`understudy parity`: the conformance suite in the user's hands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from understudy.cli.parity import command
from understudy.training.parity import TOLERANCES, Difference

pytestmark = pytest.mark.distributed

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"


def test_parity_prints_one_object_and_no_run_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    arguments = [
        str(RECIPE),
        "training.epochs=1",
        "--strategies",
        "ddp,zero2",
        "--processes",
        "2",
        "--steps",
        "2",
        "--json",
    ]
    result = CliRunner().invoke(command, arguments, standalone_mode=False)
    assert result.exception is None, result.output
    seen = json.loads(result.stdout)
    assert [row["strategy"] for row in seen["strategies"]] == ["ddp", "zero2"]
    assert all(row["within_tolerance"] for row in seen["strategies"])
    assert result.return_value == 0
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("field", ["loss", "norm", "weights"])
def test_a_difference_beyond_rounding_is_not_within_tolerance(field: str) -> None:
    tolerance = TOLERANCES["fp32"]
    figures = {"loss": tolerance.loss, "norm": tolerance.norm, "weights": tolerance.weights}
    assert Difference("fsdp", 2, **figures, largest_weight=0.0).within(tolerance)
    figures[field] *= 1.01
    assert not Difference("fsdp", 2, **figures, largest_weight=0.0).within(tolerance)
    figures[field] = float("nan")
    assert not Difference("fsdp", 2, **figures, largest_weight=0.0).within(tolerance)
