"""Formulas of memory: against live tensors of a real step, against packages' own sizes, and what must hold anyhow."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests.small_models import CONFIGS
from understudy.contracts import IGNORED, Batch
from understudy.devices.cpu import CPU
from understudy.models.adapters.attachment import inject
from understudy.models.adapters.registry import make_config as make_adapter_config
from understudy.models.architecture import make_config
from understudy.models.build import make_language_model
from understudy.models.language_model import LanguageModel
from understudy.models.quantization.codec import Codec
from understudy.models.quantization.codecs.bitsandbytes_4bit import FourBit
from understudy.models.quantization.codecs.bitsandbytes_8bit import EightBit
from understudy.models.quantization.codecs.hqq import HQQ
from understudy.objectives.causal_lm import CausalLMObjective
from understudy.optim.optimizers.registry import make_optimizer
from understudy.parallel.world import World
from understudy.plan.estimate import Estimator
from understudy.plan.hardware.hardware import parse_hardware
from understudy.plan.memory.device import COMPONENTS
from understudy.plan.memory.head import CHUNK_BYTES
from understudy.plan.memory.optimizer import kept_bytes
from understudy.plan.memory.setting import strategy_of
from understudy.plan.network import Held
from understudy.plan.packed import packing_of
from understudy.plan.shape.model import model_shape
from understudy.recipe.presets import STRATEGY_PRESETS
from understudy.recipe.quantization import Quantization
from understudy.recipe.schema import DDP, Model, Optimizer, Recipe
from understudy.strategies.ddp import DDPStrategy
from understudy.strategies.precision import precision_of

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are so small that threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


WIDE = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
}
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TOKENS = 768


def recipe_with(**sections: Any) -> Recipe:
    values: dict[str, Any] = {"name": "r", "output_dir": "o", "model": {"path": "m"}}
    values["data"] = {"train": [{"path": "a"}], "max_length": TOKENS}
    return Recipe.model_validate({**values, **sections})


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors that exist, from when it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.is_meta or key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out


@contextmanager
def one_process() -> Iterator[World]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(0, 1, 0, 1)
    finally:
        dist.destroy_process_group()


def peak_of_a_step(directory: Path, recipe: Recipe) -> int:
    """Most bytes of tensors at once in the second step, when moments are there."""
    training = recipe.training
    precision = precision_of(training.precision)

    def make() -> LanguageModel:
        model = make_language_model(directory, Model(path=str(directory)), CPU())
        if recipe.adapter is not None:
            inject(model, make_adapter_config(recipe.adapter, model.network), precision.compute)  # type: ignore[arg-type]
        if training.activation_checkpointing != "none":
            model.enable_activation_checkpointing(training.activation_checkpointing)  # type: ignore[arg-type]
        return model

    document = torch.randint(3, 500, (TOKENS,))
    batch = Batch.of([(document, torch.cat([document[1:], torch.tensor([IGNORED])]))])
    with one_process() as world, LiveTensors() as live:
        strategy = DDPStrategy(torch.device("cpu"), world, precision)
        strategy.build(make, lambda named: make_optimizer(recipe.optimizer, named, fused=True))
        with torch.no_grad():
            for parameter in strategy.module.parameters():
                nn.init.normal_(parameter, std=0.02)
        for _ in range(2):
            live.peak = live.now
            strategy.forward_backward([batch], CausalLMObjective(), TOKENS - 1)
            strategy.optimizer_step(1e-3, 1.0)
    return live.peak


@pytest.mark.parametrize(
    ("model_type", "precision", "checkpointing", "adapter"),
    [
        ("llama", "bf16", "none", None),
        ("llama", "bf16", "selective", None),
        ("llama", "fp32", "full", None),
        ("gemma3_text", "bf16", "full", None),
        ("llama", "bf16", "none", "lora"),
        ("llama", "bf16", "full", "lora"),
    ],
)
def test_the_peak_of_a_step_is_that_of_its_live_tensors(
    model_type: str, precision: str, checkpointing: str, adapter: str | None, tmp_path: Path
) -> None:
    config = {"model_type": model_type, **WIDE, **({"head_dim": 16} if model_type == "gemma3_text" else {})}
    (tmp_path / "config.json").write_text(json.dumps(make_config(config, {}).to_dict()))
    recipe = recipe_with(
        training={"precision": precision, "activation_checkpointing": checkpointing, "global_batch_size": 1},
        adapter=adapter,
    )
    estimator = Estimator(recipe, parse_hardware("cpu:1TiB"), model_shape(config), ())
    planned = estimator.at(DDP(), checkpointing, TOKENS).peak.tensor_bytes  # type: ignore[arg-type]
    assert 0.98 <= planned / peak_of_a_step(tmp_path, recipe) <= 1.03


def test_constants_are_those_of_the_code_they_speak_of() -> None:
    from understudy.models import head
    from understudy.objectives import distillation_loss
    from understudy.plan.memory import head as planned

    assert CHUNK_BYTES == head.CHUNK_BYTES
    assert planned._BLOCK_BYTES == distillation_loss.BLOCK_BYTES


@pytest.mark.parametrize("shape", [(64, 48), (4096, 14336), (3, 5)])
def test_quantized_weights_are_as_large_as_their_codecs_say(shape: tuple[int, int]) -> None:
    cases: list[tuple[Quantization | None, dict[str, Any], Codec]] = [
        (Quantization(), {}, FourBit(*shape, data_type="nf4", nested=True)),
        (Quantization(double=False), {}, FourBit(*shape, data_type="nf4", nested=False)),
        (Quantization(bits=8), {}, EightBit(*shape)),
        (None, {"load_in_8bit": True}, EightBit(*shape)),
        (None, {"load_in_4bit": True}, FourBit(*shape, data_type="nf4", nested=False)),
    ]
    if shape[1] % 64 == 0:
        section = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}}
        cases.append((None, section, HQQ(*shape, bits=4, group_size=64, axis=0)))
    for quantization, section, codec in cases:
        packing = packing_of(quantization, {"quantization_config": section} if section else {})
        assert packing is not None
        assert packing(*shape) == codec.total_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["adamw", "adamw_bf16", "adamw_8bit", "adafactor", "lion", "muon", "sgd"])
@pytest.mark.parametrize("shape", [(96, 128), (64,)])
def test_an_optimizer_keeps_what_is_planned(kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    optimizer = Optimizer.model_validate({"kind": kind, **({"momentum": 0.9} if kind == "sgd" else {})})
    parameter = nn.Parameter(torch.randn(shape).to(dtype))
    made = make_optimizer(optimizer, [("model.layers.0.w.weight", parameter)], fused=False)
    parameter.grad = torch.randn(shape).to(dtype)
    made.step()
    tables = ("qmap1", "qmap2")  # shared by all parameters
    kept = sum(
        value.nbytes
        for key, value in made.state[parameter].items()
        if isinstance(value, Tensor) and value.ndim and key not in tables
    )
    held = Held(shape, "mlp", True, hidden_matrix=len(shape) == 2)
    assert kept_bytes(optimizer, held, parameter.numel(), dtype.itemsize) == kept


PRESETS = st.sampled_from(sorted(STRATEGY_PRESETS))
KINDS = st.sampled_from(["none", "selective", "full"])
ADAPTERS = st.sampled_from([None, "lora", "freeze"])
COUNTS = st.sampled_from([1, 2, 3, 4, 8, 16, 64])


def estimator_of(devices: int, adapter: str | None, optimizer: str = "adamw", config: Any = None) -> Estimator:
    recipe = recipe_with(
        adapter=adapter, optimizer=optimizer, training={"global_batch_size": 4096}, data={"train": [{"path": "a"}]}
    )
    return Estimator(recipe, parse_hardware(f"{devices}xA100-80GB"), model_shape(config or LLAMA_8B), ())


@settings(max_examples=60, deadline=None)
@given(PRESETS, KINDS, ADAPTERS, COUNTS, st.integers(2048, 100_000))
def test_more_devices_never_need_more_memory(
    name: str, kind: Any, adapter: str | None, count: int, tokens: int
) -> None:
    strategy = strategy_of(STRATEGY_PRESETS[name])
    few = estimator_of(count, adapter).at(strategy, kind, tokens).peak
    many = estimator_of(2 * count, adapter).at(strategy, kind, tokens).peak
    if count > 1:  # a single one needs no buffers to gather in
        assert many.tensor_bytes <= few.tensor_bytes


@settings(max_examples=40, deadline=None)
@given(PRESETS, KINDS, ADAPTERS, COUNTS, st.integers(2048, 50_000), st.integers(1, 50_000))
def test_more_tokens_never_need_less_memory(
    name: str, kind: Any, adapter: str | None, count: int, tokens: int, more: int
) -> None:
    estimator, strategy = estimator_of(count, adapter), strategy_of(STRATEGY_PRESETS[name])
    few, many = (estimator.at(strategy, kind, number).peak for number in (tokens, tokens + more))
    assert few.tensor_bytes <= many.tensor_bytes
    assert tuple(few.breakdown) == COMPONENTS
    assert all(size >= 0 for size in few.breakdown.values())


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["fsdp", "zero2", "zero3"]), KINDS, ADAPTERS, COUNTS, st.integers(2048, 50_000))
def test_offload_and_checkpointing_never_need_more_of_a_device(
    name: str, kind: Any, adapter: str | None, count: int, tokens: int
) -> None:
    estimator = estimator_of(count, adapter)
    plain, offloaded = (strategy_of(STRATEGY_PRESETS[one]) for one in (name, f"{name}-offload"))
    on_device, on_host = (estimator.at(strategy, kind, tokens) for strategy in (plain, offloaded))
    largest = estimator.network.head_numel * 4  # a buffer through which gradients go to the host
    assert on_host.peak.tensor_bytes <= on_device.peak.tensor_bytes + largest
    assert on_host.host_bytes >= on_device.host_bytes
    full, none = (estimator.at(plain, one, tokens).peak.tensor_bytes for one in ("full", "none"))  # type: ignore[arg-type]
    assert full <= none


@pytest.mark.parametrize("name", ["fsdp", "zero1", "zero2", "zero3"])
def test_states_are_shared_out_as_the_stage_says(name: str) -> None:
    """Weights, gradients and moments of full fine-tuning in bf16, bytes a parameter on eight devices."""
    estimate = estimator_of(8, None).at(strategy_of(STRATEGY_PRESETS[name]), "full", 4096)
    parts = {"fsdp": (4 / 8, 8 / 8), "zero1": (2 + 4 / 8, 8 / 8), "zero2": (2 + 4 / 8, 8 / 8), "zero3": (6 / 8, 8 / 8)}
    weights, moments = parts[name]
    count = model_shape(LLAMA_8B).count
    assert estimate.peak.breakdown["weights"] == pytest.approx(weights * count, rel=0.01)
    assert estimate.peak.breakdown["moments"] == pytest.approx(moments * count, rel=0.01)


def test_every_small_architecture_can_be_planned_under_every_strategy() -> None:
    for name, config in CONFIGS.items():
        estimator = estimator_of(2, None, config={"model_type": name, **config})
        for settings_of in STRATEGY_PRESETS.values():
            assert estimator.at(strategy_of(settings_of), "full", 2048).peak.tensor_bytes > 0
