"""The shipped recipe's data prepared in this process, and transformers' own loss of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.real.conftest import RECIPE
from understudy.contracts import IGNORED
from understudy.data.cache import TokenCache
from understudy.data.prepare import PreparedData, prepare_data
from understudy.recipe.load import load_recipe

Document = tuple[Tensor, Tensor]


def prepared(overrides: list[str], cache_dir: Path) -> PreparedData:
    recipe, sources = load_recipe(RECIPE, overrides)
    assert recipe.model.path is not None
    return prepare_data(
        recipe,
        sources,
        tokenizer_dir=Path(recipe.model.path),
        vocab_size=None,
        cache_dir=cache_dir,
        report=lambda _: None,
    )


def evaluation_examples(overrides: list[str], cache_dir: Path) -> list[Document]:
    """(tokens, shifted labels) of each evaluation example."""
    entry = prepared(overrides, cache_dir).evaluation
    assert entry is not None
    cache = TokenCache.open(entry)
    return [_document(cache, i) for i in range(len(cache.lengths))]


def _document(cache: TokenCache, i: int) -> Document:
    tokens = torch.from_numpy(cache.tokens(i).astype(np.int64))
    supervised = torch.from_numpy(cache.supervised(i).astype(bool))
    labels = torch.where(supervised, tokens, IGNORED).roll(-1)
    labels[-1] = IGNORED
    return tokens, labels


def num_supervised(document: Document) -> int:
    return int((document[1] != IGNORED).sum())


@torch.no_grad()
def transformers_loss(network: Any, document: Document) -> float:
    """The mean over the document's supervised tokens that a transformers model gives for `labels`, in nats."""
    tokens, labels = document
    # transformers shifts by itself: each label stands beside the token it is.
    unshifted = labels.roll(1)
    return float(network(input_ids=tokens[None], labels=unshifted[None], use_cache=False).loss)


def mean_loss(network: Any, documents: list[Document]) -> float:
    """Over all supervised tokens."""
    total = sum(transformers_loss(network, document) * num_supervised(document) for document in documents)
    return total / sum(num_supervised(document) for document in documents)
