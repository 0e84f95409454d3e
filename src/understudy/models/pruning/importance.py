"""How much each part of a model contributes, measured by running it over a few documents without gradient.

Widths by the mean magnitude of activations (Muralidharan et al., 2024, "Compact language models via pruning and
knowledge distillation", section 2.2), layers by how far they turn the hidden states (Men et al., 2024, "ShortGPT",
eq. 1). It runs on the CPU in fp32, so that the same is measured on every machine as far as its arithmetic allows.

Shape letters: L layers, Q query heads, I feed-forward channels, H hidden width, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from understudy.contracts import IGNORED, Batch
from understudy.errors import UserError
from understudy.models.build import open_weights
from understudy.models.pruning.structure import Axes, Structure

__all__ = ["Importance", "Measured", "measure", "read_importance", "write_importance"]

Measured = Literal["layers", "heads", "channels", "width"]
_FILE = "importance.safetensors"


@dataclass(frozen=True)
class Importance:
    """Scores in fp64, higher where more would be lost; None where not asked for."""

    layers: Tensor | None = None
    """[L] 1 − the mean cosine between what goes into a layer and what comes out."""
    heads: Tensor | None = None
    """[L, Q] mean Euclidean norm of a head's output."""
    channels: Tensor | None = None
    """[L, I] mean magnitude of what goes into the projection back to the hidden states."""
    width: Tensor | None = None
    """[L + 1, H] mean magnitude of the normalized states that attention and feed-forward read, both added, by layer;
    last those that the head reads."""


def measure(structure: Structure, documents: Sequence[Tensor], asked: Sequence[Measured]) -> Importance:
    """What `asked` names, over all tokens of `documents`, each [T] int64. Takes the model in fp32 in host memory.

    Raises `UserError` where the model cannot be cut so, or gives numbers that are not finite.
    """
    model = structure.model.eval()
    read = open_weights(structure.directory, model)
    weights = {f"network.{name}": read(name)[:].float() for name, _ in model.network.named_parameters()}
    sums: dict[Measured, Tensor] = {}
    with torch.no_grad(), ExitStack() as stack:
        for kind in asked:
            stack.enter_context(_WATCHING[kind](structure, sums))
        for tokens in documents:
            batch = Batch.of([(tokens, torch.full_like(tokens, IGNORED))])
            functional_call(model, weights, (batch,), {"logits_at": torch.zeros(1, dtype=torch.int64)})
    count = sum(len(tokens) for tokens in documents)
    scores = {kind: total / count for kind, total in sums.items()}
    if not all(score.isfinite().all() for score in scores.values()):
        raise UserError(
            f"{structure.directory} computes numbers that are not finite from the training data; get the model again."
        )
    return Importance(**scores)


def write_importance(directory: Path, importance: Importance) -> None:
    """Writes the scores to `directory`."""
    scores = {name: score for name, score in vars(importance).items() if score is not None}
    save_file(scores, directory / _FILE, {"format": "pt"})


def read_importance(directory: Path) -> Importance:
    """The scores that `write_importance` wrote to `directory`."""
    return Importance(**load_file(directory / _FILE))


Watching = Callable[[Structure, dict[Measured, Tensor]], Any]


@contextmanager
def _watching_layers(structure: Structure, sums: dict[Measured, Tensor]) -> Iterator[None]:
    total = sums["layers"] = torch.zeros(structure.layers, dtype=torch.float64)

    def add(layer: int, before: Tensor, after: Tensor) -> None:
        cosine = F.cosine_similarity(before.double(), after.double(), dim=-1)
        total[layer] += (1 - cosine).sum()

    def hook(layer: int) -> Callable[..., None]:
        def called(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            add(layer, before, output[0] if isinstance(output, tuple) else output)

        return called

    with ExitStack() as stack:
        for layer, module in enumerate(structure.model.decoder_layers()):
            stack.callback(module.register_forward_hook(hook(layer), with_kwargs=True).remove)
        yield


@contextmanager
def _watching_heads(structure: Structure, sums: dict[Measured, Tensor]) -> Iterator[None]:
    heads = structure.heads
    total = sums["heads"] = torch.zeros(structure.layers, heads, dtype=torch.float64)

    def add(layer: int, read: Tensor) -> None:
        total[layer] += read.double().reshape(-1, heads, structure.head_size).norm(dim=-1).sum(dim=0)

    with _reading(structure, _readers(structure, structure.head_axes), add):
        yield


@contextmanager
def _watching_channels(structure: Structure, sums: dict[Measured, Tensor]) -> Iterator[None]:
    total = sums["channels"] = torch.zeros(structure.layers, structure.channels, dtype=torch.float64)

    def add(layer: int, read: Tensor) -> None:
        total[layer] += _magnitude(read)

    with _reading(structure, _readers(structure, structure.channel_axes), add):
        yield


@contextmanager
def _watching_width(structure: Structure, sums: dict[Measured, Tensor]) -> Iterator[None]:
    total = sums["width"] = torch.zeros(structure.layers + 1, structure.width, dtype=torch.float64)

    def add(layer: int, read: Tensor) -> None:
        total[layer] += _magnitude(read)

    def final(_: nn.Module, args: Any, output: Any) -> None:
        total[-1] += _magnitude(output.last_hidden_state)

    # Queries, keys and values read the same, and so do gate and up: one of each counts.
    readers = {name.rpartition(".")[0]: name for name in reversed(_readers(structure, structure.width_axes))}
    handle = structure.model.network.base_model.register_forward_hook(final)
    try:
        with _reading(structure, list(readers.values()), add):
            yield
    finally:
        handle.remove()


_WATCHING: dict[Measured, Watching] = {
    "layers": _watching_layers,
    "heads": _watching_heads,
    "channels": _watching_channels,
    "width": _watching_width,
}


def _readers(structure: Structure, axes: Axes) -> list[str]:
    """The linear layers, inside decoder layers, whose input has one of `axes`."""
    return [
        name.removesuffix(".weight")
        for name, dimensions in axes.items()
        if 1 in dimensions and structure.layer_of(name) is not None
    ]


@contextmanager
def _reading(structure: Structure, names: Sequence[str], add: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Inside, `add` is given what each of the linear layers `names` reads, and the number of its decoder layer."""

    def hook(layer: int) -> Callable[..., None]:
        return lambda _, args: add(layer, args[0])

    with ExitStack() as stack:
        for name in names:
            layer = structure.layer_of(name)
            assert layer is not None
            module = structure.model.network.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(hook(layer)).remove)
        yield


def _magnitude(states: Tensor) -> Tensor:
    return states.double().abs().reshape(-1, states.shape[-1]).sum(dim=0)
