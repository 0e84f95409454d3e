"""Flat batches against transformers' own computation, one document at a time, on small random models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.small_models import CONFIGS, SIZES, VOCABULARY, documents, load, recipe
from understudy.contracts import IGNORED, Batch
from understudy.errors import UserError
from understudy.models.initialization import materialize_random
from understudy.models.isolation import check_isolation
from understudy.objectives.causal_lm import CausalLMObjective
from understudy.recipe.schema import Model

pytestmark = pytest.mark.unit


def reference(directory: Path) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """transformers' own losses, gradients and buffers: one document a batch, shifted by it, its own eager attention."""
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    losses = []
    for tokens, labels in documents():
        if (labels == IGNORED).all():
            continue
        unshifted = torch.cat([torch.tensor([IGNORED]), labels[:-1]])
        loss = network(input_ids=tokens[None], labels=unshifted[None], use_cache=False).loss * (labels != IGNORED).sum()
        loss.backward()
        losses.append(loss.item())
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return losses, gradients, dict(network.named_buffers())


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(
    ("name", "attention"), [(name, "auto") for name in CONFIGS] + [("llama", "eager"), ("mistral", "eager")]
)
def test_loss_and_gradients_of_a_flat_batch_are_those_of_its_documents_alone(
    name: str, attention: str, cache: Path
) -> None:
    model = recipe(name, CONFIGS[name]).model_copy(update={"attention": attention})
    directory = materialize_random(model, 7, cache)
    losses, gradients, buffers = reference(directory)
    built = load(directory, model)

    result = CausalLMObjective().loss(built, Batch.of(documents()))
    result.loss.backward()

    assert result.num_tokens == sum((labels != IGNORED).sum() for _, labels in documents())
    torch.testing.assert_close(result.loss.item(), sum(losses), rtol=1e-5, atol=1e-5)
    ours = {key: p.grad for key, p in built.network.named_parameters() if p.grad is not None}
    assert set(gradients) <= set(ours)
    # A key projection's bias has no gradient but rounding, so there the whole model's gradient is the measure.
    floor = torch.stack([gradient.norm() for gradient in gradients.values()]).norm() / 100
    for key, expected in gradients.items():
        assert (ours[key] - expected).norm() <= 1e-5 * expected.norm().clamp(min=floor), key
    for key, buffer in built.network.named_buffers():
        assert torch.equal(buffer, buffers[key]), key


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_each_document_has_its_own_loss(name: str, cache: Path) -> None:
    model = recipe(name, CONFIGS[name])
    directory = materialize_random(model, 7, cache)
    losses, _, _ = reference(directory)
    built = load(directory, model)
    everything = documents()
    alone = []
    for index, (_, labels) in enumerate(everything):
        silent = [(tokens, torch.full_like(tokens, IGNORED)) for tokens, _ in everything]
        silent[index] = everything[index]
        if (labels != IGNORED).any():
            alone.append(CausalLMObjective().loss(built, Batch.of(silent)).loss.item())
    torch.testing.assert_close(alone, losses, rtol=1e-5, atol=1e-5)


def prove_isolation(directory: Path, model: Model) -> None:
    built = load(directory, model).eval()
    with torch.no_grad():
        check_isolation(lambda batch, at: built(batch, logits_at=at), VOCABULARY, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_isolation_is_proved_on_architectures_that_have_it(name: str, cache: Path) -> None:
    model = recipe(name, CONFIGS[name])
    prove_isolation(materialize_random(model, 7, cache), model)


REFUSED: dict[str, dict[str, Any]] = {
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "falcon": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    # Its short convolutions run across boundaries, though its attention would not.
    "lfm2": SIZES | {"layer_types": ["conv", "full_attention"], "pad_token_id": 0},
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_that_leaks_between_documents_is_refused(name: str, cache: Path) -> None:
    model = recipe(name, REFUSED[name])
    directory = materialize_random(model, 7, cache)
    with pytest.raises(UserError, match="document-aware"):
        prove_isolation(directory, model)


def test_an_encoder_is_refused(cache: Path) -> None:
    model = recipe("bert", {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 1})
    with pytest.raises(UserError, match="choose another architecture"):
        load(materialize_random(model, 7, cache), model)


@pytest.mark.parametrize(
    ("name", "leak"),
    [
        ("attend to each other", lambda packed: packed.mean(0, keepdim=True).expand_as(packed)),
        ("see later tokens", lambda packed: packed + packed.flip(0).cumsum(0).flip(0)),
        ("where in the batch", lambda packed: packed * torch.arange(len(packed)).unsqueeze(1)),
    ],
)
def test_each_kind_of_leak_is_named(name: str, leak: Callable[[Tensor], Tensor]) -> None:
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match=name):
        check_isolation(lambda batch, at: leak(table[batch.tokens])[at], VOCABULARY, torch.device("cpu"), torch.float32)


def test_logits_that_are_no_numbers_prove_nothing() -> None:
    with pytest.raises(UserError, match="not finite"):
        check_isolation(
            lambda batch, at: torch.full((len(at), VOCABULARY), torch.nan),
            VOCABULARY,
            torch.device("cpu"),
            torch.float32,
        )
