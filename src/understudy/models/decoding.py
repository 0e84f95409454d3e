"""Several texts that a model goes on with, token by token, keeping the keys and values of what it has seen.

Shape letters: B texts, L tokens of the longest prompt, t tokens that are new, P learned vectors in front, H hidden
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["Decoding"]


class Decoding:
    """State of one batch of texts. Prompts are padded on the left, where no token sees the padding."""

    def __init__(self, prompts: Sequence[Tensor]) -> None:
        """`prompts` are [·] int64 each, none of them empty; on the CPU, until `place` says where to compute."""
        longest = max(len(prompt) for prompt in prompts)
        self.tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
        """[B, t] that the model has not seen: the padded prompts, then one token each."""
        self.seen = torch.zeros(len(prompts), longest, dtype=torch.int64)
        """[B, ·] 0 for padding, 1 for tokens, those of `tokens` included."""
        for row, prompt in enumerate(prompts):
            self.tokens[row, longest - len(prompt) :] = prompt
            self.seen[row, longest - len(prompt) :] = 1
        self.positions = (self.seen.cumsum(dim=1) - 1).clamp(min=0)
        """[B, t] of `tokens`, padding aside."""
        self._cache: Any = None

    def place(self, device: torch.device) -> None:
        self.tokens, self.seen, self.positions = (
            tensor.to(device) for tensor in (self.tokens, self.seen, self.positions)
        )

    def feed(self, tokens: Tensor, goes_on: Tensor) -> None:
        """The next token of each text, [B] int64. Where `goes_on` [B] is false, the text has ended, and what is fed
        means nothing: it is put where the last token was, as the model may have no position behind it."""
        self.tokens = tokens.to(self.tokens.device).unsqueeze(1)
        self.seen = torch.cat([self.seen, torch.ones_like(self.tokens)], dim=1)
        self.positions = self.positions[:, -1:] + goes_on.to(self.tokens).unsqueeze(1)

    def hidden(self, network: PreTrainedModel, vectors: Tensor | None) -> Tensor:
        """Final hidden states [B, H] behind the last token of each. `vectors` [P, H] stand in front of each text."""
        if vectors is None or self._cache is not None:
            words: dict[str, Tensor] = {"input_ids": self.tokens}
        else:
            words = {"inputs_embeds": self._behind(vectors, network.get_input_embeddings()(self.tokens))}
        output = network.base_model(
            **words,
            attention_mask=self.seen,
            position_ids=self.positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = output.past_key_values
        hidden: Tensor = output.last_hidden_state[:, -1]
        return hidden

    def _behind(self, vectors: Tensor, embedded: Tensor) -> Tensor:
        """[B, P + L, H]: padding, vectors, tokens."""
        padded = (self.seen == 0).sum(dim=1).tolist()
        self.seen = torch.cat([self.seen, torch.ones_like(self.seen[:, :1]).expand(-1, len(vectors))], dim=1)
        self.positions = (self.seen.cumsum(dim=1) - 1).clamp(min=0)
        vectors = vectors.to(embedded.dtype)
        return torch.stack([torch.cat([row[:n], vectors, row[n:]]) for row, n in zip(embedded, padded)])
