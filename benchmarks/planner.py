"""The analytic plan against the exact tier: the peak of tensors in each of a few hundred settings, by both.

Models are of published widths with few layers, since layers are alike: embedding, head and layers then have the
weights that they have in models of 0.1 to 2 billion parameters.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.apart import each_apart
from understudy.plan.estimate import Estimator
from understudy.plan.hardware.hardware import parse_hardware
from understudy.plan.memory.setting import strategy_of
from understudy.plan.shape.model import ModelShape, model_shape
from understudy.recipe.presets import STRATEGY_PRESETS
from understudy.recipe.schema import Recipe
from understudy.simulation.simulate import simulate

__all__ = ["MODELS", "Compared", "Point", "compare", "compare_all", "compare_each", "points", "recipe_of"]

MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "smollm2": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "llama2": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 4,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "qwen2": {
        "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 4,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "qwen3": {
        "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 4,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "mistral": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768, "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "gemma3": {
        "model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144,
        "tie_word_embeddings": True,
    },
    "phi3": {
        "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 4,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "tie_word_embeddings": False,
        "pad_token_id": 0,
    },
}  # fmt: skip
ADAPTERS: tuple[Any, ...] = (None, "lora", "qlora")
CHECKPOINTING = ("none", "selective", "full")
HARDWARE = ("A100-80GB", "V100-32GB")
"""With a kernel for attention of variable length, and without one."""
PROCESSES = (2, 8, 64)
TOKENS = (1024, 4096, 16384)
PRECISIONS = ("bf16", "fp32")


@dataclass(frozen=True)
class Point:
    model: str
    strategy: str
    adapter: str | None
    checkpointing: str
    hardware: str
    processes: int
    tokens: int
    """Of a micro-batch; examples have at most 2,048."""
    micro_batches: int
    precision: str


@dataclass(frozen=True)
class Compared:
    point: Point
    planned: int
    exact: int
    seconds: float
    """Of the simulation."""

    @property
    def ratio(self) -> float:
        return self.planned / self.exact


def points(
    count: int, seed: int = 0, *, processes: tuple[int, ...] = PROCESSES, tokens: tuple[int, ...] = TOKENS
) -> Iterator[Point]:
    """`count` settings, no two alike: each strategy as often as any other, all else drawn."""
    drawn, seen = random.Random(seed), set[Point]()
    for strategy in itertools.cycle(STRATEGY_PRESETS):
        if len(seen) == count:
            return
        hardware = drawn.choice(HARDWARE)
        point = Point(
            drawn.choice(list(MODELS)),
            strategy,
            drawn.choice(ADAPTERS),
            drawn.choice(CHECKPOINTING),
            hardware,
            drawn.choice(processes),
            drawn.choice(tokens),
            # What is offloaded and what is not peak at one time only if there are gradients throughout.
            4 if strategy.endswith("offload") else drawn.choice((1, 4)),
            drawn.choice(PRECISIONS),
        )
        if point not in seen:
            seen.add(point)
            yield point


def recipe_of(point: Point) -> Recipe:
    quantized = point.adapter == "qlora"
    longest = min(2048, point.tokens)
    return Recipe.model_validate(
        {
            "name": "planner",
            "output_dir": "runs/planner",
            "model": {"path": "model"},
            "data": {"train": [{"path": "data"}], "max_length": longest},
            "adapter": None if point.adapter is None else {"kind": "lora", "rank": 16},
            "quantization": {"bits": 4} if quantized else None,
            "strategy": point.strategy,
            "training": {
                "precision": point.precision,
                "activation_checkpointing": point.checkpointing,
                "global_batch_size": point.processes * point.micro_batches * point.tokens // longest,
                "micro_batch_tokens": point.tokens,
            },
        }
    )


def shape_of(point: Point) -> ModelShape:
    return model_shape(MODELS[point.model])


def compare(point: Point) -> Compared:
    """Tensors of a process in bytes; where a strategy offloads, those in host memory too."""
    recipe, shape = recipe_of(point), shape_of(point)
    strategy = strategy_of(STRATEGY_PRESETS[point.strategy])
    estimator = Estimator(recipe, parse_hardware(f"{point.processes}x{point.hardware}"), shape, ())
    estimate = estimator.at(strategy, point.checkpointing, point.tokens)  # type: ignore[arg-type]
    planned = estimate.peak.tensor_bytes + estimate.offloaded_bytes
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed says there what it compiled
        found = simulate(
            recipe,
            shape,
            processes=point.processes,
            micro_batches=estimate.micro_batches,
            kernel=estimator.kernels.attention,
        )
    return Compared(point, planned, found.peak_bytes, found.seconds)


def compare_each(settings: list[Point]) -> Iterator[Compared]:
    return each_apart(compare, settings, imports=["benchmarks.planner", "deepspeed"])


def compare_all(count: int) -> None:
    """Prints how planned and simulated peaks lie, for each strategy and in all, and the farthest."""
    began = time.monotonic()
    found = []
    for one in compare_each(list(points(count))):
        found.append(one)
        print(f"{one.ratio:.3f} {one.seconds:5.1f} s  {one.point}", file=sys.stderr, flush=True)
    print(f"planned peak over simulated peak, {count} settings, {time.monotonic() - began:.0f} s\n")
    print(f"{'':<14}{'settings':>9}{'least':>8}{'median':>8}{'most':>8}{'within 5 %':>12}{'> 3 % under':>12}")
    for name in (*STRATEGY_PRESETS, "all"):
        print(_line(name, [one for one in found if name in (one.point.strategy, "all")]))
    buckets = Counter(round(100 * (one.ratio - 1)) for one in found)
    print("\ndifference in %, and how many settings have it")
    for percent in sorted(buckets):
        print(f"  {percent:+4d}  {buckets[percent]:4d}  {'#' * buckets[percent]}")
    print("\nthe farthest")
    for one in sorted(found, key=lambda one: -abs(one.ratio - 1))[:12]:
        print(f"  {one.ratio:.3f}  {one.point}")


def _line(name: str, found: list[Compared]) -> str:
    ratios = [one.ratio for one in found]
    near = sum(abs(ratio - 1) <= 0.05 for ratio in ratios) / len(ratios)
    under = sum(ratio < 0.97 for ratio in ratios)
    spread = f"{min(ratios):>8.3f}{statistics.median(ratios):>8.3f}{max(ratios):>8.3f}"
    return f"{name:<14}{len(ratios):>9}{spread}{near:>12.0%}{under:>12}"
