"""Who teaches in a distillation: sections of a recipe. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from understudy.recipe.quantization import Quantization
from understudy.recipe.section import Count, Section

__all__ = [
    "BaseTeacher",
    "CachedTeacher",
    "LocalTeacher",
    "OneTeacher",
    "ResidentTeacher",
    "ServerTeacher",
    "SeveralTeachers",
    "ShardedTeacher",
    "Teacher",
]


class NamedTeacher(Section):
    """A teacher that is a model of its own."""

    path: str
    """Hub id or directory of the teacher; one that is stored quantized is taken as it is."""
    revision: str | None = None
    """Hub branch, tag or commit."""


class LocalTeacher(NamedTeacher):
    """One that these processes run."""

    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """What it computes in; the run's own when `auto`."""


class ResidentTeacher(LocalTeacher):
    kind: Literal["resident"] = "resident"
    """The whole teacher in each process."""
    quantization: Quantization | None = None
    """Store its decoder layers in fewer bits."""
    device: Literal["own", "host", "other"] = "own"
    """Its process's, the host's processor and memory, or one for itself: `other` needs two devices a process."""


class ShardedTeacher(LocalTeacher):
    kind: Literal["sharded"] = "sharded"
    """The teacher's layers shared out over the processes (FSDP2), its embedding and head in each."""


class BaseTeacher(Section):
    kind: Literal["base"] = "base"
    """The student's own base, without its adapter."""


class CachedTeacher(LocalTeacher):
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


class ServerTeacher(NamedTeacher):
    kind: Literal["server"] = "server"
    """A server that gives log-probabilities of prompts, as vLLM's does; the model at `path` is only to read like it."""
    endpoints: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1, strict=False)]
    """Their base addresses, such as http://127.0.0.1:8000/v1; requests go to all in turn."""
    model: str | None = None
    """The name under which it is served; `path` when left out."""
    k: Count = 20
    """Likeliest tokens asked for a position; a server has a limit of its own."""
    timeout: Annotated[float, Field(gt=0.0, le=86_400.0)] = 60.0
    """Seconds until a request counts as lost."""
    retries: Annotated[int, Field(ge=0, le=1000)] = 5
    """How often a request that failed is made again, each time after a longer wait."""


def expand_teacher(value: object) -> object:
    """`base` becomes `{kind: base}`."""
    return {"kind": value} if isinstance(value, str) else value


OneTeacher = Annotated[
    ResidentTeacher | ShardedTeacher | BaseTeacher | CachedTeacher | ServerTeacher, Field(discriminator="kind")
]


class SeveralTeachers(Section):
    kind: Literal["several"] = "several"
    """Several teachers; the divergence is a weighted mean of those from each."""
    teachers: Annotated[
        tuple[Annotated[OneTeacher, BeforeValidator(expand_teacher)], ...], Field(min_length=2, strict=False)
    ]
    """Who teaches."""
    weights: Annotated[tuple[Annotated[float, Field(gt=0.0)], ...], Field(strict=False)] | None = None
    """How much each counts, in proportion; all the same when left out."""

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights, scaled to add up to 1."""
        weights = self.weights or (1.0,) * len(self.teachers)
        return tuple(weight / sum(weights) for weight in weights)


Teacher = Annotated[
    ResidentTeacher | ShardedTeacher | BaseTeacher | CachedTeacher | ServerTeacher | SeveralTeachers,
    Field(discriminator="kind"),
]
