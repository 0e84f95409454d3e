"""The sizes of a model, read from its configuration under whatever names its architecture gives them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from understudy.errors import UserError
from understudy.plan.shape.families import FAMILIES, Family

__all__ = ["Sizes", "read_sizes"]

_LARGEST = 2**40


@dataclass(frozen=True)
class Sizes:
    model_type: str
    family: Family
    config: dict[str, Any]
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    """Width of the feed-forward part, of an expert where it has some."""
    dense_inner: int
    """The same of layers without experts, in a model whose others have them."""
    positions: int
    """Rows of learned positions; 0 where it learns none."""
    experts: int
    experts_per_token: int
    dense_layers: frozenset[int]
    """Of a mixture of experts, the layers that have none."""
    windows: tuple[int | None, ...]
    """Of each layer: tokens that attention sees; None is all."""
    tied: bool
    activation: str

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def dropout(self, where: tuple[str, float] | None) -> float:
        if where is None:
            return 0.0
        value = self.config.get(where[0])
        return where[1] if not isinstance(value, int | float) else float(value)


def read_sizes(config: dict[str, Any], *, teacher: str | None = None) -> Sizes:
    """Raises `UserError` for an architecture that is not known, and for a configuration without its sizes. `teacher` is
    the path of the teacher that `config` is of; the student's when None."""
    model_type = config.get("model_type")
    if model_type is None and teacher is None:
        raise UserError("the model's configuration names no model_type; set model.config.model_type, such as llama.")
    if model_type is None:
        raise UserError(f"the teacher's configuration ({teacher}) names no model_type; correct it, or name another.")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UserError(f"the planner does not know the architecture {model_type!r:.60}; {_suggestion(model_type)}")
    read = _Reader(config, family, teacher)
    hidden, heads, layers = (read.size(name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    if hidden % heads and family.head_dim is None and not config.get("head_dim"):
        raise UserError(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}; correct one of them.")
    if heads % (read.optional("num_key_value_heads") or heads):
        raise UserError(
            f"num_attention_heads {heads} is no multiple of num_key_value_heads "
            f"{read.optional('num_key_value_heads')}; correct one of them."
        )
    head_dim = read.optional("head_dim") or family.head_dim or hidden // heads
    experts = family.mlp == "experts"
    dense_inner = read.optional("intermediate_size") or family.inner_factor * hidden
    inner = read.size(family.expert_width_field) if experts else dense_inner or read.size("intermediate_size")
    tied = config.get("tie_word_embeddings")
    return Sizes(
        model_type=str(model_type),
        family=family,
        config=config,
        vocabulary=read.size("vocab_size"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=read.optional("num_key_value_heads") or _kv_heads(family, heads),
        head_dim=head_dim,
        inner=inner,
        dense_inner=dense_inner,
        positions=read.size("max_position_embeddings") + family.extra_positions if family.positions else 0,
        experts=(read.optional("num_experts") or read.size("num_local_experts")) if experts else 0,
        experts_per_token=read.size("num_experts_per_tok") if experts else 0,
        dense_layers=_dense_layers(config, layers) if experts else frozenset(),
        windows=_windows(config, family, layers),
        tied=family.tied if tied is None else bool(tied),
        activation=str(config.get(family.activation_field) or family.activation),
    )


class _Reader:
    def __init__(self, config: dict[str, Any], family: Family, teacher: str | None) -> None:
        self._config, self._family, self._teacher = config, family, teacher

    def optional(self, name: str) -> int | None:
        own = self._family.fields.get(name, name)
        value = self._config.get(own, self._config.get(name))
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _LARGEST:
            whose = "model" if self._teacher is None else "teacher"
            raise UserError(f"{own} of the {whose}'s configuration is {value!r:.60}, which is no size; correct it.")
        return value

    def size(self, name: str) -> int:
        value = self.optional(name)
        if value is None:
            own = self._family.fields.get(name, name)
            if self._teacher is not None:
                raise UserError(
                    f"the teacher's configuration ({self._teacher}) does not say its {own}, and without it nothing can "
                    "be planned; complete it, or name another teacher."
                )
            raise UserError(
                f"the model's configuration does not say its {own}, and without it nothing can be planned; set "
                f"model.config.{own}, or name a model in model.path."
            )
        return value


def _kv_heads(family: Family, heads: int) -> int:
    # A default that does not divide the heads is of another size of model, and transformers would refuse it.
    return family.kv_heads if family.kv_heads and heads % family.kv_heads == 0 else heads


def _dense_layers(config: dict[str, Any], layers: int) -> frozenset[int]:
    listed = config.get("mlp_only_layers") or ()
    step = config.get("decoder_sparse_step") or 1
    if not isinstance(step, int) or not isinstance(listed, list | tuple):
        return frozenset()
    return frozenset(i for i in range(layers) if i in listed or (i + 1) % step)


def _windows(config: dict[str, Any], family: Family, layers: int) -> tuple[int | None, ...]:
    named = "sliding_window" in config
    window = config.get("sliding_window") if named else family.window
    if family.windows == "none" or not isinstance(window, int) or window <= 0:
        return (None,) * layers
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == layers:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return tuple(window if _slides(config, family, number) else None for number in range(layers))


def _slides(config: dict[str, Any], family: Family, number: int) -> bool:
    if family.windows == "flagged":
        return bool(config.get("use_sliding_window")) and number >= int(config.get("max_window_layers", 28))
    if family.windows == "alternate":
        return number % 2 == 0
    if family.windows == "by_pattern":
        given = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern")
        pattern = given if isinstance(given, int) and given > 0 else family.window_pattern
        return (number + 1) % pattern != 0
    return True


def _suggestion(model_type: object) -> str:
    near = difflib.get_close_matches(str(model_type), FAMILIES, n=1)
    return f"did you mean {near[0]}?" if near else f"it knows {', '.join(sorted(FAMILIES))}."
