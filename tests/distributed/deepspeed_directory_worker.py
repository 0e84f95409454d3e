"""One rank of test_deepspeed_directory.py: trains under DeepSpeed alone and has the engine save its own checkpoint.

Beside each checkpoint goes what the engine's public helpers say of the same moment: whole weights and moments, fp32.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from understudy.strategies.compiled_operators import build_operators
from understudy.strategies.zero_partitions import link_in_partition_order

STEPS = 3
OPTIMIZERS = {"adamw": torch.optim.AdamW, "cpu_adam": DeepSpeedCPUAdam, "sgd": partial(torch.optim.SGD, momentum=0.9)}


def train(case: dict[str, Any], directory: Path, rank: int) -> None:
    module: nn.Module = AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32).train()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(case["frozen"])))
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    groups = [
        {"params": [p for p in named.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": case["zero"],
        "bf16": {"enabled": case["bf16"]},
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
    }
    optimizer = OPTIMIZERS[case["optimizer"]](groups, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    chance = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        tokens = torch.randint(0, module.config.vocab_size, (2, 8), generator=chance)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.save_checkpoint(str(directory))
    if case["zero"].get("round_robin_gradients"):
        link_in_partition_order(engine.optimizer)
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        # DeepSpeed 0.14.4 to 0.19.8 links moments after the first group's first step, when later groups have none yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    true = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            true[name] = safe_get_full_fp32_param(parameter)
            for key in case["moments"]:
                true[f"{name}.{key}"] = safe_get_full_optimizer_state(parameter, key)
        else:
            with deepspeed.zero.GatheredParameters([parameter], enabled=case["zero"]["stage"] == 3):
                true[name] = parameter.detach().float().clone()
    if rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in true.items()}, directory / "true.safetensors")


def main(out: str, arguments: str) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    build_operators(deepspeed.accelerator.get_accelerator(), ["ShareMemCommBuilder", "CPUAdamBuilder"])
    torch.distributed.init_process_group(
        "gloo",
        init_method=os.environ["UNDERSTUDY_RENDEZVOUS"],
        rank=rank,
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    for name, case in json.loads(arguments)["cases"].items():
        train(case, Path(out).parent / name, rank)
    Path(out).write_text("{}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
