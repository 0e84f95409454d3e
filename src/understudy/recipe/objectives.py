"""What a recipe may say about the loss: next-token cross-entropy, or a teacher's distributions. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from understudy.recipe.section import Count, Fraction, Section
from understudy.recipe.teachers import OneTeacher, SeveralTeachers, Teacher, expand_teacher

__all__ = ["CausalLM", "Distillation", "HiddenStates", "Objective", "OnPolicy"]

Weight = Annotated[float, Field(gt=0.0, le=1000.0)]
LayerNumber = Annotated[int, Field(ge=0, lt=2**31)]


class CausalLM(Section):
    kind: Literal["causal_lm"] = "causal_lm"
    """Next-token cross-entropy."""


class HiddenStates(Section):
    """Hold the student's hidden states to the teacher's, beside the divergence."""

    loss: Literal["mse", "cosine"] = "mse"
    """Mean squared difference over the width, or one minus the cosine."""
    weight: Weight = 1.0
    """Factor on it; it is a mean over pairs of layers."""
    layers: (
        Annotated[
            tuple[Annotated[tuple[LayerNumber, LayerNumber], Field(strict=False)], ...],
            Field(min_length=1, strict=False),
        ]
        | Literal["last", "uniform"]
    ) = "uniform"
    """Pairs of a student's and a teacher's, from 0; the last of both; or the student's, spread over the teacher's."""


class OnPolicy(Section):
    """How a student answers when it is to learn from its own answers."""

    temperature: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0
    """Of sampling; the distillation's own is another."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Draw from the likeliest tokens whose probabilities sum to this."""
    max_new_tokens: Count = 128
    """Longest answer."""
    endpoint: str | None = None
    """Base address of an OpenAI-compatible server that serves the student, in place of generating here."""
    model: str | None = None
    """The name under which it does; `model.path` when left out."""
    timeout: Annotated[float, Field(gt=0.0, le=86_400.0)] = 300.0
    """Seconds until a request to it counts as lost."""
    retries: Annotated[int, Field(ge=0, le=1000)] = 5
    """How often a request that failed is made again, each time after a longer wait."""


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
        "uld",
    ] = "forward_kl"
    """Between the teacher's distribution p and the student's q; `uld` takes a teacher with another tokenizer."""
    temperature: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0
    """Of both distributions; the divergence is multiplied by its square."""
    cross_entropy_weight: Fraction = 0.0
    """Share w of next-token cross-entropy: (1 − w)·τ²·divergence + w·cross-entropy."""
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Of `jsd`: the share of the teacher in the mixture."""
    alpha: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Of the skewed divergences: how much of the other distribution is mixed in."""
    hidden_states: HiddenStates | None = None
    """Match hidden states too."""
    on_policy_fraction: Fraction = 0.0
    """Share of the steps that train on the student's own answers."""
    on_policy: OnPolicy = OnPolicy()
    """How it answers in these."""

    @property
    def teachers(self) -> tuple[OneTeacher, ...]:
        """Each of them, one where there are not several."""
        return self.teacher.teachers if isinstance(self.teacher, SeveralTeachers) else (self.teacher,)


Objective = Annotated[CausalLM | Distillation, Field(discriminator="kind")]
