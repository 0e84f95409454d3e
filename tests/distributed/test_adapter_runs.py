"""`understudy train` with an adapter, from a pretrained base to a directory that is proved with peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.distributed.small_run import read_rows, small_recipe, understudy, write

pytestmark = pytest.mark.distributed

LORA = {"kind": "lora", "rank": 4}


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """Of two steps, on a base that is stored in bf16 as most are."""
    recipe = small_recipe(tmp_path)
    config = LlamaConfig(**{name: value for name, value in recipe["model"]["config"].items() if name != "model_type"})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    recipe["model"] = {"path": str(tmp_path / "base"), "tokenizer": str(tmp_path / "tokenizer")}
    recipe["training"] = {"max_steps": 2, "global_batch_size": 8, "precision": "fp32"}
    recipe["schedule"] = {"kind": "constant", "warmup_ratio": 0.0}
    recipe["evaluation"] = {}
    return recipe


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": LORA, "quantization": {"bits": 4}},
        {"adapter": LORA, "quantization": {"bits": 8}},
        {"adapter": {"kind": "vera", "rank": 8}, "precision": "bf16"},
        {"adapter": {"kind": "prompt_tuning", "tokens": 3}},
    ],
    ids=["nf4", "int8", "vera-bf16", "prompt"],
)
def test_what_is_saved_is_proved_with_peft(tmp_path: Path, recipe: dict[str, Any], changes: dict[str, Any]) -> None:
    recipe["training"]["precision"] = changes.pop("precision", "fp32")
    done = understudy(["train", str(write({**recipe, **changes}, tmp_path)), "cluster.processes=1"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "logits differ from the trained model's by at most" in done.stdout
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert len(peft.PeftModel.from_pretrained(base, str(tmp_path / "run" / "model")).peft_config) == 1


def test_an_adapter_goes_on_as_it_was_and_as_nothing_else(tmp_path: Path, recipe: dict[str, Any]) -> None:
    train = ["train", str(write({**recipe, "adapter": LORA}, tmp_path)), "cluster.processes=1"]
    whole = understudy([*train, f"output_dir={tmp_path / 'whole'}", "training.max_steps=4"], tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert understudy(train, tmp_path).returncode == 0
    goes_on = ["training.max_steps=4", f"checkpoint.resume={tmp_path / 'run'}", f"output_dir={tmp_path / 'further'}"]
    for other in ("adapter.alpha=64", "adapter=null"):
        refused = understudy([*train, *goes_on, other], tmp_path)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
        assert "does not fit this recipe" in refused.stderr
        assert not (tmp_path / "further").exists()
    further = understudy([*train, *goes_on, "strategy=fsdp"], tmp_path)
    assert further.returncode == 0, further.stderr
    losses = [row["loss"] for row in read_rows(tmp_path / "whole") if "loss" in row]
    assert [row["loss"] for row in read_rows(tmp_path / "further") if "loss" in row] == pytest.approx(
        losses[2:], rel=1e-5
    )
