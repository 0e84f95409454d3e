"""Which parameters an adapter trains and which it adds, by the rules of `models.adapters`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from understudy.errors import UserError
from understudy.plan.shape.adapted import Around
from understudy.plan.shape.model import ModelShape
from understudy.plan.shape.tape import Module
from understudy.recipe.adapters import IA3, Adapter, Freeze, LlamaAdapter, LoRA, PeftAdapter, PromptTuning, VeRA

__all__ = ["Adaptation", "Added", "adapt"]

_ALL_LINEAR = "all-linear"
_LINEAR = ("linear", "transposed")
_DEFAULT_LAYERS = 2
"""The last so many are trained where `freeze` says neither layers nor parameters."""
_IA3_TARGETS = {
    "llama": ("k_proj", "v_proj", "down_proj"),
    "mistral": ("k_proj", "v_proj", "down_proj"),
    "gpt2": ("c_attn", "mlp.c_proj"),
    "opt": ("q_proj", "k_proj", "fc2"),
    "gpt_neox": ("query_key_value", "dense_4h_to_h"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), ("q_proj", "v_proj", "down_proj")),
}
"""peft's choice for an architecture (`TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING`)."""
_FEED_FORWARD = ("down_proj", "mlp.c_proj", "fc2", "dense_4h_to_h")
"""Of these, IA3 scales what they take in."""


@dataclass(frozen=True)
class Added:
    """What is put around one linear layer."""

    kind: Around
    shapes: tuple[tuple[int, ...], ...]
    """Of what is trained of it."""


@dataclass
class Adaptation:
    trains: Callable[[str], bool]
    """Whether a parameter of the model itself is trained, by its whole name."""
    around: Callable[[int, str, Module], Added | None] = lambda number, path, module: None
    """By number of the layer, whole path and module."""
    inside: Callable[[int], Sequence[tuple[int, ...]]] = lambda number: ()
    """What a layer has besides, by its number."""
    prompts: Callable[[int], int] = lambda number: 0
    """Learned vectors that a layer attends to, by its number."""
    outside: list[tuple[int, ...]] = field(default_factory=list)
    shared: int = 0
    prompt: int = 0


def adapt(shape: ModelShape, adapter: Adapter | None) -> Adaptation:
    """Raises `UserError` where the adapter fits nothing of the model."""
    if adapter is None:
        return Adaptation(lambda name: True)
    if isinstance(adapter, Freeze):
        return _freeze(shape, adapter)
    if adapter.path is not None:
        adapter = _settled(adapter)
    if isinstance(adapter, PromptTuning):
        size = (adapter.tokens, shape.sizes.hidden)
        return Adaptation(lambda name: False, outside=[size], prompt=adapter.tokens)
    if isinstance(adapter, LlamaAdapter):
        return _llama_adapter(shape, adapter)
    assert isinstance(adapter, LoRA | IA3 | VeRA), "what is left"
    return _around_linears(shape, adapter)


def _freeze(shape: ModelShape, adapter: Freeze) -> Adaptation:
    last = adapter.last_layers or (_DEFAULT_LAYERS if adapter.parameters is None else 0)
    if last > shape.sizes.layers:
        raise UserError(
            f"the last {last} layers are to be trained (`adapter.last_layers`), and the model has "
            f"{shape.sizes.layers}.",
            key="adapter.last_layers",
        )
    expressions = [_compiled(text, "adapter.parameters") for text in adapter.parameters or ()]
    names = [weight.name for weight in shape.parameters()]
    for expression in expressions:
        if not any(expression.search(name) for name in names):
            raise UserError(
                f"`adapter.parameters` names {expression.pattern}, which no parameter's name has in it; there are "
                f"{', '.join(names[:3])} and {len(names) - 3} more.",
                key="adapter.parameters",
            )
    trained = tuple(shape.prefix(number) for number in range(shape.sizes.layers - last, shape.sizes.layers))
    return Adaptation(lambda name: name.startswith(trained) or any(one.search(name) for one in expressions))


def _llama_adapter(shape: ModelShape, adapter: LlamaAdapter) -> Adaptation:
    layers = shape.sizes.layers
    adapted = max(1, layers - 2) if adapter.adapted_layers is None else adapter.adapted_layers
    if adapted > layers:
        raise UserError(
            f"`adapter.adapted_layers` is {adapted}, and the model has {layers} layers.", key="adapter.adapted_layers"
        )
    extra = ((1, adapter.tokens, shape.sizes.hidden), (1,))
    return Adaptation(
        lambda name: False,
        inside=lambda number: extra if number >= layers - adapted else (),
        prompts=lambda number: adapter.tokens if number >= layers - adapted else 0,
    )


