"""Answers from a whole model on one device, with transformers' generation: one as a stream, or many in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Answered", "Sampling", "answer_all", "answer_stream"]

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
) -> Iterator[tuple[int, list[int]]]:
    """Greedy continuations of at most `room` tokens: each prompt's index and its new tokens, the one that ended it
    included, as they are done. A prompt without room gets none.

    Prompts of like length run together, padded on the left, so many that a batch holds at most `batch_tokens` tokens.
    """
    yield from ((i, []) for i in range(len(prompts)) if room[i] == 0)
    for members in _batches(prompts, room, batch_tokens):
        longest = max(len(prompts[i]) for i in members)
        padding = _padding(tokenizer, ends)
        rows = [[padding] * (longest - len(prompts[i])) + list(prompts[i]) for i in members]
        mask = [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in members]
        output = network.generate(
            torch.tensor(rows, device=network.device),
            attention_mask=torch.tensor(mask, device=network.device),
            eos_token_id=sorted(ends) or None,
            pad_token_id=padding,
            **Sampling(max(room[i] for i in members)).arguments(),
        )
        for i, tokens in zip(members, output[:, longest:].tolist()):
            yield i, _cut(tokens[: room[i]], ends)


def _batches(prompts: Sequence[Sequence[int]], room: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of prompts that run together, longest first, so that the largest batch is met at once."""
    batch: list[int] = []
    answerable = (i for i in range(len(prompts)) if room[i] > 0)
    for i in sorted(answerable, key=lambda i: (-len(prompts[i]), -room[i], i)):
        members = [*batch, i]
        width = len(prompts[members[0]]) + max(room[j] for j in members)
        if batch and width * len(members) > batch_tokens:
            yield batch
            batch = [i]
        else:
            batch = members
    if batch:
        yield batch


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
