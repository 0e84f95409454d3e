"""`understudy teacher cache`, and training from what it keeps: the same as from the teacher itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.distributed.small_run import read_rows, small_recipe, understudy, write, write_tokenizer

pytestmark = pytest.mark.distributed


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    recipe = small_recipe(tmp_path)
    sizes = {name: value for name, value in recipe["model"]["config"].items() if name != "model_type"}
    torch.manual_seed(7)
    config = LlamaConfig(**{**sizes, "hidden_size": 48, "initializer_range": 0.3})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "teacher")
    write_tokenizer(tmp_path / "teacher")
    recipe["training"]["max_steps"] = 4
    recipe["evaluation"] = {}
    return recipe


def distilled(recipe: dict[str, Any], tmp_path: Path, **teacher: Any) -> dict[str, Any]:
    section = {"path": str(tmp_path / "teacher"), **teacher}
    return {**recipe, "objective": {"kind": "distillation", "teacher": section, "cross_entropy_weight": 0.25}}


def with_several(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The recipe, with its teacher's own model beside what it has."""
    resident = {"kind": "resident", "path": str(tmp_path / "teacher")}
    several = {"kind": "several", "teachers": [recipe["objective"]["teacher"], resident], "weights": [2.0, 1.0]}
    return {**recipe, "objective": {**recipe["objective"], "teacher": several}}


def losses(tmp_path: Path, recipe: dict[str, Any], name: str) -> list[float]:
    file = write({**recipe, "output_dir": str(tmp_path / name)}, tmp_path)
    done = understudy(["train", str(file)], tmp_path)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / name)
    for row in rows:
        if "loss" in row:
            parts = 0.75 * row["divergence"] + 0.25 * row["cross_entropy"]
            assert row["loss"] == pytest.approx(parts, rel=1e-5)
    return [row["loss"] for row in rows if "loss" in row]


def test_a_cache_teaches_as_its_teacher_does_alone_and_beside_it(tmp_path: Path, recipe: dict[str, Any]) -> None:
    expected = losses(tmp_path, distilled(recipe, tmp_path, kind="resident"), "resident")
    for targets, tolerance in (("hidden", 1e-5), ("top_k", 1e-3)):
        cached = distilled(recipe, tmp_path, kind="cache", targets=targets)
        if targets == "hidden":
            cached = with_several(cached, tmp_path)
        file = str(write(cached, tmp_path))
        refused = understudy(["train", file], tmp_path)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
        assert "understudy teacher cache" in refused.stderr
        built = understudy(["teacher", "cache", file], tmp_path)
        assert built.returncode == 0, built.stderr
        assert "bytes a token" in built.stdout
        assert ("the student's divergence as training begins" in built.stdout) == (targets == "top_k")
        assert losses(tmp_path, {**cached, "strategy": "zero2"}, targets) == pytest.approx(expected, rel=tolerance)
    again = understudy(["teacher", "cache", file], tmp_path)
    assert "nothing to do" in again.stdout


def test_a_teacher_that_reads_otherwise_is_refused(tmp_path: Path, recipe: dict[str, Any]) -> None:
    file = tmp_path / "teacher" / "tokenizer.json"
    file.write_text(file.read_text().replace('"seven"', '"eleven"'))
    refused = understudy(["train", str(write(distilled(recipe, tmp_path, kind="resident"), tmp_path))], tmp_path)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
    assert (
        "has another tokenizer than the student: token 12 is 'eleven' to it and 'seven' to the student"
        in refused.stderr
    )
