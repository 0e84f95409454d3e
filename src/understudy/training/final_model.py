"""The model that a run ends with: saved by all ranks, then reloaded with transformers to prove that it is the one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from understudy.checkpoint.export import save_model
from understudy.checkpoint.form import Form
from understudy.contracts import Strategy
from understudy.data.cache import TokenCache
from understudy.launch.run_directory import RunDirectory
from understudy.parallel.world import World
from understudy.strategies.precision import precision_of
from understudy.training.adapting import saved_dtype
from understudy.training.console import Console
from understudy.training.job import Job
from understudy.training.proof import prove_model, trained_logits

__all__ = ["Trained", "prove_final_model", "save_final_model"]

PROOF_DOCUMENTS = 2
PROOF_TOKENS = 48


@dataclass(frozen=True)
class Trained:
    """What is left of training once the process group is gone."""

    documents: Sequence[Tensor]
    logits: Tensor
    """The trained model's, at every token of `documents`."""
    tokenizer: Any


def save_final_model(
    job: Job,
    strategy: Strategy,
    world: World,
    cache: TokenCache,
    *,
    form: Form,
    buffers: Mapping[str, Tensor],
    write_companions: Callable[[Path], None],
    tokenizer: Any,
) -> Trained:
    """Writes the model in the dtype that it computed in, an adapter as it was trained, under a name for the unproven. A
    collective."""
    documents = _proof_documents(cache)
    logits = trained_logits(strategy, documents)
    save_model(
        strategy,
        RunDirectory(job.run_directory).unproven_model,
        rank=world.rank,
        world_size=world.size,
        form=form,
        dtype=saved_dtype(job.recipe),
        buffers=buffers,
        write_companions=write_companions,
    )
    return Trained(documents, logits, tokenizer)


def prove_final_model(job: Job, trained: Trained, console: Console) -> None:
    """Nobody waits for this in a collective. The model gets its name once it is proved."""
    directory = RunDirectory(job.run_directory)
    proof = prove_model(
        directory.unproven_model,
        documents=trained.documents,
        expected=trained.logits,
        base=None if job.adapter_directory is None else job.model_directory,
        dtype=_compute_dtype(job),
        tokenizer=trained.tokenizer,
        trust_remote_code=job.recipe.model.trust_remote_code,
    )
    directory.accept_model()
    console.say(
        f"model: {directory.model}\n"
        f"reloaded with transformers: logits differ from the trained model's by at most {proof.difference:.1e} of the "
        f"largest, over {proof.tokens} tokens ({proof.tolerance:.0e} allowed)"
    )


def _compute_dtype(job: Job) -> torch.dtype:
    return precision_of(job.recipe.training.precision).compute


def _proof_documents(cache: TokenCache) -> list[Tensor]:
    count = min(PROOF_DOCUMENTS, len(cache.lengths))
    return [torch.from_numpy(cache.tokens(i)[:PROOF_TOKENS].astype("int64")) for i in range(count)]
