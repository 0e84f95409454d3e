"""What a recipe may say about training a part of a model, or small modules beside it: one class a kind. Imports no
torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from understudy.recipe.section import Count, Decay, Section

__all__ = ["IA3", "RESIDUAL", "Adapter", "Freeze", "LlamaAdapter", "LoRA", "PeftAdapter", "PromptTuning", "VeRA"]

RESIDUAL = ("pissa", "olora")
"""Beginnings of LoRA that take a part out of each weight."""

Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1, strict=False)]
LayerNumbers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, strict=False)]


class PeftAdapter(Section):
    """What all adapters made with peft have in common."""

    path: str | None = None
    """Adapter directory to go on training; it decides what is left out here."""


class TargetedAdapter(PeftAdapter):
    """What adapters of single modules have in common."""

    layers: LayerNumbers | None = None
    """Numbers of the decoder layers to adapt, from 0; all of them when left out."""


class LoRA(TargetedAdapter):
    kind: Literal["lora", "dora"] = "lora"
    """`dora` learns magnitude and direction of weights apart (Liu et al., 2024)."""
    targets: Names | str = "all-linear"
    """Modules to adapt: `all-linear`, a list of names, or a regular expression for whole module paths."""
    rank: Count = 16
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0.0)] = 32
    """The update is scaled by alpha / rank."""
    dropout: Decay = 0.0
    """Of the adapters' inputs, while training."""
    rank_stabilized: bool = False
    """Scale by alpha / √rank instead (rsLoRA)."""
    init: Literal["default", "gaussian", "pissa", "olora"] = "default"
    """Initial values. `pissa` and `olora` begin with the main directions of each weight, and train what is left."""
    train: Annotated[tuple[Literal["embeddings", "head"], ...], Field(strict=False)] = ()
    """Parts of the model that are trained whole beside the adapter."""


class IA3(PeftAdapter):
    kind: Literal["ia3"] = "ia3"
    """Learned factors on keys, values and feed-forward activations (Liu et al., 2022)."""
    targets: Names | str | None = None
    """As of lora; peft's choice for the architecture when left out."""


class VeRA(TargetedAdapter):
    kind: Literal["vera"] = "vera"
    """Learned scales of shared random projections (Kopiczko et al., 2024)."""
    targets: Names | str = "all-linear"
    """As of lora."""
    rank: Count = 256
    """Rank of the shared projections."""
    dropout: Decay = 0.0
    """Of the adapters' inputs, while training."""


class LlamaAdapter(PeftAdapter):
    kind: Literal["llama_adapter"] = "llama_adapter"
    """Learned prompts that the upper layers attend to through a gate (Zhang et al., 2023)."""
    tokens: Count = 10
    """Length of each layer's prompt."""
    adapted_layers: Count | None = None
    """How many layers, from the top, have one; all but two when left out."""


class PromptTuning(PeftAdapter):
    kind: Literal["prompt_tuning"] = "prompt_tuning"
    """Learned vectors in front of each example (Lester et al., 2021)."""
    tokens: Count = 20
    """How many."""


class Freeze(Section):
    kind: Literal["freeze"] = "freeze"
    """Trains a part of the model's own parameters, and leaves the others as they are."""
    last_layers: Count | None = None
    """Train the last so many decoder layers; 2 where `parameters` is left out too."""
    parameters: Names | None = None
    """Train the parameters whose names one of these regular expressions is found in."""


Adapter = Annotated[
    LoRA | IA3 | VeRA | LlamaAdapter | PromptTuning | Freeze,
    Field(discriminator="kind"),
]
