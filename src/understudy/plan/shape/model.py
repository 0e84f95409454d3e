"""All parameters of a model from its configuration alone, under the names that transformers gives them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from understudy.errors import UserError
from understudy.plan.shape.layer import norm, trace_layer
from understudy.plan.shape.sizes import Sizes, read_sizes
from understudy.plan.shape.tape import Module, Tape, Weight

__all__ = ["ModelShape", "model_shape"]


@dataclass(frozen=True)
class ModelShape:
    sizes: Sizes
    outside: tuple[Weight, ...]
    """Embeddings, last norm and head, by their whole names; a tied head is its embedding."""

    @cached_property
    def layer_modules(self) -> tuple[tuple[Module, ...], ...]:
        """Of each layer, under names inside it."""
        kinds: dict[bool, tuple[Module, ...]] = {}
        for number in range(self.sizes.layers):
            dense = number in self.sizes.dense_layers
            if dense not in kinds:
                kinds[dense] = tuple(trace_layer(self.sizes, number).modules)
        return tuple(kinds[number in self.sizes.dense_layers] for number in range(self.sizes.layers))

    def prefix(self, number: int) -> str:
        """Of what is in layer `number`."""
        return f"{self.sizes.family.root}.{self.sizes.family.layers}.{number}."

    def parameters(self) -> Iterator[Weight]:
        """Each once, by its whole name."""
        yield from self.outside
        for number, modules in enumerate(self.layer_modules):
            for module in modules:
                for weight in module.weights:
                    yield Weight(self.prefix(number) + weight.name, weight.shape, weight.role)

    @cached_property
    def count(self) -> int:
        """Parameters in all."""
        return sum(weight.numel for weight in self.parameters())

    @cached_property
    def by_component(self) -> dict[str, int]:
        """Parameters of embedding, attention, mlp, experts, norm and head; a tied head has none of its own."""
        counts = dict.fromkeys(("embedding", "attention", "mlp", "experts", "norm", "head"), 0)
        for weight in self.parameters():
            counts[weight.role] += weight.numel
        return counts


def model_shape(config: dict[str, Any], *, teacher: str | None = None) -> ModelShape:
    """From what config.json says, with a recipe's overrides in it. `teacher` is its path, of a teacher. Raises
    `UserError` for what is not known."""
    sizes = read_sizes(config, teacher=teacher)
    family = sizes.family
    if config.get("word_embed_proj_dim", sizes.hidden) != sizes.hidden or config.get("do_layer_norm_before") is False:
        raise UserError(
            f"the planner does not know {sizes.model_type} models that project their embeddings or normalize after "
            "each part; choose another model."
        )
    root = f"{family.root}."
    outside = [Weight(f"{root}{family.embedding}.weight", (sizes.vocabulary, sizes.hidden), "embedding")]
    if family.positions:
        outside.append(Weight(f"{root}{family.positions}.weight", (sizes.positions, sizes.hidden), "embedding"))
    tape = Tape()
    norm(tape, sizes, tape.input(sizes.hidden), f"{root}{family.last_norm}", (sizes.hidden,))
    outside += [weight for module in tape.modules for weight in module.weights]
    if not sizes.tied:
        outside.append(Weight(f"{family.head}.weight", (sizes.vocabulary, sizes.hidden), "head"))
    return ModelShape(sizes, tuple(outside))
