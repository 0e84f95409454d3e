"""Wrong input that only shows once the processes of somebody else's launcher have met."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.tiny_data import write_lines, write_tokenizer
from understudy.models.initialization import materialize_random
from understudy.recipe.schema import Model

pytestmark = pytest.mark.distributed

SIZES = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
RECIPE = """\
output_dir: out/run
model:
  path: model
data: {train: [{path: rows.jsonl}], num_workers: 1}
training: {max_steps: 2, global_batch_size: 2}
strategy: ddp
"""


def test_torchrun_says_a_refusal_once_and_leaves_no_run_behind(tmp_path: Path) -> None:
    """Weights that are not numbers: no process can know before the model has run."""
    config = {"model_type": "llama", "num_attention_heads": 2, **SIZES}
    model = write_tokenizer(materialize_random(Model(init="random", config=config), 0, tmp_path / "made"))
    tensors = load_file(model / "model.safetensors")
    damaged = {name: tensor.fill_(float("nan")) for name, tensor in tensors.items()}
    save_file(damaged, model / "model.safetensors", {"format": "pt"})
    (tmp_path / "model").symlink_to(model)
    write_lines(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b"}] * 4)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    before = {path.name for path in tmp_path.iterdir()}

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "understudy", "train", "recipe.yaml"],
        cwd=tmp_path,
        env={**os.environ, "UNDERSTUDY_CACHE": str(tmp_path / "made"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, done.stderr
    assert said[0].startswith("error: recipe.yaml:3: this model's logits are not finite")
    assert {path.name for path in tmp_path.iterdir()} == before
