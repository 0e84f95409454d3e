"""How much ZeRO sends, fetches and keeps whole at once: what a DeepSpeed file says, else as much as there is room for.

The planner's formulas and the engine's configuration both ask here, so that a run is what was planned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

__all__ = ["Buckets", "zero_sizes"]

Buckets = Literal["auto", "large", "small"]

_BUCKET, _AHEAD, _KEPT = 500_000_000, 50_000_000, 1_000_000_000
"""DeepSpeed's own: of what is sent at once, fetched ahead, and kept for the next use."""
_LEAST = 4_000_000
"""Of a bucket: smaller ones wait for a link's latency more than for its bandwidth."""
_PLAIN_LAYER = 12
"""A decoder layer has about so many times the hidden size squared."""
_PERSISTENT_ROWS = 10
"""Parameters of at most so many times the hidden size stay whole: norms and biases. DeepSpeed's own threshold, 100,000
elements, would keep whole layers of a small model, or of a quantized one, on every device."""


def zero_sizes(given: Mapping[str, Any], buckets: Buckets, *, hidden: int, trained: int) -> dict[str, int]:
    """Elements, by DeepSpeed's names. `given` is a file's section `zero_optimization`, whose numbers hold; what it
    leaves out or to "auto" is ours, for a model of size `hidden` with so many `trained` elements.

    `large` buckets are DeepSpeed's own. `small` ones are of hidden × hidden elements, but at least 4 million; as many
    less a tenth are fetched ahead, and about two layers are kept for their next use. Neither is larger than what is
    trained. `auto`, for recipes that no plan has resolved, is `large`.
    """
    small = buckets == "small"
    square = hidden**2
    bucket = min(_BUCKET, max(square, _LEAST)) if small else _BUCKET
    ahead = min(_AHEAD, int(0.9 * square)) if small else _AHEAD
    kept = min(_KEPT, 2 * _PLAIN_LAYER * square) if small else _KEPT
    ours = {
        "reduce_bucket_size": min(bucket, trained),
        "allgather_bucket_size": bucket + bucket % 2,  # DeepSpeed aligns by two elements
        "stage3_prefetch_bucket_size": ahead,
        "stage3_max_live_parameters": kept,
        "stage3_max_reuse_distance": kept,
        "stage3_param_persistence_threshold": _PERSISTENT_ROWS * hidden,
    }
    return {key: int(given[key]) if _is_number(given.get(key)) else value for key, value in ours.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
