"""The exact tier against real steps of two processes: the most bytes of tensors at once, under every strategy."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
from benchmarks.apart import each_apart

from tests.distributed.processes import run_processes
from understudy.plan.estimate import Estimator
from understudy.plan.hardware.hardware import parse_hardware
from understudy.plan.shape.model import model_shape
from understudy.recipe.presets import STRATEGY_PRESETS
from understudy.recipe.schema import Recipe
from understudy.simulation.simulate import simulate

pytestmark = pytest.mark.distributed

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
}
SMOLLM2: dict[str, Any] = {
    **TINY,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
WIDE: dict[str, Any] = {**TINY, "hidden_size": 256, "intermediate_size": 704, "vocab_size": 8192}
"""With more than the 4 million elements that the smallest bucket has."""
PROCESSES = 2
Case = tuple[dict[str, Any], dict[str, Any], int]


def case(
    config: dict[str, Any], strategy: str | dict[str, Any], tokens: int, micro_batches: int, **sections: Any
) -> Case:
    recipe = {
        "name": "r",
        "output_dir": "o",
        "model": {"path": "m"},
        "data": {"train": [{"path": "d"}], "max_length": tokens},
        "strategy": strategy,
        "training": {"precision": "bf16", "activation_checkpointing": "none", "micro_batch_tokens": tokens},
        **sections,
    }
    return config, recipe, micro_batches


TINY_CASES: dict[str, Case] = {
    **{name: case(TINY, name, 512, 2) for name in STRATEGY_PRESETS},
    "zero3, LoRA": case(TINY, "zero3", 512, 1, adapter="lora"),
    "fsdp, LoRA": case(TINY, "fsdp", 512, 1, adapter="lora"),
}


def simulated(given: Case) -> int:
    config, recipe, micro_batches = given
    with contextlib.redirect_stdout(io.StringIO()):
        found = simulate(
            Recipe.model_validate(recipe),
            model_shape(config),
            processes=PROCESSES,
            micro_batches=micro_batches,
            kernel="documents",
            gloo=True,
        )
    return found.peak_bytes


def planned(given: Case) -> int:
    """By the analytic tier; what a strategy offloads included."""
    config, settings, micro_batches = given
    recipe = Recipe.model_validate(settings)
    tokens, strategy = recipe.training.micro_batch_tokens, recipe.strategy
    assert tokens != "auto", "the test fixes it"
    assert strategy != "auto", "the test fixes it"
    estimator = Estimator(recipe, parse_hardware(f"{PROCESSES}xcpu:16GiB"), model_shape(config), ())
    estimate = estimator.at(strategy, "none", tokens, micro_batches)
    return estimate.peak.tensor_bytes + estimate.offloaded_bytes


def ratios(cases: dict[str, Case], scratch: Path) -> dict[str, float]:
    """The simulated peak over the real one, and under `planned …` what the analytic tier says over it."""
    real = run_processes(Path(__file__).parent / "live_worker.py", PROCESSES, scratch, {"cases": cases})[0]
    exact = each_apart(simulated, cases.values(), imports=["understudy.simulation.simulate", "deepspeed"])
    found = {name: size / real[name] for name, size in zip(cases, exact, strict=True)}
    return found | {f"planned {name}": planned(given) / real[name] for name, given in cases.items()}


def test_simulated_peaks_are_those_of_two_real_processes(tmp_path: Path) -> None:
    assert _off(ratios(TINY_CASES, tmp_path)) == {}


def test_small_buckets_take_what_is_planned_and_simulated(tmp_path: Path) -> None:
    cases = {
        f"zero{stage}, {buckets}": case(WIDE, {"kind": "deepspeed", "stage": stage, "buckets": buckets}, 64, 2)
        for stage in (2, 3)
        for buckets in ("small", "large")
    }
    assert all(planned(cases[f"zero{stage}, small"]) < 0.9 * planned(cases[f"zero{stage}, large"]) for stage in (2, 3))
    assert _off(ratios(cases, tmp_path)) == {}


@pytest.mark.matrix
@pytest.mark.parametrize("strategy", STRATEGY_PRESETS)
def test_simulated_peaks_of_135_million_parameters_are_real_ones(strategy: str, tmp_path: Path) -> None:
    assert _off(ratios({strategy: case(SMOLLM2, strategy, 128, 2)}, tmp_path)) == {}


def _off(found: dict[str, float]) -> dict[str, float]:
    return {name: ratio for name, ratio in found.items() if not 0.95 <= ratio <= 1.05}
