"""Each optimizer against its published update written out in fp64, and the parameter groups."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from understudy.errors import UserError
from understudy.optim.groups import decay_groups, ndim
from understudy.optim.optimizers.muon import orthogonalize
from understudy.optim.optimizers.registry import make_optimizer
from understudy.recipe.schema import Optimizer

pytestmark = pytest.mark.unit

STEPS = 6
DECAY = 0.1
BETA1, BETA2, EPS = 0.9, 0.95, 1e-8
MOMENTUM = 0.8
SHAPES = {
    "model.embed_tokens.weight": (80, 64),
    "model.layers.0.mlp.up.weight": (96, 64),
    "model.layers.0.mlp.down.weight": (64, 96),
    "model.layers.0.norm.weight": (64,),
    "lm_head.weight": (80, 64),
}
Update = Callable[[Tensor, Tensor, dict[str, Tensor], int, float, float], Tensor]


def learning_rate(step: int) -> float:
    return 1e-2 / step


def adamw(p: Tensor, g: Tensor, s: dict[str, Tensor], t: int, lr: float, decay: float) -> Tensor:
    s["m"] = BETA1 * s.get("m", torch.zeros_like(p)) + (1 - BETA1) * g
    s["v"] = BETA2 * s.get("v", torch.zeros_like(p)) + (1 - BETA2) * g**2
    unbiased, square = s["m"] / (1 - BETA1**t), s["v"] / (1 - BETA2**t)
    return p - lr * decay * p - lr * unbiased / (square.sqrt() + EPS)


def lion(p: Tensor, g: Tensor, s: dict[str, Tensor], t: int, lr: float, decay: float) -> Tensor:
    m = s.get("m", torch.zeros_like(p))
    s["m"] = BETA2 * m + (1 - BETA2) * g
    return p - lr * ((BETA1 * m + (1 - BETA1) * g).sign() + decay * p)


def sgd(p: Tensor, g: Tensor, s: dict[str, Tensor], t: int, lr: float, decay: float) -> Tensor:
    s["m"] = MOMENTUM * s.get("m", torch.zeros_like(p)) + g
    return p - lr * (s["m"] + decay * p)


def adafactor(p: Tensor, g: Tensor, s: dict[str, Tensor], t: int, lr: float, decay: float) -> Tensor:
    beta = 1 - t**-0.8
    square = g**2 + 1e-30
    if p.ndim == 2:
        s["r"] = beta * s.get("r", torch.zeros(p.shape[0]).double()) + (1 - beta) * square.sum(1)
        s["c"] = beta * s.get("c", torch.zeros(p.shape[1]).double()) + (1 - beta) * square.sum(0)
        variance = torch.outer(s["r"], s["c"]) / s["r"].sum()
    else:
        s["v"] = variance = beta * s.get("v", torch.zeros_like(p)) + (1 - beta) * square
    update = g / variance.sqrt()
    update = update / max(1.0, update.square().mean().sqrt().item())
    relative = max(1e-3, p.square().mean().sqrt().item()) * min(lr, 1 / math.sqrt(t))
    return p - lr * decay * p - relative * update


REFERENCES: dict[str, Update] = {
    "adamw": adamw,
    "adamw_bf16": adamw,
    "adamw_8bit": adamw,
    "lion": lion,
    "sgd": sgd,
    "adafactor": adafactor,
}


def recipe(kind: str, **fields: float) -> Optimizer:
    given = {"learning_rate": 1e-2, "weight_decay": DECAY, "momentum": MOMENTUM, **fields}
    return Optimizer(kind=kind, betas=(BETA1, BETA2), eps=EPS, **given)


def weights() -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=chance) for name, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=chance) for name, shape in SHAPES.items()}


def trained(kind: str, fused: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights after STEPS steps of the product's optimizer, its learning rate set anew at each."""
    named = [(name, nn.Parameter(weight.to(dtype))) for name, weight in weights().items()]
    optimizer = make_optimizer(recipe(kind), named, fused=fused)
    for step in range(1, STEPS + 1):
        for name, parameter in named:
            parameter.grad = gradients(step)[name].to(dtype)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().double() for name, parameter in named}


