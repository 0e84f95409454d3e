"""The bytes that each token of a tokenizer stands for, and which tokens of two vocabularies stand for the same.

Read from the tokenizer's own description: what its decoder makes of a token wherever that stands in a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import decoders

from understudy.errors import UserError

__all__ = ["SPECIAL", "TokenBytes", "matched_tokens", "read_token_bytes"]

SPECIAL = b"\xff"
"""Stands for any special token. No text in UTF-8 has this byte."""

_BYTE = re.compile("<0x([0-9A-F]{2})>")

Step = Callable[[bytes], bytes]


@dataclass(frozen=True)
class TokenBytes:
    """Of a vocabulary of V tokens, gaps in its numbers counted."""

    texts: tuple[bytes, ...]
    """[V]: what each adds to a text, which may be a part of a character; SPECIAL of special tokens."""
    special: npt.NDArray[np.bool_]
    """[V]: marks, not text, such as an end of turn; and numbers that no token has."""
    spare: npt.NDArray[np.bool_]
    """[V]: single bytes for what no other token can write."""

    def __len__(self) -> int:
        """V."""
        return len(self.texts)


def read_token_bytes(tokenizer: Any, special: Iterable[int]) -> TokenBytes:
    """Of a fast transformers `tokenizer`, whose tokens in `special` are marks. Raises `UserError` where its decoder
    does what cannot be told token by token."""
    described: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = [_step(each) for each in _flat(described["decoder"])]
    added = {each["id"] for each in described["added_tokens"]}
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    size = max(vocabulary.values(), default=-1) + 1
    marks, spare = np.ones(size, np.bool_), np.zeros(size, np.bool_)
    texts = [SPECIAL] * size
    falls_back = any(each["type"] == "ByteFallback" for each in _flat(described["decoder"]))
    for token, number in vocabulary.items():
        # A decoder leaves added tokens alone: what it would replace stands for no byte there.
        text = token.encode()
        texts[number] = text if number in added else reduce(lambda value, step: step(value), steps, text)
        marks[number] = False
        spare[number] = falls_back and _BYTE.fullmatch(token) is not None
    for number in special:
        texts[number], marks[number] = SPECIAL, True
    return TokenBytes(tuple(texts), marks, spare)


def matched_tokens(
    student: TokenBytes, teacher: TokenBytes, special_pairs: Sequence[tuple[int, int]]
) -> npt.NDArray[np.int64]:
    """[M, 2] pairs of a student's and a teacher's token that stand for the same, in order of the student's.

    A token is matched where both vocabularies have exactly one with its bytes; a spare one counts where there is no
    other. Special tokens are matched as `special_pairs` says, each once, by the first pair that has it."""
    ours, theirs = _unique(student), _unique(teacher)
    pairs = [(number, theirs[text]) for text, number in ours.items() if text in theirs]
    taken: tuple[set[int], set[int]] = (set(), set())
    for one, other in special_pairs:
        if one not in taken[0] and other not in taken[1]:
            taken[0].add(one)
            taken[1].add(other)
            pairs.append((one, other))
    return np.array(sorted(pairs), np.int64).reshape(-1, 2)


def _unique(tokens: TokenBytes) -> dict[bytes, int]:
    """The token of each text that one alone has; a spare one counts where no other has it."""
    found: dict[bytes, int | None] = {}
    for spare in (False, True):
        before = frozenset(found) if spare else frozenset()
        for number in np.flatnonzero(~tokens.special & (tokens.spare == spare)).tolist():
            text = tokens.texts[number]
            if text not in before:
                found[text] = None if text in found else number
    return {text: number for text, number in found.items() if number is not None}


def _flat(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps that a decoder takes, one after the other."""
    if decoder is None:
        return [{"type": "joined by spaces"}]
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for each in decoder["decoders"] for step in _flat(each)]


def _step(decoder: Mapping[str, Any]) -> Step:
    match decoder:
        case {"type": "ByteLevel"}:
            return _byte_level
        case {"type": "ByteFallback"}:
            return _byte_fallback
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            return lambda text: text.replace(old.encode(), new.encode())
        case {"type": "Metaspace", "replacement": str(mark)}:
            return lambda text: text.replace(mark.encode(), b" ")
        case {"type": "BPEDecoder", "suffix": str(suffix)}:
            return lambda text: text.replace(suffix.encode(), b" ")
        case {"type": "WordPiece", "prefix": str(prefix), "cleanup": bool(cleanup)}:
            word_piece = decoders.WordPiece(prefix, cleanup)
            return lambda text: word_piece.decode(["", text.decode()]).encode()
        case {"type": "Fuse" | "Strip"}:  # at the ends of a text alone
            return lambda text: text
        case {"type": "joined by spaces"}:
            return lambda text: b" " + text
    raise UserError(
        f"a tokenizer's decoder has a step that cannot be taken token by token ({decoder['type']}), so nobody can tell "
        "what its tokens stand for; name a model with a byte-level or a sentencepiece tokenizer."
    )


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's character of each byte, the other way round: printable ones stand for themselves, the others are counted
    on from 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_level_alphabet()


def _byte_level(text: bytes) -> bytes:
    characters = text.decode()
    if any(character not in _BYTES for character in characters):
        return text
    return bytes(_BYTES[character] for character in characters)


def _byte_fallback(text: bytes) -> bytes:
    found = _BYTE.fullmatch(text.decode(errors="replace"))
    return text if found is None else bytes([int(found[1], 16)])
