"""Tiny tokenizers that read the same text in different tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

UNKNOWN, END = "<unk>", "<end>"


def byte_level(
    words: Sequence[str | bytes], *, special: Sequence[str] = (END,), template: str | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the 256 bytes and each of `words`, with all that such a word begins with. Spaces and letters
    may be in one token."""
    alphabet = letters()
    tokenizer = Tokenizer(_bpe(alphabet, [[alphabet[byte] for byte in _encoded(word)] for word in words]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer, special, template)


def sentence_piece(
    words: Sequence[str], *, special: Sequence[str] = (END,), template: str | None = None
) -> PreTrainedTokenizerFast:
    """A BPE with ▁ for spaces and a token for each byte beside its letters, as Llama 2 has it."""
    pieces = [word.replace(" ", "▁") for word in words]
    alphabet = [UNKNOWN, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted({"▁", *"".join(pieces)})]
    tokenizer = Tokenizer(_bpe(alphabet, pieces, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _fast(tokenizer, special, template, unk_token=UNKNOWN)


def word_piece(pieces: Sequence[str], *, special: Sequence[str] = (END,)) -> PreTrainedTokenizerFast:
    """Whole words, and ##ends of words."""
    vocabulary = {piece: i for i, piece in enumerate([UNKNOWN, *pieces])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _fast(tokenizer, special, None, unk_token=UNKNOWN)


def letters() -> list[str]:
    """What a byte-level BPE writes for each byte, as GPT-2 counts them."""
    shown = [byte for byte in range(256) if chr(byte).isprintable() and byte not in (0x20, 0xA0)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]


def _encoded(word: str | bytes) -> bytes:
    return word.encode() if isinstance(word, str) else word


def _bpe(alphabet: Sequence[str], words: Sequence[Sequence[str]], **options: object) -> models.BPE:
    vocabulary = {letter: i for i, letter in enumerate(alphabet)}
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            piece = "".join(word[:end])
            if piece not in vocabulary:
                vocabulary[piece] = len(vocabulary)
                merges.append(("".join(word[: end - 1]), word[end - 1]))
    return models.BPE(vocabulary, merges, **options)


def _fast(
    tokenizer: Tokenizer, special: Sequence[str], template: str | None, **options: str
) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], **options)
    fast.chat_template = template
    return fast


def write(directory: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    tokenizer.save_pretrained(directory)
    return directory
