"""Answers from a whole model on one device, with transformers' generation: one as a stream, or many in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from understudy.training.generation import Chance, draw_tokens

__all__ = ["Answered", "Sampling", "answer_all", "answer_stream", "batches"]

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What decoding gives for the first bytes of a character whose others are still to come."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    top_p: float = 1.0
    """Draw from the likeliest tokens whose probabilities sum to this."""

    def arguments(self) -> dict[str, Any]:
        """For `generate`."""
        if self.temperature == 0.0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
        }


@dataclass(frozen=True)
class Answered:
    text: str
    """Without special tokens."""
    tokens: tuple[int, ...]
    """With the one that ended it."""
    finish: str
    """stop: the model ended it; length: it ran out of tokens; interrupted: the user did."""


def answer_stream(
    network: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    sampling: Sampling,
    ends: frozenset[int],
    on_text: Callable[[str], None],
) -> Answered:
    """Continues one prompt and calls `on_text` with each piece of text as soon as its characters are whole.

    KeyboardInterrupt ends the answer, not the program: what came so far is returned.
    """
    streamer = _TextStreamer(tokenizer, on_text)
    inputs = torch.tensor([list(prompt)], device=network.device)
    interrupted = False
    try:
        network.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            streamer=streamer,
            eos_token_id=sorted(ends) or None,
            pad_token_id=_padding(tokenizer, ends),
            **sampling.arguments(),
        )
    except KeyboardInterrupt:
        interrupted = True
        streamer.end()
    tokens = tuple(streamer.tokens)
    finish = "interrupted" if interrupted else "stop" if tokens and tokens[-1] in ends else "length"
    return Answered(tokenizer.decode(tokens, skip_special_tokens=True), tokens, finish)


def answer_all(
    network: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    room: Sequence[int],
    *,
    ends: frozenset[int],
    batch_tokens: int,
    chance: Chance | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Continuations of at most `room` tokens, the likeliest ones without `chance`: each prompt's index and its new
    tokens, the one that ended it included, as they are done. A prompt without room gets none.

    Prompts run together as `batches` has them, padded on the left.
    """
    yield from ((i, []) for i in range(len(prompts)) if room[i] == 0)
    for members in batches([len(prompt) for prompt in prompts], room, batch_tokens):
        longest = max(len(prompts[i]) for i in members)
        padding = _padding(tokenizer, ends)
        rows = [[padding] * (longest - len(prompts[i])) + list(prompts[i]) for i in members]
        mask = [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in members]
        drawing = [] if chance is None else [_Drawing(chance, members, longest, max(room[i] for i in members))]
        output = network.generate(
            torch.tensor(rows, device=network.device),
            attention_mask=torch.tensor(mask, device=network.device),
            eos_token_id=sorted(ends) or None,
            pad_token_id=padding,
            logits_processor=LogitsProcessorList(drawing),
            **Sampling(max(room[i] for i in members)).arguments(),
        )
        for i, tokens in zip(members, output[:, longest:].tolist()):
            yield i, _cut(tokens[: room[i]], ends)


def batches(lengths: Sequence[int], room: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of prompts of so many tokens that run together, as many of like length as have, with their answers, at
    most `batch_tokens` tokens. The longest come first, so that the largest batch is met at once."""
    batch: list[int] = []
    answerable = (i for i in range(len(lengths)) if room[i] > 0)
    for i in sorted(answerable, key=lambda i: (-lengths[i], -room[i], i)):
        members = [*batch, i]
        width = lengths[members[0]] + max(room[j] for j in members)
        if batch and width * len(members) > batch_tokens:
            yield batch
            batch = [i]
        else:
            batch = members
    if batch:
        yield batch


class _Drawing(LogitsProcessor):  # type: ignore[misc]  # transformers has no types
    """Draws each text's token from numbers of its own and leaves `generate` no other choice: its own sampling draws for
    a batch at once, so that an answer would depend on the texts beside it."""

    def __init__(self, chance: Chance, members: Sequence[int], begin: int, count: int) -> None:
        self._chance = chance
        self._begin = begin
        """Tokens before the first that is drawn."""
        numbers = [np.random.default_rng(chance.seeds[i]).random(count) for i in members]
        self._draws = torch.from_numpy(np.stack(numbers))

    def __call__(self, tokens: Tensor, logits: Tensor) -> Tensor:
        draws = self._draws[:, tokens.shape[1] - self._begin]
        chosen = draw_tokens(logits, self._chance.temperature, self._chance.top_p, draws)
        return torch.full_like(logits, -torch.inf).scatter(1, chosen.unsqueeze(1), 0.0)


def _cut(tokens: list[int], ends: frozenset[int]) -> list[int]:
    end = next((at for at, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: end + 1]


def _padding(tokenizer: Any, ends: frozenset[int]) -> int:
    """A token for places that attention masks out; any will do where the tokenizer names none."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0))


class _TextStreamer:
    """What `generate` gives tokens to. Decodes only the last few tokens at each, so a long answer stays linear, with
    the token before them in view, since some tokenizers drop the space that a text begins with."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self.tokens: list[int] = []
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._prompt_is_next = True
        self._context = 0
        """Tokens from here to `_shown` are shown and decoded again for what follows."""
        self._shown = 0

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self.tokens.extend(value.reshape(-1).tolist())
        text = self._new_text()
        if text and not text.endswith(_UNFINISHED):
            self._on_text(text)
            self._context, self._shown = self._shown, len(self.tokens)

    def end(self) -> None:
        if text := self._new_text():
            self._on_text(text)
        self._shown = len(self.tokens)

    def _new_text(self) -> str:
        before = self._decode(self.tokens[self._context : self._shown])
        return self._decode(self.tokens[self._context :])[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text