def expected(update: Update, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The fp64 reference's weight; norms do not decay."""
    weight, state = weights()[name].to(dtype).double(), {}
    for step in range(1, STEPS + 1):
        grad = gradients(step)[name].to(dtype).double()
        weight = update(weight, grad, state, step, learning_rate(step), DECAY if weight.ndim == 2 else 0.0)
    return weight


def relative_error(found: Tensor, reference: Tensor, start: Tensor) -> float:
    """Of the way the weights went, not of the weights."""
    return ((found - reference).norm() / (reference - start.double()).norm()).item()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "adamw_bf16", "lion", "sgd", "adafactor"])
def test_fp32_weights_follow_the_fp64_reference(kind: str, fused: bool) -> None:
    found = trained(kind, fused)
    for name, start in weights().items():
        assert relative_error(found[name], expected(REFERENCES[kind], name), start) < 1e-5, name


def test_8bit_moments_follow_the_reference_to_the_quantisation_and_small_tensors_exactly() -> None:
    found = trained("adamw_8bit")
    for name, start in weights().items():
        tolerance = 0.03 if start.numel() >= 4096 else 1e-5
        assert relative_error(found[name], expected(adamw, name), start) < tolerance, name


def test_8bit_moments_take_two_bytes_a_parameter() -> None:
    parameter = nn.Parameter(torch.zeros(256, 256))
    optimizer = make_optimizer(recipe("adamw_8bit"), [("w", parameter)], fused=False)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tables = {"qmap1", "qmap2"}
    held = [v for k, v in optimizer.state[parameter].items() if isinstance(v, Tensor) and k not in tables]
    assert sum(tensor.nbytes for tensor in held) < 2.1 * parameter.numel()


def test_8bit_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        make_optimizer(recipe("adamw_8bit"), [("w", nn.Parameter(torch.zeros(2, 2)))], fused=False)


def bf16_run(kind: str, steps: int, grad: float) -> tuple[Tensor, Tensor]:
    """A bf16 weight of ones under a gradient so steady that each step is far below the weight's rounding, and where
    fp64 ends."""
    parameter = nn.Parameter(torch.ones(4, 8, dtype=torch.bfloat16))
    optimizer = make_optimizer(recipe(kind, learning_rate=1e-4), [("w", parameter)], fused=False)
    reference, state = torch.ones(4, 8, dtype=torch.float64), {}
    for step in range(1, steps + 1):
        parameter.grad = torch.full_like(parameter, grad)
        optimizer.step()
        reference = adamw(reference, torch.full_like(reference, grad), state, step, 1e-4, DECAY)
    return parameter.detach().double(), reference


def test_kahan_summation_keeps_small_bf16_updates_that_plain_bf16_loses() -> None:
    plain, reference = bf16_run("adamw", 500, grad=0.5)
    assert torch.equal(plain, torch.ones_like(plain))
    kahan, reference = bf16_run("adamw_bf16", 500, grad=0.5)
    assert reference.max() < 0.96
    assert (kahan - reference).abs().max() < 2**-8


@pytest.mark.parametrize("kind", ["adamw_bf16", "lion", "sgd"])
def test_kahan_summation_keeps_weight_decay_that_rounds_away_in_bf16(kind: str) -> None:
    kahan, reference = bf16_run(kind, 2000, grad=0.0)
    assert reference.max() < 0.981
    assert (kahan - reference).abs().max() < 2**-8


def test_bf16_weights_and_moments_stay_bf16() -> None:
    parameter = nn.Parameter(torch.ones(4, 8, dtype=torch.bfloat16))
    optimizer = make_optimizer(recipe("adamw_bf16"), [("w", parameter)], fused=False)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    sizes = {name: tensor.dtype for name, tensor in optimizer.state[parameter].items() if tensor.ndim}
    assert sizes == dict.fromkeys(("exp_avg", "exp_avg_sq", "compensation"), torch.bfloat16)


@pytest.mark.parametrize("kind", ["adamw_bf16", "sgd"])
def test_bf16_weights_end_within_their_rounding_of_the_fp64_reference(kind: str) -> None:
    found = trained(kind, dtype=torch.bfloat16)
    for name in SHAPES:
        reference = expected(REFERENCES[kind], name, torch.bfloat16)
        # Half a unit in the last place of the weight, and as much for the moments' own rounding.
        assert ((found[name] - reference).abs() <= 2**-7 * reference.abs() + 2e-3).all(), name


