"""Holding hidden states to a teacher's: value and gradient against fp64 autograd, and what layers really put out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests import small_models
from understudy.contracts import IGNORED, Batch
from understudy.errors import UserError
from understudy.models import layer_maps
from understudy.models.initialization import materialize_random
from understudy.models.layer_maps import LayerMaps, first_map
from understudy.models.names import canonical_name, is_beside_model, map_name
from understudy.objectives.causal_lm import CrossEntropy
from understudy.objectives.hidden_states import HiddenStateLoss, TargetsOfLayers, pair_layers
from understudy.recipe.objectives import HiddenStates
from understudy.recipe.schema import Model

pytestmark = pytest.mark.unit

WIDTH, THEIR_WIDTH = 6, 10
PAIRS = ((0, 2), (3, 1), (3, 4))
Kind = Literal["mse", "cosine"]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def told(rows: int, width: int, seed: int = 5, pairs: tuple[tuple[int, int], ...] = PAIRS) -> TargetsOfLayers:
    outputs = tuple(draw(rows, width, seed=seed + i) for i in range(len(pairs)))
    return TargetsOfLayers(lambda asked: torch.zeros(rows, 2)[asked], rows, pairs, outputs)


def maps_of(shapes: dict[int, tuple[int, int]], seed: int = 3) -> LayerMaps:
    maps = LayerMaps(shapes)
    for i, each in enumerate(maps.projections.values()):
        each.weight = nn.Parameter(draw(*each.weight.shape, seed=seed + i))
    return maps


def formula(kind: Kind, own: Tensor, theirs: Tensor) -> Tensor:
    if kind == "mse":
        return F.mse_loss(own, theirs, reduction="none").mean(dim=1).sum()
    return (1.0 - F.cosine_similarity(own, theirs, dim=1)).sum()


@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize(("rows", "chunk"), [(1, 1), (7, 3), (7, 100)])
def test_value_and_gradients_equal_autograd(
    kind: Kind, mapped: bool, rows: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    width = THEIR_WIDTH if mapped else WIDTH
    monkeypatch.setattr(layer_maps, "CHUNK_BYTES", 4 * width * chunk)
    maps = maps_of(dict.fromkeys((0, 3), (width, WIDTH)) if mapped else {})
    outputs = {layer: draw(rows, WIDTH, seed=layer).requires_grad_() for layer in (0, 3)}
    targets = told(rows, width)
    exact = {layer: hidden.detach().double().requires_grad_() for layer, hidden in outputs.items()}
    weights = [weight.detach().double().requires_grad_() for weight in maps.parameters()]
    places = dict(zip((0, 3), weights))
    expected = sum(
        formula(kind, F.linear(exact[layer], places[layer]) if mapped else exact[layer], theirs.double())
        for (layer, _), theirs in zip(PAIRS, targets.outputs)
    ) / len(PAIRS)
    (expected * 0.7).backward()

    loss = maps(dict(outputs), HiddenStateLoss(HiddenStates(loss=kind), targets))
    (loss * 0.7).backward()

    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip((*outputs.values(), *maps.parameters()), (*exact.values(), *weights)):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_gradients_without_any_row_are_zeros_and_not_missing(kind: Kind) -> None:
    maps = maps_of({0: (THEIR_WIDTH, WIDTH), 3: (THEIR_WIDTH, WIDTH)})
    outputs = {layer: draw(0, WIDTH, seed=layer).requires_grad_() for layer in (0, 3)}
    loss = maps(dict(outputs), HiddenStateLoss(HiddenStates(loss=kind), told(0, THEIR_WIDTH)))
    assert loss.item() == 0.0
    loss.backward()
    assert all(torch.equal(weight.grad, torch.zeros_like(weight)) for weight in maps.parameters())
    assert all(hidden.grad.shape == (0, WIDTH) for hidden in outputs.values())


def test_a_state_of_zeros_has_no_direction() -> None:
    outputs = {0: torch.zeros(2, WIDTH, requires_grad=True)}
    targets = told(2, WIDTH, pairs=((0, 0),))
    loss = LayerMaps({})(dict(outputs), HiddenStateLoss(HiddenStates(loss="cosine"), targets))
    loss.backward()
    assert loss.item() == 2.0
    assert torch.equal(outputs[0].grad, torch.zeros(2, WIDTH))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_loses_its_own_rounding_and_no_more(dtype: torch.dtype) -> None:
    """In fp16 a gradient a token is below what it can hold until the loss is scaled."""
    rows, width, scale = 5, 512, 2.0**16
    maps = maps_of({0: (width, WIDTH)})
    maps.projections["0"].weight = nn.Parameter(1e-3 * draw(width, WIDTH, seed=1, dtype=dtype))
    hidden, targets = 1e-2 * draw(rows, WIDTH, seed=2, dtype=dtype), told(rows, width, pairs=((0, 0),))
    hidden.requires_grad_()
    exact, weight = (each.detach().double().requires_grad_() for each in (hidden, maps.projections["0"].weight))
    (formula("mse", F.linear(exact, weight), targets.outputs[0].double()) * scale).backward()
    (maps({0: hidden}, HiddenStateLoss(HiddenStates(), targets)) * scale).backward()
    for ours, theirs in ((hidden, exact), (maps.projections["0"].weight, weight)):
        assert ours.grad.dtype == dtype
        distance = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert distance < (5e-3 if dtype == torch.bfloat16 else 5e-4)


@pytest.mark.parametrize(
    ("layers", "own", "theirs", "expected"),
    [
        ("last", 2, 5, [(1, 4)]),
        ("uniform", 2, 6, [(0, 2), (1, 5)]),
        ("uniform", 10, 30, [(i, 3 * i + 2) for i in range(10)]),
        ("uniform", 3, 3, [(0, 0), (1, 1), (2, 2)]),
        ("uniform", 4, 7, [(0, 1), (1, 3), (2, 4), (3, 6)]),
        ("uniform", 4, 1, [(0, 0), (1, 0), (2, 0), (3, 0)]),
        ([[1, 4], [1, 0]], 2, 5, [(1, 4), (1, 0)]),
    ],
)
def test_layers_are_matched_as_the_recipe_says(
    layers: Any, own: int, theirs: int, expected: list[tuple[int, int]]
) -> None:
    assert list(pair_layers(HiddenStates(layers=layers), own, theirs)) == expected


@pytest.mark.parametrize(("pair", "whose"), [([2, 0], "student, which has 2"), ([1, 5], "teacher, which has 5")])
def test_a_layer_that_there_is_not_is_refused(pair: list[int], whose: str) -> None:
    with pytest.raises(UserError, match=f"there is no layer {max(pair)} in the {whose}") as refused:
        pair_layers(HiddenStates(layers=[[0, 0], pair]), 2, 5)
    assert refused.value.key == "objective.hidden_states.layers"


def test_first_values_depend_on_seed_and_layer_and_keep_the_scale() -> None:
    one = first_map(1, 2, (300, 200))
    assert torch.equal(one, first_map(1, 2, (300, 200)))
    assert not torch.equal(one, first_map(2, 2, (300, 200)))
    assert not torch.equal(one, first_map(1, 3, (300, 200)))
    assert float((draw(50, 200, seed=1) @ one.T).std()) == pytest.approx(1.0, rel=0.02)


def test_maps_have_names_by_which_saved_models_leave_them_out() -> None:
    model = nn.Module()
    model.distillation = LayerMaps({3: (2, 2), 11: (2, 2)})
    names = [canonical_name(f"{prefix}{name}") for name, _ in model.named_parameters() for prefix in ("", "module.")]
    assert names == [map_name(3)] * 2 + [map_name(11)] * 2 == ["distillation.projections.3.weight"] * 2 + names[2:]
    assert all(map(is_beside_model, names))
    assert not any(map(is_beside_model, ["model.layers.3.weight", f"{map_name(3)}.exp_avg", f"model.{map_name(3)}"]))


def made(name: str, tmp_path: Path) -> tuple[Path, Model]:
    described = small_models.recipe(name, small_models.CONFIGS[name])
    return materialize_random(described, 0, tmp_path), described


def put_out(directory: Path, prompt: Tensor | None = None) -> list[list[Tensor]]:
    """By layer and document, [L, H] each: hooks on transformers' own model, one document at a time."""
    network = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList) and len(module) == 2]
    seen: list[list[Tensor]] = [[], []]
    for layer, module in enumerate(lists[0]):
        module.register_forward_hook(
            lambda _, inputs, output, layer=layer: seen[layer].append(
                (output[0] if isinstance(output, tuple) else output).detach()
            )
        )
    with torch.no_grad():
        for tokens, _ in small_models.documents():
            embedded = network.get_input_embeddings()(tokens)
            words = (
                {"input_ids": tokens[None]}
                if prompt is None
                else {"inputs_embeds": torch.cat([prompt, embedded])[None]}
            )
            network(**words)
    start = 0 if prompt is None else len(prompt)
    return [[output.reshape(-1, output.shape[-1])[start:] for output in layer] for layer in seen]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox", "opt", "olmo2"])
