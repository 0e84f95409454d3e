"""`understudy evaluate` after `understudy train`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.distributed.forked import run_command

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]


def understudy(arguments: list[str], cache: Path) -> str:
    done = run_command(arguments, {**os.environ, "UNDERSTUDY_CACHE": str(cache), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluate_reports_the_loss_that_training_reported(precision: str, tmp_path: Path) -> None:
    questions = [f"Say {n} and {n * 7 % 11}." for n in range(40)]
    rows = [{"instruction": question, "output": question[4:]} for question in questions]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"model_type": "llama", "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    recipe = {
        "output_dir": str(tmp_path / "run"),
        "model": {"init": "random", "tokenizer": str(ROOT / "recipes/quickstart/tokenizer"), "config": config},
        "data": {"train": [{"path": str(tmp_path / "rows.jsonl")}], "eval_fraction": 0.3, "max_length": 64},
        "training": {"max_steps": 3, "global_batch_size": 8, "precision": precision},
        "optimizer": {"learning_rate": 0.01},
        "cluster": {"processes": 2},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    understudy(["train", str(tmp_path / "recipe.json")], tmp_path / "cache")
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = next(row for row in reversed(logged) if "eval_loss" in row)
    scores = json.loads(
        understudy(["evaluate", str(tmp_path / "run"), str(tmp_path / "recipe.json"), "--json"], tmp_path / "cache")
    )
    assert scores["loss"] == pytest.approx(expected["eval_loss"], rel=1e-6 if precision == "fp32" else 1e-3)
    for name in ("token_accuracy", "calibration_error"):
        assert scores[name] == pytest.approx(expected[f"eval_{name}"], rel=1e-6 if precision == "fp32" else 1e-3)

    if precision == "fp32":  # a student of the model that was trained
        teacher = {"kind": "resident", "path": str(tmp_path / "run" / "model")}
        recipe["objective"] = {"kind": "distillation", "teacher": teacher, "cross_entropy_weight": 0.25}
        recipe |= {"output_dir": str(tmp_path / "student"), "training": {**recipe["training"], "seed": 7}}
        (tmp_path / "recipe.json").write_text(json.dumps(recipe))
        understudy(["train", str(tmp_path / "recipe.json")], tmp_path / "cache")
        logged = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()]
        expected = next(row for row in reversed(logged) if "eval_loss" in row)
        scores = json.loads(
            understudy(
                ["evaluate", str(tmp_path / "student"), str(tmp_path / "recipe.json"), "--json"], tmp_path / "cache"
            )
        )
        for name in ("loss", "cross_entropy", "divergence", "teacher_agreement", "calibration_error"):
            assert scores[name] == pytest.approx(expected[f"eval_{name}"], rel=1e-5), name
