"""A pretrained model's losses are transformers' own, packed or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.real.alpaca import evaluation_examples, num_supervised, transformers_loss
from tests.small_models import load
from understudy.contracts import Batch, LossSum, TokenLossResult
from understudy.models.language_model import LanguageModel
from understudy.objectives.causal_lm import CausalLMObjective
from understudy.recipe.schema import Model

pytestmark = pytest.mark.real


class TokenByToken:
    """Cross-entropy that keeps each supervised token's own."""

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels
        self.losses = torch.zeros(len(labels))

    def __call__(self, logits: Tensor, rows: slice) -> TokenLossResult:
        self.losses[rows] = F.cross_entropy(logits, self.labels[rows], reduction="none")
        return TokenLossResult(self.losses[rows].sum(), torch.zeros_like(logits), {})


@pytest.fixture(scope="module")
def model(smollm2: Path) -> LanguageModel:
    return load(smollm2, Model(path=str(smollm2))).float().eval()


@torch.no_grad()
def test_every_example_has_transformers_loss_alone_and_in_a_packed_batch(
    smollm2: Path, small_run: list[str], token_caches: Path, model: LanguageModel
) -> None:
    documents = evaluation_examples(small_run, token_caches)
    counts = [num_supervised(document) for document in documents]
    network = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    expected = [transformers_loss(network, document) for document in documents]

    alone = [CausalLMObjective().loss(model, Batch.of([document])) for document in documents]
    assert [int(result.num_tokens) for result in alone] == counts
    assert [float(result.loss) / count for result, count in zip(alone, counts)] == pytest.approx(expected, rel=1e-5)

    token_loss = TokenByToken(torch.cat([labels[labels != -100] for _, labels in documents]))
    together = model(Batch.of(documents), token_loss)
    assert isinstance(together, LossSum)
    packed = [float(losses.mean()) for losses in token_loss.losses.split(counts)]
    assert packed == pytest.approx(expected, rel=1e-5)
    assert float(together.loss) == pytest.approx(sum(loss * count for loss, count in zip(expected, counts)), rel=1e-5)
