"""Small real checkpoints, written without processes: two ranks, one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from tests.distributed.small_run import write_tokenizer
from understudy.checkpoint.form import OPTIMIZER_STATE, WHOLE_MODEL, Form
from understudy.checkpoint.progress import Progress
from understudy.checkpoint.saving import CheckpointPlan, commit_checkpoint, write_part
from understudy.checkpoint.shards import Shards
from understudy.checkpoint.store import CheckpointStore
from understudy.contracts import TensorSpec

RANKS = 2


def make_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )


def make_weights(step: int) -> dict[str, Tensor]:
    """fp32, other ones for each step."""
    torch.manual_seed(step)
    return dict(AutoModelForCausalLM.from_config(make_config()).state_dict())


def make_progress(
    step: int,
    eval_loss: float | None = None,
    *,
    recipe: Mapping[str, Any] = MappingProxyType({"optimizer.kind": "adamw"}),
    data_digest: str = "cd" * 32,
) -> Progress:
    return Progress(
        step=step,
        epoch=step / 10,
        tokens=100 * step,
        recipe=dict(recipe),
        recipe_digest="ab" * 32,
        data_digest=data_digest,
        loss_scale=(1024.0, step),
        eval_loss=eval_loss,
        written_by={"strategy": "ddp", "processes": RANKS},
    )


def write_companions(directory: Path) -> None:
    """Configuration, generation defaults and tokenizer."""
    make_config().save_pretrained(directory)
    GenerationConfig.from_model_config(make_config()).save_pretrained(directory)
    write_tokenizer(directory)


def write_checkpoint(store: CheckpointStore, step: int, eval_loss: float | None = None, **progress: Any) -> Path:
    """Commits the checkpoint of `step`: weights of `make_weights`, two moments each; `progress` as `make_progress`."""
    weights = make_weights(step)
    moments = {
        f"{name}.{key}": tensor + len(key) for name, tensor in weights.items() for key in ("exp_avg", "exp_avg_sq")
    }
    plan = CheckpointPlan(_shards(WHOLE_MODEL, weights), _shards(OPTIMIZER_STATE, moments))
    partial = store.partial(step, "token")
    store.begin(partial)
    for rank in range(RANKS):
        write_part(plan, partial, rank, _owned(plan.model, weights, rank), _owned(plan.optimizer, moments, rank), {})
    return commit_checkpoint(
        plan,
        store,
        partial,
        RANKS,
        make_progress(step, eval_loss, **progress),
        {},
        write_companions,
        still_ours=lambda: True,
    )


def _shards(form: Form, tensors: dict[str, Tensor]) -> Shards:
    layout = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return Shards.of(form, layout, RANKS)


def _owned(shards: Shards, tensors: dict[str, Tensor], rank: int) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in tensors.items() if shards.owners[name] == rank]
