"""`understudy compare`: what it takes of each run, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from understudy.cli.main import exit_status

pytestmark = pytest.mark.unit


def run(path: Path, *rows: dict[str, Any]) -> str:
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def trained(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "loss": loss, "tokens_per_second": 1000.0 * step, "memory_peak_bytes": 2**20}


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    plain = run(
        tmp_path / "plain",
        {"step": 0, "eval_loss": 6.0, "eval_perplexity": 403.4},
        trained(10, 3.0),
        {"step": 10, "eval_loss": 2.0, "eval_perplexity": 7.389, "eval_token_accuracy": 0.5},
    )
    taught = run(
        tmp_path / "taught",
        trained(10, 0.7),
        {"step": 10, "eval_loss": 0.5, "eval_cross_entropy": 1.5, "eval_perplexity": 4.4817, "eval_divergence": 0.25},
    )
    return [plain, taught]


def test_the_last_evaluation_of_each_stands_beside_the_others(
    runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(["compare", *runs]) == 0
    table = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    shown = {cells[0]: [cell.strip() for cell in cells[1:] if cell.strip()] for cells in table[1:]}
    assert shown == {
        "steps": ["10", "10"],
        "evaluation cross-entropy": ["2.0000", "1.5000"],
        "perplexity": ["7.389", "4.482"],
        "token accuracy": ["50.0%", "–"],
        "divergence from the teacher": ["–", "0.2500"],
        "last training loss": ["3.0000", "0.7000"],
        "tokens a second": ["10,000", "10,000"],
        "peak memory, bytes": ["1,048,576", "1,048,576"],
    }
    assert exit_status(["compare", *runs, "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)["runs"]
    assert [row["run"] for row in seen] == runs
    assert [row["eval_cross_entropy"] for row in seen] == [2.0, 1.5]


def test_a_row_that_is_being_written_is_not_yet_one(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with (Path(runs[0]) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    assert exit_status(["compare", runs[0]]) == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), ("", "has no row yet"), ("[1\n{}\n", "metrics.jsonl:1: is not a row")],
)
def test_what_is_no_run_is_refused(
    content: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert exit_status(["compare", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err
