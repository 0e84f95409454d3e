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
from tests.distributed.small_run import small_recipe, write_tokenizer
from understudy.cli.parity import command

pytestmark = pytest.mark.distributed


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    recipe = small_recipe(tmp_path)
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
        "on_policy": {"max_new_tokens": 8, "temperature": 0.9, "top_p": 0.95},
    }
    return recipe


def test_answers_and_losses_are_those_of_one_process(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses of steps with own answers depend on each token that was drawn."""
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