def _around_linears(shape: ModelShape, adapter: LoRA | IA3 | VeRA) -> Adaptation:
    targets = adapter.targets
    if targets is None:
        targets = _IA3_TARGETS.get(shape.sizes.model_type)
        if targets is None:
            raise UserError(
                f"peft has no choice of modules for IA3 on {shape.sizes.model_type}; name them with `adapter.targets`.",
                key="adapter.targets",
            )
    layers = None if isinstance(adapter, IA3) else adapter.layers
    fits = _fitting(targets)
    linear = [
        (number, shape.prefix(number) + module.path, module)
        for number, modules in enumerate(shape.layer_modules)
        for module in modules
        if module.kind in _LINEAR
    ]
    chosen = {path: module for number, path, module in linear if fits(path) and (layers is None or number in layers)}
    if not chosen:
        names = sorted({path.rpartition(".")[2] for _, path, _ in linear})
        raise UserError(
            f"`adapter.targets` names {targets if isinstance(targets, str) else ', '.join(targets)}, which no linear "
            f"layer of this {shape.sizes.model_type} model has; they are {', '.join(names)}.",
            key="adapter.targets",
        )
    parts = {"embeddings": "embedding", "head": "head"}
    whole = {parts[part] for part in adapter.train} if isinstance(adapter, LoRA) else set()
    if whole and shape.sizes.tied:
        whole = {"embedding"}
    trained = {weight.name for weight in shape.outside if weight.role in whole and "norm" not in weight.name}
    shared = 0
    if isinstance(adapter, VeRA):
        widest = max(module.inputs for module in chosen.values()), max(module.outputs for module in chosen.values())
        shared = adapter.rank * sum(widest)
    return Adaptation(
        lambda name: name in trained,
        around=lambda number, path, module: _added(adapter, path, module) if path in chosen else None,
        shared=shared,
    )


def _added(adapter: LoRA | IA3 | VeRA, path: str, module: Module) -> Added:
    if isinstance(adapter, IA3):
        feed_forward = path.endswith(_FEED_FORWARD)
        kind = Around("ia3_input" if feed_forward else "ia3_output")
        return Added(kind, ((1, module.inputs) if feed_forward else (module.outputs, 1),))
    if isinstance(adapter, VeRA):
        return Added(Around("vera", adapter.rank, adapter.dropout), ((module.outputs,), (adapter.rank,)))
    shapes: tuple[tuple[int, ...], ...] = ((adapter.rank, module.inputs), (module.outputs, adapter.rank))
    if adapter.kind == "dora":
        shapes += ((module.outputs,),)
    return Added(Around(adapter.kind, adapter.rank, adapter.dropout), shapes)


def _fitting(targets: Sequence[str] | str) -> Callable[[str], bool]:
    """Whether a module's whole path is named."""
    if targets == _ALL_LINEAR:
        return lambda path: True
    if isinstance(targets, str):
        expression = _compiled(targets, "adapter.targets")
        return lambda path: expression.fullmatch(path) is not None
    return lambda path: any(path == name or path.endswith(f".{name}") for name in targets)


def _settled(adapter: PeftAdapter) -> Any:
    """`adapter` with what the one in its `path` has settled."""
    assert adapter.path is not None, "asked of one that exists"
    file = Path(adapter.path).expanduser() / "adapter_config.json"
    try:
        stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"the adapter cannot be read ({error}); name a directory that a run or peft saved.",
            file=file,
            key="adapter.path",
        ) from None
    names = {
        "rank": "r",
        "targets": "target_modules",
        "layers": "layers_to_transform",
        "tokens": "num_virtual_tokens" if isinstance(adapter, PromptTuning) else "adapter_len",
        "adapted_layers": "adapter_layers",
    }
    known = {
        name: tuple(stored[own]) if isinstance(stored[own], list) else stored[own]
        for name, own in names.items()
        if name in type(adapter).model_fields and stored.get(own) is not None
    }
    return adapter.model_copy(update=known)


def _compiled(expression: str, key: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise UserError(f"`{key}` is {expression!r:.60}, which is no regular expression ({error}).", key=key) from None
