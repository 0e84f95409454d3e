"""One rank of test_optimizers.py: steps each optimizer over FSDP2 parameters and over plain copies of them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from understudy.optim.optimizers.registry import make_optimizer
from understudy.recipe.schema import Optimizer

STEPS = 4
# 63 rows do not divide by 2, nor a shard of `ragged` by any block size; rank 1 holds nothing of the one-element bias.
SHAPES = {
    "model.embed_tokens.weight": (40, 64),
    "model.layers.0.up.weight": (256, 64),
    "model.layers.0.down.weight": (63, 256),
    "model.layers.0.ragged.weight": (75, 77),
    "model.layers.0.norm.weight": (63,),
    "model.layers.0.gate.bias": (1,),
}


class Holder(nn.Module):
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(t) for name, t in tensors.items()})

    def named(self) -> list[tuple[str, nn.Parameter]]:
        return [(name.replace("/", "."), parameter) for name, parameter in self.tensors.items()]


def compare(kind: str, dtype: torch.dtype, fused: bool) -> dict[str, float]:
    """Largest difference between sharded and plain weights, relative to how far the plain ones moved, by parameter."""
    chance = torch.Generator().manual_seed(0)
    start = {name: torch.randn(shape, generator=chance).to(dtype) for name, shape in SHAPES.items()}
    plain = Holder({name: tensor.clone() for name, tensor in start.items()})
    sharded = Holder({name: tensor.clone() for name, tensor in start.items()})
    fully_shard(sharded)
    recipe = Optimizer(kind=kind, learning_rate=1e-2, weight_decay=0.1, momentum=0.9)
    optimizers = [make_optimizer(recipe, module.named(), fused=fused) for module in (plain, sharded)]
    for step in range(STEPS):
        for (name, one), (_, many) in zip(plain.named(), sharded.named()):
            grad = torch.randn(SHAPES[name], generator=chance).to(dtype)
            one.grad = grad.clone()
            many.grad = distribute_tensor(grad, many.device_mesh, many.placements)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            optimizer.step()
            optimizer.zero_grad()
    differences = {}
    for (name, one), (_, many) in zip(plain.named(), sharded.named()):
        assert isinstance(many, DTensor)
        moved = (one - start[name]).double().norm().item()
        differences[name] = (many.full_tensor() - one).double().norm().item() / moved
    return differences


def main(out: str, arguments: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=os.environ["UNDERSTUDY_RENDEZVOUS"],
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    found = {
        case: compare(kind, getattr(torch, dtype), fused)
        for case, (kind, dtype, fused) in json.loads(arguments)["cases"].items()
    }
    Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
