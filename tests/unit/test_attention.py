"""Document-aware attention against attention written out with a block-diagonal mask, and as a model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM

from tests.small_models import CONFIGS, documents, load, recipe
from understudy.contracts import IGNORED, Batch
from understudy.devices.attention import AttentionRule, Documents
from understudy.devices.cpu import CPU
from understudy.errors import UserError
from understudy.models.attention import register_attention
from understudy.models.initialization import materialize_random
from understudy.models.language_model import LanguageModel
from understudy.objectives.causal_lm import CausalLMObjective

pytestmark = pytest.mark.unit

LENGTHS = (5, 1, 13, 8)
OFFSETS = torch.tensor([0, 5, 6, 19, 27], dtype=torch.int32)
CPU_DEVICE = torch.device("cpu")


def make_inputs(kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, sum(LENGTHS), 8), (1, kv_heads, sum(LENGTHS), 8), (1, kv_heads, sum(LENGTHS), 8)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def expected_attention(query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
    """[1, T, H, D]: softmax over every pair of positions, with those that must not see each other at −∞."""
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    position = torch.arange(len(document))
    distance = position[:, None] - position[None, :]
    visible = (document[:, None] == document[None, :]) & (distance >= 0)
    if rule.window is not None:
        visible &= distance < rule.window
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores.masked_fill(~visible, float("-inf")).exp()
    total = scores.sum(-1, keepdim=True)
    if rule.sinks is not None:
        total = total + rule.sinks.exp().reshape(1, -1, 1, 1)
    return torch.einsum("bhqk,bhkd->bqhd", scores / total, value)


RULES = {
    "plain": AttentionRule(scale=0.4),
    "window": AttentionRule(scale=0.4, window=4),
    "window of one": AttentionRule(scale=0.4, window=1),
    "softcap": AttentionRule(scale=0.4, softcap=1.5),
    "softcap and window": AttentionRule(scale=0.4, softcap=1.5, window=4),
    "sinks": AttentionRule(scale=0.4, sinks=torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("kind", ["auto", "eager"])
def test_attention_is_causal_inside_each_document(rule: AttentionRule, kv_heads: int, kind: Any) -> None:
    function = AttentionInterface()[register_attention(kind, CPU())]
    ours, theirs = make_inputs(kv_heads), make_inputs(kv_heads)
    output, weights = function(
        nn.Module(),
        *ours,
        None,
        scaling=rule.scale,
        sliding_window=rule.window,
        softcap=rule.softcap,
        s_aux=rule.sinks,
        documents=Documents.of(OFFSETS, CPU_DEVICE),
    )
    expected = expected_attention(*theirs, rule)
    assert weights is None
    # The explicit softmax runs in fp32, as transformers' own does.
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (output * direction).sum().backward()
    (expected * direction).sum().backward()
    for mine, reference in zip(ours, theirs):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-5, atol=1e-6)


def test_a_device_kernel_gets_the_flat_stream_where_it_supports_the_rule() -> None:
    class Kernel:
        calls = 0

        def supports(self, query: Tensor, value: Tensor, rule: AttentionRule) -> bool:
            return rule.softcap is None

        def __call__(
            self, query: Tensor, key: Tensor, value: Tensor, documents: Documents, rule: AttentionRule
        ) -> Tensor:
            self.calls += 1
            assert query.shape == (27, 4, 8)
            assert key.shape == value.shape == (27, 2, 8)
            assert (documents.lengths, documents.longest) == (LENGTHS, 13)
            assert documents.offsets.dtype == torch.int32
            return expected_attention(*(t.transpose(0, 1)[None] for t in (query, key, value)), rule)[0]

    device = CPU()
    device.attention = kernel = Kernel()
    function = AttentionInterface()[register_attention("auto", device)]
    where = Documents.of(OFFSETS, CPU_DEVICE)
    inputs = make_inputs(2)
    output, _ = function(nn.Module(), *inputs, None, scaling=0.4, documents=where)
    torch.testing.assert_close(output, expected_attention(*inputs, AttentionRule(scale=0.4)))
    function(nn.Module(), *inputs, None, scaling=0.4, softcap=1.5, documents=where)
    assert kernel.calls == 1
    register_attention("auto", CPU())


def test_attention_dropout_drops_in_training() -> None:
    function = AttentionInterface()[register_attention("auto", CPU())]
    inputs = [t.float() for t in make_inputs(4)]
    where = Documents.of(OFFSETS, CPU_DEVICE)
    torch.manual_seed(0)
    first, _ = function(nn.Module(), *inputs, None, dropout=0.5, documents=where)
    second, _ = function(nn.Module(), *inputs, None, dropout=0.5, documents=where)
    assert not torch.equal(first, second)


def test_flash_is_refused_where_the_package_is_not_installed() -> None:
    with pytest.raises(UserError, match="flash-attn"):
        register_attention("flash", CPU())


@pytest.mark.parametrize("others", [{"position_bias": torch.zeros(1)}, {"is_causal": False}])
def test_a_layer_that_attends_in_its_own_way_is_refused(others: dict[str, Any]) -> None:
    function = AttentionInterface()[register_attention("auto", CPU())]
    with pytest.raises(UserError, match="document-aware"):
        function(nn.Module(), *make_inputs(4), None, documents=Documents.of(OFFSETS, CPU_DEVICE), **others)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def make_model(name: str, cache: Path, **overrides: Any) -> tuple[LanguageModel, Path]:
    model = recipe(name, CONFIGS[name] | overrides)
    directory = materialize_random(model, 7, cache)
    return load(directory, model), directory


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_generation_with_a_cache_is_transformers_own(name: str, cache: Path) -> None:
    built, directory = make_model(name, cache)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    prompts = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    arguments = {"attention_mask": (prompts != 0).long(), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = theirs.generate(prompts, **arguments)
    assert torch.equal(built.eval().network.generate(prompts, **arguments), expected)


def gradients(built: LanguageModel) -> tuple[float, dict[str, Tensor]]:
    built.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    result = CausalLMObjective().loss(built, Batch.of(documents()))
    result.loss.backward()
    return result.loss.item(), {name: p.grad.clone() for name, p in built.named_parameters()}


@pytest.mark.parametrize("kind", ["full", "selective"])
@pytest.mark.parametrize(("name", "dropout"), [("llama", "attention_dropout"), ("gpt2", "resid_pdrop")])
def test_activation_checkpointing_changes_no_gradient(name: str, dropout: str, kind: Any, cache: Path) -> None:
    built, _ = make_model(name, cache, **{dropout: 0.3})
    loss, plain = gradients(built)
    built.enable_activation_checkpointing(kind)
    recomputed_loss, recomputed = gradients(built)
    assert recomputed_loss == loss
    for key, gradient in plain.items():
        torch.testing.assert_close(recomputed[key], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "again"), [("full", 2), ("selective", 1)])
def test_full_checkpointing_repeats_matrix_products_and_selective_does_not(kind: Any, again: int, cache: Path) -> None:
    built, _ = make_model("llama", cache)
    built.enable_activation_checkpointing(kind)
    calls = 0

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal calls
            calls += func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
            return func(*args, **(kwargs or {}))

    with Count():
        gradients(built)
    assert calls == again * len(built.decoder_layers()) * len(documents())


@pytest.mark.parametrize("kind", [None, "full", "selective"])
def test_compiled_layers_give_the_same_gradients(kind: Any, cache: Path) -> None:
    built, _ = make_model("llama", cache)
    _, plain = gradients(built)
    names = [name for name, _ in built.named_parameters()]
    if kind is not None:
        built.enable_activation_checkpointing(kind)
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    torch.compiler.reset()
    built.compile_layers(backend)
    _, compiled = gradients(built)
    assert graphs > 0
    assert [name for name, _ in built.named_parameters()] == names
    for key, gradient in plain.items():
        torch.testing.assert_close(compiled[key], gradient, rtol=1e-5, atol=1e-6)


def test_a_document_longer_than_learned_positions_is_refused(cache: Path) -> None:
    built, _ = make_model("gpt2", cache, n_positions=16)
    assert built.document_limit == 16
    tokens = torch.ones(17, dtype=torch.int64)
    with pytest.raises(UserError, match=r"17 tokens .* 16 positions .* data.max_length"):
        CausalLMObjective().loss(built, Batch.of([(tokens, torch.full_like(tokens, IGNORED))]))


def test_rotary_positions_that_depend_on_the_longest_document_limit_its_length(cache: Path) -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    built, _ = make_model("llama", cache, rope_parameters=scaling)
    assert built.document_limit == 128
