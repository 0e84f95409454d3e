"""Steps that train on the student's own answers to the prompts of a batch (Agarwal et al., 2024, "On-policy
distillation of language models")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from understudy.contracts import IGNORED, Batch, GlobalBatch, Strategy
from understudy.data.batching import TrainingData, prompt_and_answer
from understudy.data.binning import bin_examples
from understudy.data.cache import TokenCache
from understudy.parallel.world import World
from understudy.recipe.objectives import Distillation, OnPolicy
from understudy.recipe.schema import Recipe
from understudy.training.asking import AgreedWaiting
from understudy.training.generation import Chance, generate
from understudy.training.served_answers import ServedAnswers, served_name
from understudy.training.stopping import StopRequest

__all__ = ["Answers", "OnPolicyData", "is_on_policy", "longest_answered", "with_own_answers"]

Answers = Callable[[Sequence[Tensor], Sequence[int], Sequence[tuple[int, ...]]], list[list[int]]]
"""The student's answers to prompts ([·] int64), each of at most so many tokens and drawn under its seed, its stop token
included; on every rank, in order. A collective."""


def is_on_policy(step: int, fraction: float) -> bool:
    """Whether step `step`, from 0, is one of those that make up `fraction` of any number of steps, evenly spread."""
    # 0.1 · 30 is a little less than 3.
    before, after = (int(number * fraction + 1e-9) for number in (step, step + 1))
    return after > before


@dataclass(frozen=True)
class OnPolicyData:
    """`data`, in which a fraction of the steps has the student's answers in place of those that came with the prompts.

    The prompt of an example is all before its last supervised span, and the whole answer is supervised. Answers are
    drawn with the weights of that moment, under the seed of recipe, step and example: at another number of processes or
    under another strategy they are the same as far as logits are.
    """

    data: TrainingData
    cache: TokenCache
    answers: Answers
    settings: OnPolicy
    fraction: float
    longest: int
    """Most tokens of prompt and answer."""
    seed: int
    micro_batch_tokens: int
    world: World

    def known(self, step: int) -> bool:
        """Whether the batch of that step depends on the recipe alone."""
        return not is_on_policy(step, self.fraction)

    def step(self, step: int) -> GlobalBatch:
        """The global batch of step `step`, from 0. A collective where the student answers."""
        planned = self.data.step(step)
        if self.known(step):
            return planned
        prompts = [prompt_and_answer(self.cache, example)[0] for example in planned.examples]
        room = [min(self.settings.max_new_tokens, self.longest - len(prompt)) for prompt in prompts]
        seeds = [(self.seed, step, example) for example in planned.examples]
        said = self.answers(prompts, room, seeds)
        documents = [_document(prompt, answer) for prompt, answer in zip(prompts, said)]
        lengths = np.array([len(tokens) for tokens, _ in documents])
        rows = bin_examples(
            lengths,
            capacity=self.micro_batch_tokens,
            world_size=self.world.size,
            attention_cost=self.data.attention_cost,
        )
        return replace(
            planned,
            micro_batches=tuple(Batch.of([documents[i] for i in row[self.world.rank]]) for row in rows),
            num_tokens=max(1, sum(map(len, said))),  # sums are divided by it, of nothing too
            num_input_tokens=int(lengths.sum()),
            on_policy=True,
        )


def _document(prompt: Tensor, answer: Sequence[int]) -> tuple[Tensor, Tensor]:
    tokens = torch.cat([prompt, torch.tensor(answer, dtype=torch.int64)])
    labels = torch.full_like(tokens, IGNORED)
    labels[len(prompt) - 1 : -1] = tokens[len(prompt) :]
    return tokens, labels


def longest_answered(recipe: Recipe, document_limit: int | None) -> int:
    """Most tokens that prompt and answer may have together, for a student with so many positions."""
    longest = recipe.data.max_length
    return longest if document_limit is None else min(longest, document_limit)


def with_own_answers(
    recipe: Recipe,
    data: TrainingData,
    cache: TokenCache,
    strategy: Strategy,
    *,
    stops: frozenset[int],
    document_limit: int | None,
    world: World,
    stop: StopRequest,
    mark: Callable[[], None],
) -> TrainingData | OnPolicyData:
    """`data` of `cache`, with the student's answers in the steps that the recipe says. `strategy` trains the student,
    `stops` end its answers, `document_limit` is its positions, `stop` may end a wait for a server, `mark` is called for
    each token that is generated here."""
    objective, micro_batch_tokens = recipe.objective, recipe.training.micro_batch_tokens
    assert micro_batch_tokens != "auto", "the recipe must be resolved first"
    if not isinstance(objective, Distillation) or not objective.on_policy_fraction:
        return data
    settings = objective.on_policy
    if settings.endpoint is None:
        said: Answers = partial(_own_answers, strategy, settings, stops, micro_batch_tokens, world, mark)
    else:
        waiting = AgreedWaiting(stop, "the server of the student")
        said = ServedAnswers(settings, served_name(recipe, settings), stops, waiting, world)
    return OnPolicyData(
        data=data,
        cache=cache,
        answers=said,
        settings=settings,
        fraction=objective.on_policy_fraction,
        longest=longest_answered(recipe, document_limit),
        seed=recipe.training.seed,
        micro_batch_tokens=micro_batch_tokens,
        world=world,
    )


def _own_answers(
    strategy: Strategy,
    settings: OnPolicy,
    stops: frozenset[int],
    micro_batch_tokens: int,
    world: World,
    mark: Callable[[], None],
    prompts: Sequence[Tensor],
    room: Sequence[int],
    seeds: Sequence[tuple[int, ...]],
) -> list[list[int]]:
    return generate(
        strategy,
        prompts,
        room,
        stops=stops,
        micro_batch_tokens=micro_batch_tokens,
        rank=world.rank,
        world_size=world.size,
        chance=Chance(settings.temperature, settings.top_p, seeds),
        mark=mark,
    )
