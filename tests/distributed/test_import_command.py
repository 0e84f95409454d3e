"""A DeepSpeed checkpoint is imported once, and training goes on from it under another strategy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.distributed import small_run
from tests.distributed.processes import run_processes
from understudy.checkpoint.loading import open_optimizer_state
from understudy.checkpoint.store import verify_checkpoint
from understudy.models.weights import WeightReader

WORKER = Path(__file__).with_name("deepspeed_directory_worker.py")
STEPS = 3


@pytest.mark.distributed
def test_weights_and_moments_are_deepspeeds_and_training_goes_on_under_fsdp(tmp_path: Path) -> None:
    recipe = small_run.small_recipe(tmp_path)
    model = tmp_path / "model"
    sizes = {key: value for key, value in recipe["model"]["config"].items() if key != "model_type"}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(model)
    case = {
        "model": str(model),
        "zero": {"stage": 2},
        "bf16": False,
        "frozen": [],
        "optimizer": "adamw",
        "moments": ["exp_avg", "exp_avg_sq"],
    }
    run_processes(WORKER, 2, tmp_path / "deepspeed", {"cases": {"saved": case}})
    saved, imported = tmp_path / "deepspeed" / "saved", tmp_path / "imported"
    recipe["model"] = {"path": str(model), "tokenizer": recipe["model"]["tokenizer"]}
    recipe["training"]["max_steps"] = STEPS + 4
    recipe["strategy"] = "fsdp"
    file = small_run.write(recipe, tmp_path)

    done = small_run.understudy(["import", str(saved), str(file), "-o", str(imported)], tmp_path)

    assert done.returncode == 0, done.stderr
    checkpoint = imported / f"step-{STEPS:08}"
    assert verify_checkpoint(checkpoint).step == STEPS
    true, weights = load_file(saved / "true.safetensors"), WeightReader(checkpoint / "model")
    moments = open_optimizer_state(checkpoint)
    for name in weights.names():
        assert torch.equal(weights(name)[()], true[name])
        assert torch.equal(moments[name]["exp_avg"][()], true[f"{name}.exp_avg"])
        assert torch.equal(moments[name]["exp_avg_sq"][()], true[f"{name}.exp_avg_sq"])
        assert moments[name]["step"][()] == STEPS

    done = small_run.understudy(["train", str(file), f"checkpoint.resume={imported}"], tmp_path)

    assert done.returncode == 0, done.stderr
    assert "was imported: training goes on with the examples of step 4" in done.stdout
    steps = [row["step"] for row in small_run.rows(tmp_path) if "loss" in row]
    assert steps == [4, 5, 6, 7]

    done = small_run.understudy(["import", str(saved), str(file), "-o", str(imported)], tmp_path)
    assert done.returncode == 2
    assert "nothing is overwritten" in done.stderr
    assert json.loads((checkpoint / "state.json").read_text())["written_by"]["imported_from"].endswith("global_step3")
