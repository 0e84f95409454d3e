"""What a recipe may say about the loss: next-token cross-entropy, or a teacher's distributions. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from understudy.recipe.section import Count, Fraction, Section

__all__ = [
    "BaseTeacher",
    "CachedTeacher",
    "CausalLM",
    "Distillation",
    "Objective",
    "ResidentTeacher",
    "ShardedTeacher",
    "Teacher",
]

Weight = Annotated[float, Field(gt=0.0, le=1000.0)]


class CausalLM(Section):
    kind: Literal["causal_lm"] = "causal_lm"
    """Next-token cross-entropy."""


class ModelTeacher(Section):
    """A teacher that is a model of its own."""

    path: str
    """Hub id or directory of the teacher; one that is stored quantized is taken as it is."""
    revision: str | None = None
    """Hub branch, tag or commit."""


class ResidentTeacher(ModelTeacher):
    kind: Literal["resident"] = "resident"
    """The whole teacher in each process."""


class ShardedTeacher(ModelTeacher):
    kind: Literal["sharded"] = "sharded"
    """The teacher's layers shared out over the processes (FSDP2), its embedding and head in each."""


class BaseTeacher(Section):
    kind: Literal["base"] = "base"
    """The student's own base, without its adapter."""


class CachedTeacher(ModelTeacher):
    kind: Literal["cache"] = "cache"
    """What the teacher said, from the disk: `understudy teacher cache` writes it."""
    targets: Literal["top_k", "samples", "hidden"] = "top_k"
    """The likeliest tokens and what is left, tokens drawn at random, or the last hidden states."""
    k: Count | None = None
    """Tokens kept a position: 64 of `top_k`, 12 of `samples`."""

    @property
    def kept(self) -> int:
        """Tokens a position."""
        return self.k or {"top_k": 64, "samples": 12}[self.targets]


Teacher = Annotated[ResidentTeacher | ShardedTeacher | BaseTeacher | CachedTeacher, Field(discriminator="kind")]


def expand_teacher(value: object) -> object:
    """`base` becomes `{kind: base}`."""
    return {"kind": value} if isinstance(value, str) else value


class Distillation(Section):
    kind: Literal["distillation"] = "distillation"
    """A teacher's distribution over the vocabulary at each supervised token."""
    teacher: Annotated[Teacher, BeforeValidator(expand_teacher)]
    """Who teaches."""
    divergence: Literal[
        "forward_kl",
        "reverse_kl",
        "jsd",
        "skew_forward_kl",
        "skew_reverse_kl",
        "total_variation",
        "adaptive_kl",
    ] = "forward_kl"
    """Between the teacher's distribution p and the student's q: KL(p‖q), KL(q‖p) and others."""
    temperature: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0
    """Of both distributions; the divergence is multiplied by its square."""
    cross_entropy_weight: Fraction = 0.0
    """Share w of next-token cross-entropy: (1 − w)·τ²·divergence + w·cross-entropy."""
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Of `jsd`: the share of the teacher in the mixture."""
    alpha: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Of the skewed divergences: how much of the other distribution is mixed in."""


Objective = Annotated[CausalLM | Distillation, Field(discriminator="kind")]
