"""A small training problem that every strategy must solve alike, and its solution by transformers in fp64.

Global batches have documents of uneven length, half of their labels masked; they are split into micro-batches so that
ranks hold different amounts, some hold none, and steps differ in their number of micro-batches.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.divergence_formulas import formula, universal_distance
from understudy.contracts import IGNORED, Batch
from understudy.models.layer_maps import first_map
from understudy.models.names import map_name

VOCABULARY = 64
ADAPTERS_OWN = re.compile(r"lora_|ia3_|vera_lambda|adaption_|prompt_encoder|modules_to_save")
Document = tuple[torch.Tensor, torch.Tensor]


def write_model(
    directory: Path,
    *,
    tied: bool,
    hidden_size: int = 32,
    intermediate_size: int = 64,
    vocabulary: int = VOCABULARY,
    layers: int = 2,
    seed: int = 0,
) -> None:
    """A random Llama, fp32, as a Hugging Face directory."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)


def global_batch(step: int) -> list[Document]:
    """Six documents of 3 to 17 tokens; about half of the labels are masked, the first document's all but one."""
    generator = torch.Generator().manual_seed(1000 + step)
    documents = []
    for index in range(6):
        length = int(torch.randint(3, 18, (1,), generator=generator))
        tokens = torch.randint(0, VOCABULARY, (length,), generator=generator)
        labels = torch.cat([tokens[1:], torch.tensor([IGNORED])])
        masked = torch.rand(length, generator=generator) < 0.5
        masked[: length - 2] |= index == 0
        masked[0] &= index == 0  # at least one label each
        labels[masked] = IGNORED
        if index == 0:
            labels[length - 2] = tokens[length - 1]
        documents.append((tokens, labels))
    return documents


def num_supervised(documents: list[Document]) -> int:
    return int(sum((labels != IGNORED).sum() for _, labels in documents))


def micro_batches(step: int, rank: int, world_size: int) -> list[Batch]:
    """Documents dealt unevenly: rank 0 gets most, the last of four ranks none; odd steps use two micro-batches."""
    shares = {1: [6], 2: [5, 1], 4: [3, 2, 1, 0]}[world_size]
    start = sum(shares[:rank])
    mine = global_batch(step)[start : start + shares[rank]]
    if step % 2 == 0:
        return [Batch.of(mine)]
    return [Batch.of(mine[:2]), Batch.of(mine[2:])]


@dataclass
class Solution:
    losses: list[float]
    norms: list[float]
    evaluation: float
    """Of the first global batch, by the final weights."""
    weights: dict[str, torch.Tensor]


def summed_loss(model: torch.nn.Module, documents: list[Document]) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for tokens, labels in documents:
        logits = model(input_ids=tokens[None]).logits[0, -len(tokens) :]  # a learned prompt comes before
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total


@dataclass(frozen=True)
class OtherDocument:
    """What a teacher with another vocabulary reads in place of a document."""

    tokens: torch.Tensor
    rows: tuple[int, ...]
    """Which of the document's supervised positions it can be asked about (at each third other tokens follow),"""
    positions: tuple[int, ...]
    """and where these are to it."""


@dataclass(frozen=True)
class OtherReading:
    documents: dict[tuple[int, ...], OtherDocument]
    """By the student's tokens."""
    matched: tuple[tuple[int, int], ...]
    """A student's and a teacher's tokens that mean the same."""


@dataclass(frozen=True)
class Matched:
    """Which outputs of layers are held to a teacher's."""

    loss: str
    weight: float
    pairs: tuple[tuple[int, int], ...]
    seed: int = 42
    """Of the maps' first values."""


@dataclass(frozen=True)
class Distilled:
    """What is learned of a teacher instead of the labels alone."""

    teacher: Path | None
    """None for the model itself without its adapter."""
    divergence: str
    temperature: float
    cross_entropy_weight: float
    reading: OtherReading | None = None
    """Of a teacher with another vocabulary."""
    hidden: Matched | None = None

    def first_maps(self, own: int, theirs: int) -> dict[str, torch.nn.Parameter]:
        """By name, in fp64; none where widths are equal."""
        if self.hidden is None or own == theirs:
            return {}
        shape, seed = (theirs, own), self.hidden.seed
        return {
            map_name(layer): torch.nn.Parameter(first_map(seed, layer, shape).double())
            for layer in dict.fromkeys(own for own, _ in self.hidden.pairs)
        }


class Layers:
    """What the layers of a model put out, of each document that it reads."""

    def __init__(self, model: Any) -> None:
        self.outputs: list[torch.Tensor] = []
        members = [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]
        members[0].register_forward_pre_hook(lambda *_: self.outputs.clear())
        for module in members:
            module.register_forward_hook(lambda _, inputs, output: self.outputs.append(output[0]))


