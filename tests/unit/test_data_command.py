"""`understudy data` shows, counts and prepares what training will see."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny_data import write_lines, write_tokenizer
from understudy.cli.main import exit_status

pytestmark = pytest.mark.unit


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 300}))
    write_lines(tmp_path / "rows.jsonl", [{"instruction": f"Say {n}.", "output": f"[{n}]"} for n in (1, 2, 2)])
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {path: model, init: random}\ndata: {train: [{path: rows.jsonl}], max_length: 99}\n")
    return str(path)


def test_show_marks_what_is_supervised(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["data", "show", recipe, "-n", "1"]) == 0
    out = capsys.readouterr().out
    assert "rows.jsonl, row 1" in out
    assert "Say 1.<|im_end|>\n<|im_start|>assistant\n⟦[1]<|im_end|>⟧" in out


def test_show_gives_tokens_as_json(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["data", "show", recipe, "--json"]) == 0
    examples = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [example["row"] for example in examples] == [1, 2, 3]
    first = examples[0]
    assert len(first["tokens"]) == len(first["texts"]) == len(first["supervised"])
    assert "".join(text for text, yes in zip(first["texts"], first["supervised"]) if yes) == "[1]<|im_end|>"


def test_show_of_evaluation_data_that_is_not_there_is_refused(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["data", "show", recipe, "--evaluation"]) == 2
    assert "no evaluation data" in capsys.readouterr().err


def test_stats_count_lengths_shares_and_duplicates(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["data", "stats", recipe, "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)["train"]
    assert (counted["rows"], counted["examples"], counted["duplicates"]) == (3, 3, 1)
    assert counted["supervised_share"] == counted["supervised_tokens"] / counted["tokens"]
    assert counted["sources"][0]["path"] == "rows.jsonl"
    assert exit_status(["data", "stats", recipe]) == 0
    assert "exact duplicates" in capsys.readouterr().out


def test_prepare_builds_the_cache_once(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["data", "prepare", recipe, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert Path(first["train"]["path"]).is_relative_to(tmp_path / "cache")
    assert exit_status(["data", "prepare", recipe, "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == first
    assert "recognised" not in said.err


def test_bad_data_ends_in_one_line(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "')
    assert exit_status(["data", "prepare", recipe]) == 2
    (last,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert last.startswith("error: rows.jsonl:2: the line is not valid JSON, or cut off")
