"""The student that a recipe cuts from a larger model, before any process starts (P7)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from understudy.checkpoint.pruned_model import materialize_pruned
from understudy.data.cache import TokenCache
from understudy.models.identity import model_digest
from understudy.models.made_once import made_once
from understudy.models.pruning.choice import choose, described, measured_parts, require_possible
from understudy.models.pruning.importance import Importance, Measured, measure, read_importance, write_importance
from understudy.models.pruning.structure import Structure
from understudy.recipe.schema import Model

__all__ = ["EXAMPLES", "EXAMPLE_TOKENS", "pruned_model"]

EXAMPLES = 64
"""Training examples that importance is measured on, spread evenly over the set."""
EXAMPLE_TOKENS = 512
"""Of each, its first tokens."""
FORMAT_VERSION = 1
"""Part of every measurement's name: raise it whenever the same input would be measured otherwise."""


def pruned_model(
    model: Model,
    directory: Path,
    measured_on: Callable[[], tuple[Path, TokenCache]],
    *,
    cache: Path,
    report: Callable[[str], None],
) -> Path:
    """The directory, in `cache`, of what `model` keeps of the model in `directory`.

    Only where importance decides, `measured_on` is called: for that model with an embedding for every token of the
    data, and for the training data. `report` gets a line about what is kept, and one before anything that takes time.
    Raises `UserError` where the model cannot be cut so.
    """
    identity = model_digest(directory, cache)
    structure = Structure(directory, trust_remote_code=model.trust_remote_code)
    require_possible(model, structure)
    importance, asked = Importance(), measured_parts(model)
    if asked:
        measured, train = measured_on()
        importance = _importance(measured, train, asked, identity, cache, report)
    kept = choose(model, structure, importance)
    report(f"pruned: {described(kept, structure)}.")
    return materialize_pruned(structure, kept, identity=identity, cache=cache, report=report)


def _importance(
    directory: Path,
    train: TokenCache,
    asked: Sequence[Measured],
    identity: str,
    cache: Path,
    report: Callable[[str], None],
) -> Importance:
    """Of the model in `directory`, measured once on a machine for the same model and data."""
    decisive = [FORMAT_VERSION, EXAMPLES, EXAMPLE_TOKENS, identity, train.digest, list(asked)]
    digest = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()

    def build(building: Path) -> None:
        count = min(EXAMPLES, len(train))
        documents = [
            torch.from_numpy(train.tokens(i * len(train) // count)[:EXAMPLE_TOKENS].astype(np.int64))
            for i in range(count)
        ]
        tokens = sum(map(len, documents))
        report(f"measuring importance on {count} training examples, {tokens:,} tokens, once on this machine …")
        write_importance(building, measure(Structure(directory), documents, asked))

    return read_importance(made_once(cache / "importance" / digest[:32], build))