def layers_apart(wanted: Matched, own: list[torch.Tensor], theirs: list[torch.Tensor], maps: Any) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for layer, other in wanted.pairs:
        mapped = own[layer] @ maps[map_name(layer)].T if map_name(layer) in maps else own[layer]
        if wanted.loss == "mse":
            total = total + (mapped - theirs[other]).square().mean(dim=1).sum()
        else:
            total = total + (1 - torch.nn.functional.cosine_similarity(mapped, theirs[other], dim=1)).sum()
    return total / len(wanted.pairs)


def distilled_loss(
    model: Any, documents: list[Document], wanted: Distilled, teacher: Any, watched: list[Layers], maps: Any
) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    tau, weight = wanted.temperature, wanted.cross_entropy_weight
    for tokens, labels in documents:
        at = labels != IGNORED
        if wanted.reading is not None:
            said = model(input_ids=tokens[None]).logits[0][at]
            apart = read_otherwise(tokens, said, wanted, wanted.reading, teacher)
            entropy = torch.nn.functional.cross_entropy(said, labels[at], reduction="sum")
            total = total + (1 - weight) * tau**2 * apart + weight * entropy
            continue
        with torch.no_grad(), model.disable_adapter() if teacher is None else nullcontext():
            told = (teacher or model)(input_ids=tokens[None]).logits[0][at]
            theirs = [output[at] for output in watched[-1].outputs]
        said = model(input_ids=tokens[None]).logits[0][at]
        p, q = (torch.log_softmax(logits / tau, dim=1) for logits in (told, said))
        apart = formula(wanted.divergence)(p, q).sum()
        entropy = torch.nn.functional.cross_entropy(said, labels[at], reduction="sum")
        total = total + (1 - weight) * tau**2 * apart + weight * entropy
        if wanted.hidden is not None:
            own = [output[at] for output in watched[0].outputs]
            total = total + wanted.hidden.weight * layers_apart(wanted.hidden, own, theirs, maps)
    return total


def read_otherwise(
    tokens: torch.Tensor, said: torch.Tensor, wanted: Distilled, reading: OtherReading, teacher: Any
) -> torch.Tensor:
    """Summed over those of the positions [N] that `said` is about that the teacher reads alike."""
    other = reading.documents[tuple(tokens.tolist())]
    with torch.no_grad():
        told = teacher(input_ids=other.tokens[None]).logits[0]
    total = said.new_zeros(())
    for row, position in zip(other.rows, other.positions):
        p, q = (torch.softmax(logits / wanted.temperature, dim=0) for logits in (told[position], said[row]))
        total = total + universal_distance(p, q, reading.matched if row % 3 else ())
    return total


def solve(
    directory: Path,
    *,
    steps: int,
    learning_rate: float,
    max_norm: float | None,
    optimizer: str,
    decay: float,
    adapter: Path | None = None,
    trained: re.Pattern[str] | None = None,
    distilled: Distilled | None = None,
) -> Solution:
    """One process, fp64, transformers' own loss, one document at a time, no packing and no chunks.

    With `adapter`, a directory, peft trains that alone; with `trained`, the parameters whose names it is found in.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager").train()
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, str(adapter)).double().train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(ADAPTERS_OWN.search(name) is not None)
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        if hasattr(embeddings, "modules_to_save"):  # peft copies each of two that are one
            head.modules_to_save.default.weight = embeddings.modules_to_save.default.weight
    for name, parameter in model.named_parameters():
        if trained is not None:
            parameter.requires_grad_(trained.search(name) is not None)
    teacher = None
    if distilled is not None and distilled.teacher is not None:
        teacher = AutoModelForCausalLM.from_pretrained(distilled.teacher, dtype=torch.float64)
    watched = [Layers(each) for each in (model, teacher) if each is not None]
    maps = {} if distilled is None else distilled.first_maps(*(m.config.hidden_size for m in (model, teacher or model)))
    learned = [parameter for parameter in (*model.parameters(), *maps.values()) if parameter.requires_grad]
    matrices = [parameter for parameter in learned if parameter.ndim > 1]
    vectors = [parameter for parameter in learned if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    if optimizer == "sgd":
        torch_optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=learning_rate)
    else:
        torch_optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8)

    def summed(documents: list[Document]) -> torch.Tensor:
        if distilled is None:
            return summed_loss(model, documents)
        return distilled_loss(model, documents, distilled, teacher, watched, maps)

    losses, norms = [], []
    for step in range(steps):
        documents = global_batch(step)
        count = num_supervised(documents)
        total = summed(documents)
        (total / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(learned, max_norm if max_norm is not None else float("inf"))
        torch_optimizer.step()
        torch_optimizer.zero_grad()
        losses.append(float(total.detach()) / count)
        norms.append(float(norm))
    with torch.no_grad():
        documents = global_batch(0)
        evaluation = float(summed(documents)) / num_supervised(documents)
    if adapter is None:
        weights = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    else:
        stored = peft.get_peft_model_state_dict(model)
        weights = {name.removeprefix("base_model.model."): value.detach() for name, value in stored.items()}
        if hasattr(embeddings, "modules_to_save"):
            del weights["lm_head.weight"]
    return Solution(losses, norms, evaluation, weights | {name: value.detach() for name, value in maps.items()})