def test_what_a_layer_puts_out_is_what_it_does_in_transformers(name: str, tmp_path: Path) -> None:
    directory, described = made(name, tmp_path)
    model = small_models.load(directory, described)
    batch = Batch.of(small_models.documents())
    at = (batch.labels != IGNORED).nonzero().squeeze(1)
    with torch.no_grad():
        states = model.eval()(batch, hidden_at=at, layers=(1, 0))
    expected = [torch.cat(documents)[at] for documents in put_out(directory)]
    torch.testing.assert_close(states.layers[1], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states.layers[0], expected[1], rtol=1e-4, atol=1e-4)


def test_a_learned_prompt_moves_the_positions(tmp_path: Path) -> None:
    directory, described = made("llama", tmp_path)
    model = small_models.load(directory, described)
    model.prompt_embeddings = nn.Parameter(draw(3, small_models.SIZES["hidden_size"], seed=4))
    batch = Batch.of(small_models.documents())
    at = (batch.labels != IGNORED).nonzero().squeeze(1)
    with torch.no_grad():
        states = model.eval()(batch, hidden_at=at, layers=(0,))
    expected = torch.cat(put_out(directory, model.prompt_embeddings.detach())[0])[at]
    torch.testing.assert_close(states.layers[0], expected, rtol=1e-4, atol=1e-4)


def gradients(
    directory: Path, described: Model, kind: Any = None, backend: Callable[..., Any] | None = None
) -> dict[str, Tensor]:
    """Of cross-entropy and hidden states together, in the second of two passes."""
    model, batch = small_models.load(directory, described), Batch.of(small_models.documents())
    labels = batch.labels[batch.labels != IGNORED]
    targets = told(len(labels), 48, pairs=((0, 0), (1, 1)))
    model.distillation = maps_of(dict.fromkeys((0, 1), (48, small_models.SIZES["hidden_size"])))
    if kind is not None:
        model.enable_activation_checkpointing(kind)
    if backend is not None:
        torch.compiler.reset()
        model.compile_layers(backend)
    for _ in range(2):
        model.zero_grad()
        result = model.train()(batch, CrossEntropy(labels), layer_loss=HiddenStateLoss(HiddenStates(), targets))
        result.loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", [None, "full", "selective"])
def test_gradients_are_the_same_however_layers_compute(kind: Any, compiled: bool, tmp_path: Path) -> None:
    directory, described = made("llama", tmp_path)
    plain = gradients(directory, described)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    other = gradients(directory, described, kind, backend if compiled else None)
    assert bool(graphs) == compiled
    assert plain.keys() == other.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
