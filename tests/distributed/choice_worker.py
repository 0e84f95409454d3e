"""One rank of test_choice_of_rank_0.py: what it trains with after it has met the others."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap
from understudy.training.job import Job
from understudy.training.worker import _as_on_rank_0

if __name__ == "__main__":
    rank, out = int(os.environ["RANK"]), Path(sys.argv[1])
    sections, predicted = json.loads(sys.argv[2])["choices"][rank]
    named = {"name": "r", "output_dir": "o", "model": {"path": "m"}, "data": {"train": [{"path": "a"}]}}
    nowhere = Path("nowhere")
    job = Job(
        Recipe.model_validate({**named, **sections}),
        SourceMap(),
        nowhere,
        nowhere,
        None,
        nowhere,
        (),
        nowhere,
        None,
        memory_predicted_bytes=predicted,
    )
    dist.init_process_group("gloo", init_method=os.environ["UNDERSTUDY_RENDEZVOUS"], rank=rank, world_size=2)
    agreed = _as_on_rank_0(job)
    recipe = agreed.recipe.model_dump(mode="json")
    out.write_text(json.dumps({"recipe": recipe, "predicted": agreed.memory_predicted_bytes}))
    dist.barrier()
    dist.destroy_process_group()
