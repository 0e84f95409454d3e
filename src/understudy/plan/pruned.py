"""The configuration of a student that is cut from a model, from what the recipe says to keep."""

from __future__ import annotations

from typing import Any

from understudy.errors import UserError
from understudy.plan.shape.sizes import read_sizes
from understudy.recipe.schema import Model

__all__ = ["student_config"]


def student_config(config: dict[str, Any], model: Model) -> dict[str, Any]:
    """`config` as it is, and with `init: pruned` with the sizes of what is kept. Heads keep their size. Raises
    `UserError` where more is to be kept than there is."""
    if model.init != "pruned":
        return config
    sizes = read_sizes(config)
    names = sizes.family.fields
    cut = dict(config)
    count = len(model.layers) if isinstance(model.layers, tuple) else model.keep_layers
    kept = {
        "num_hidden_layers": (count, sizes.layers, "keep_layers"),
        "num_attention_heads": (model.keep_heads, sizes.heads, "keep_heads"),
        "intermediate_size": (model.intermediate_size, sizes.inner, "intermediate_size"),
        "hidden_size": (model.hidden_size, sizes.hidden, "hidden_size"),
    }
    for name, (keep, there, key) in kept.items():
        if keep is None:
            continue
        if keep > there:
            raise UserError(f"`model.{key}` is {keep}, and the model has {there}.", key=f"model.{key}")
        cut[names.get(name, name)] = keep
    if model.keep_heads is not None:
        cut["num_key_value_heads"] = max(1, sizes.kv_heads * model.keep_heads // sizes.heads)
    if model.keep_heads is not None or model.hidden_size is not None:
        cut["head_dim"] = sizes.head_dim
    for name, value in config.items():  # what layers are like may follow from their numbers
        if "layer" in name and isinstance(value, list) and len(value) == sizes.layers and count is not None:
            numbers = model.layers if isinstance(model.layers, tuple) else range(count)
            cut[name] = [value[number] for number in numbers if number < len(value)]
    return cut