def orthogonal(matrix: Tensor) -> Tensor:
    """Newton-Schulz iteration is its polynomial on the singular values."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ values.diag() @ right


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (64, 64)])
def test_orthogonalize_maps_singular_values_through_its_polynomial(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    reference = orthogonal(matrix)
    assert (orthogonalize(matrix).double() - reference).norm() / reference.norm() < 0.02


def test_muon_updates_hidden_matrices_by_the_orthogonal_momentum_and_the_rest_by_adamw() -> None:
    found = trained("muon")
    for name, start in weights().items():
        if ".layers." not in name or start.ndim != 2:
            assert relative_error(found[name], expected(adamw, name), start) < 1e-5, name
            continue
        weight, momentum = start.double(), torch.zeros_like(start).double()
        for step in range(1, STEPS + 1):
            grad = gradients(step)[name].double()
            momentum = BETA1 * momentum + (1 - BETA1) * grad
            update = orthogonal(BETA1 * momentum + (1 - BETA1) * grad)
            scale = 0.2 * math.sqrt(max(start.shape))
            weight = weight - learning_rate(step) * (DECAY * weight + scale * update)
        assert relative_error(found[name], weight, start) < 0.02, name


def test_muon_and_torch_muon_agree_on_one_process() -> None:
    name = "model.layers.0.mlp.up.weight"
    ours, theirs = nn.Parameter(weights()[name]), nn.Parameter(weights()[name])
    optimizers = [
        make_optimizer(recipe("muon"), [(name, ours)], fused=False),
        torch.optim.Muon([theirs], lr=1e-2, weight_decay=DECAY, momentum=BETA1, adjust_lr_fn="match_rms_adamw"),
    ]
    for step in range(1, STEPS + 1):
        ours.grad, theirs.grad = gradients(step)[name], gradients(step)[name]
        for optimizer in optimizers:
            optimizer.step()
    assert relative_error(ours.detach(), theirs.detach(), weights()[name]) < 1e-6


@pytest.mark.parametrize("kind", ["adamw", "adamw_bf16", "adamw_8bit", "adafactor", "lion", "muon", "sgd"])
def test_an_optimizer_goes_on_from_its_state_dict(kind: str) -> None:
    def start() -> tuple[nn.Parameter, torch.optim.Optimizer]:
        parameter = nn.Parameter(weights()["model.layers.0.mlp.up.weight"])
        return parameter, make_optimizer(recipe(kind), [("model.layers.0.w", parameter)], fused=False)

    def step(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, number: int) -> None:
        parameter.grad = gradients(number)["model.layers.0.mlp.up.weight"]
        optimizer.step()

    whole, optimizer = start()
    for number in (1, 2, 3, 4):
        step(whole, optimizer, number)
        if number == 2:
            resumed, fresh = start()
            resumed.data.copy_(whole.data)
            fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in (3, 4):
        step(resumed, fresh, number)
    assert torch.equal(whole, resumed)


def test_matrices_decay_and_norms_biases_and_frozen_parameters_do_not() -> None:
    matrix, norm, frozen = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, 2))
    frozen.requires_grad_(False)
    settings = Optimizer(weight_decay=0.1)
    groups = decay_groups([("w", matrix), ("norm", norm), ("frozen", frozen)], settings)
    undecayed = {"params": [norm], "weight_decay": 0.0, "lr_scale": 1.0}
    assert groups == [{"params": [matrix], "weight_decay": 0.1, "lr_scale": 1.0}, undecayed]
    assert decay_groups([("norm", norm)], settings) == [undecayed]


def test_lora_plus_scales_the_learning_rate_of_b_matrices_alone() -> None:
    names = ("model.layers.0.q_proj.lora_A.weight", "model.layers.0.q_proj.lora_B.weight", "model.embed_tokens.weight")
    a, b, embedding = (nn.Parameter(torch.ones(2, 2)) for _ in names)
    groups = decay_groups(zip(names, (a, b, embedding)), Optimizer(weight_decay=0.1, lora_plus_ratio=16.0))
    assert [(group["params"], group["lr_scale"]) for group in groups] == [([a, embedding], 1.0), ([b], 16.0)]
    assert {group["weight_decay"] for group in groups} == {0.1}


def test_a_partitioned_parameter_counts_with_its_whole_shape() -> None:
    partitioned = nn.Parameter(torch.empty(0))
    partitioned.ds_shape = torch.Size([8, 4])
    assert ndim(partitioned) == 2
    assert decay_groups([("w", partitioned)], Optimizer(weight_decay=0.1))[0]["weight_decay"] == 0.1
