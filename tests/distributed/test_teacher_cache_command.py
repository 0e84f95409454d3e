"""`understudy teacher cache`, and training from what it keeps: the same as from the teacher itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.distributed.small_run import (
    TEMPLATE,
    conversation,
    read_rows,
    small_recipe,
    understudy,
    write,
    write_tokenizer,
)
from tests.tiny_data import write_lines

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


def trained(tmp_path: Path, recipe: dict[str, Any], name: str) -> list[dict[str, Any]]:
    file = write({**recipe, "output_dir": str(tmp_path / name)}, tmp_path)
    done = understudy(["train", str(file)], tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [row for row in read_rows(tmp_path / name) if "loss" in row]
    for row in rows:
        parts = 0.75 * row["divergence"] + 0.25 * row["cross_entropy"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
    return rows


def refusal(tmp_path: Path, recipe: dict[str, Any]) -> str:
    done = understudy(["train", str(write(recipe, tmp_path))], tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    return done.stderr


def test_a_cache_teaches_as_its_teacher_does_alone_and_beside_it(tmp_path: Path, recipe: dict[str, Any]) -> None:
    resident = trained(tmp_path, distilled(recipe, tmp_path, kind="resident"), "resident")
    expected = [row["loss"] for row in resident]
    for targets, tolerance in (("hidden", 1e-5), ("top_k", 1e-3)):
        cached = distilled(recipe, tmp_path, kind="cache", targets=targets)
        if targets == "hidden":
            cached = with_several(cached, tmp_path)
        assert "understudy teacher cache" in refusal(tmp_path, cached)
        file = str(write(cached, tmp_path))
        built = understudy(["teacher", "cache", file], tmp_path)
        assert built.returncode == 0, built.stderr
        assert "bytes a token" in built.stdout
        assert ("the student's divergence as training begins" in built.stdout) == (targets == "top_k")
        rows = trained(tmp_path, {**cached, "strategy": "zero2"}, targets)
        assert [row["loss"] for row in rows] == pytest.approx(expected, rel=tolerance)
    again = understudy(["teacher", "cache", file], tmp_path)
    assert "nothing to do" in again.stdout
    refuses_what_the_cache_is_not_of(cached, tmp_path)


def refuses_what_the_cache_is_not_of(cached: dict[str, Any], tmp_path: Path) -> None:
    """`cached` is a recipe whose cache was built."""
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "teacher", other)
    weights = load_file(other / "model.safetensors")
    save_file({**weights, "lm_head.weight": -weights["lm_head.weight"]}, other / "model.safetensors", {"format": "pt"})
    template = TEMPLATE.replace("<user>", "<assistant>").replace("<{{", "<user> <{{")
    objective = cached["objective"]
    for changed in (
        {**cached, "objective": {**objective, "teacher": {**objective["teacher"], "path": str(other)}}},
        {**cached, "data": {**cached["data"], "chat_template": template}},
        {**cached, "objective": {**objective, "temperature": 2.0}},
    ):
        said = refusal(tmp_path, changed)
        assert "recipe.yaml:" in said
        assert "there is no cache yet of this teacher for this tokenizer, chat template, temperature and" in said
        assert "`understudy teacher cache" in said
    longer = {"messages": [*conversation(1)["messages"], *conversation(2)["messages"]]}
    write_lines(tmp_path / "more.jsonl", [conversation(0), longer])
    more = {**cached, "data": {**cached["data"], "train": [{"path": str(tmp_path / "more.jsonl")}]}}
    assert "the teacher's cache lacks 1 of" in refusal(tmp_path, more)


def test_tokens_drawn_from_the_teacher_teach_as_it_does_on_average(tmp_path: Path, recipe: dict[str, Any]) -> None:
    """With so many draws that the average is near, and steps of SGD, which are as near as gradients are."""
    recipe["optimizer"] = {"kind": "sgd", "learning_rate": 0.2}
    cached = distilled(recipe, tmp_path, kind="cache", targets="samples", k=20_000)
    built = understudy(["teacher", "cache", str(write(cached, tmp_path))], tmp_path)
    assert built.returncode == 0, built.stderr
    drawn = trained(tmp_path, cached, "samples")
    resident = trained(tmp_path, distilled(recipe, tmp_path, kind="resident"), "resident")
    for name in ("grad_norm", "cross_entropy"):
        seen, expected = ([row[name] for row in rows] for rows in (drawn, resident))
        assert seen == pytest.approx(expected, rel=0.02)


def test_a_teacher_that_reads_otherwise_is_refused(tmp_path: Path, recipe: dict[str, Any]) -> None:
    file = tmp_path / "teacher" / "tokenizer.json"
    file.write_text(file.read_text().replace('"seven"', '"eleven"'))
    refused = understudy(["train", str(write(distilled(recipe, tmp_path, kind="resident"), tmp_path))], tmp_path)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
    assert (
        "has another tokenizer than the student: token 12 is 'eleven' to it and 'seven' to the student"
        in refused.stderr
    )
