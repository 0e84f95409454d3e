"""A student that learns from its own answers says and learns the same under every strategy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForCausalLM

from tests.distributed.forked import forked_workers
from tests.distributed.small_run import WORDS, small_recipe, write_tokenizer
from tests.tiny_data import write_lines
from understudy.cli.parity import command

pytestmark = pytest.mark.distributed


def conversation(i: int) -> dict[str, Any]:
    """There is room for twenty tokens behind one prompt, and for five behind the next."""
    asked = WORDS[i % 8 :] + WORDS[: i % 8]
    content = " ".join(asked * 2) if i % 2 else asked[0]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": WORDS[(i + 1) % 8]}]}


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    recipe = small_recipe(tmp_path)
    write_lines(tmp_path / "data.jsonl", [conversation(i) for i in range(32)])
    recipe["data"]["max_length"] = recipe["training"]["micro_batch_tokens"] = 24
    recipe["training"]["global_batch_size"] = 7
    sizes = recipe["model"]["config"] | {"hidden_size": 48, "initializer_range": 0.3}
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes))
    network.save_pretrained(tmp_path / "teacher")
    write_tokenizer(tmp_path / "teacher")
    recipe["objective"] = {
        "kind": "distillation",
        "teacher": {"kind": "sharded", "path": str(tmp_path / "teacher")},
        "divergence": "jsd",
        "on_policy_fraction": 0.5,
        "on_policy": {"max_new_tokens": 20, "temperature": 0.9, "top_p": 0.95},
    }
    return recipe


def test_answers_and_losses_are_those_of_one_process(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses of steps with own answers depend on each token that was drawn. Each batch is one text, so that one
    rank has often said what it has to say while another goes on, and one has a batch more."""
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    arguments = [str(file), "--strategies", "fsdp,zero3", "--processes", "2", "--steps", "4", "--json"]
    with forked_workers():
        result = CliRunner().invoke(command, arguments, standalone_mode=False)
    assert result.exception is None, result.output
    seen = json.loads(result.stdout)["strategies"]
    assert [row["strategy"] for row in seen] == ["fsdp", "zero3"]
    assert all(row["within_tolerance"] for row in seen), seen
