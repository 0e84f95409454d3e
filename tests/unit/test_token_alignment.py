"""What two tokenizers read alike: bytes of tokens, tokens that both have, positions that correspond."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import decoders
from transformers import PreTrainedTokenizerFast

from tests.two_tokenizers import END, UNKNOWN, byte_level, sentence_piece, word_piece
from understudy.errors import UserError
from understudy.models.token_bytes import SPECIAL, TokenBytes, matched_tokens, read_token_bytes
from understudy.objectives.teachers.alignment import Reading, align
from understudy.training.companions import special_ids

pytestmark = pytest.mark.unit

Turns = list[str | tuple[str]]
"""An example in parts; those in tuples are supervised."""
TEXT = "héllo wörld, 日本語 <0x41> 🙂"


def bytes_of(tokenizer: Any) -> TokenBytes:
    return read_token_bytes(tokenizer, special_ids(tokenizer))


@pytest.mark.parametrize(
    "tokenizer",
    [byte_level(["héllo", " wör", b"\xe6\x97", "ld,"]), sentence_piece([" héllo", " wör", "日本", "ld"])],
    ids=["byte-level", "sentencepiece"],
)
def test_the_bytes_of_a_texts_tokens_are_the_texts(tokenizer: Any) -> None:
    tokens = bytes_of(tokenizer)
    ids = tokenizer(TEXT + END, add_special_tokens=False)["input_ids"]
    texts = [tokens.texts[token] for token in ids]
    assert b"".join(texts).removeprefix(b" ") == TEXT.encode() + SPECIAL
    assert len(tokens) == len(tokenizer)
    assert tokens.special.nonzero()[0].tolist() == sorted(special_ids(tokenizer))


def test_words_and_their_ends() -> None:
    tokenizer = word_piece(["hel", "##lo", "world", ",", "."])
    tokens = bytes_of(tokenizer)
    ids = tokenizer("hello world, friend." + END, add_special_tokens=False)["input_ids"]
    assert [tokens.texts[token] for token in ids] == [b" hel", b"lo", b" world", b",", SPECIAL, b".", SPECIAL]


def test_words_alone_are_joined_by_spaces() -> None:
    tokenizer = word_piece(["hello", "world"])
    tokenizer.backend_tokenizer.decoder = None
    assert bytes_of(tokenizer).texts[1:3] == (b" hello", b" world")


def test_other_decoders() -> None:
    tokenizer = word_piece(["hello</w>", "▁world"])
    for decoder, expected in (
        (decoders.BPEDecoder("</w>"), (b"hello ", "▁world".encode())),
        (decoders.Metaspace(), (b"hello</w>", b" world")),
    ):
        tokenizer.backend_tokenizer.decoder = decoder
        assert bytes_of(tokenizer).texts[1:3] == expected


def test_a_decoder_that_cannot_be_taken_token_by_token_is_refused() -> None:
    tokenizer = word_piece(["hello"])
    tokenizer.backend_tokenizer.decoder = decoders.CTC()
    with pytest.raises(UserError, match="CTC"):
        bytes_of(tokenizer)


def test_tokens_with_the_same_bytes_are_matched_and_special_ones_by_pairs() -> None:
    student = byte_level(["hello", " world"], special=(END, "<pad>"))
    teacher = sentence_piece([" world", "hel", "A"], special=("<stop>", "</s>", "<pad>"))
    ours, theirs = bytes_of(student), bytes_of(teacher)
    ends = [(student.convert_tokens_to_ids(END), teacher.convert_tokens_to_ids(token)) for token in ("<stop>", "</s>")]
    matched = matched_tokens(ours, theirs, ends)
    names = {
        (student.convert_ids_to_tokens(one), teacher.convert_ids_to_tokens(other)) for one, other in matched.tolist()
    }
    assert {("Ġworld", "▁world"), ("hel", "hel"), ("h", "h"), ("B", "<0x42>"), (END, "<stop>")} <= names
    assert ("A", "A") in names, "where a letter has a token, its byte's is spare"
    assert not {"hello", "<pad>"} & {one for one, _ in names}
    assert len({one for one, _ in names}) == len({other for _, other in names}) == len(matched)
    assert all(ours.texts[one] == theirs.texts[other] for one, other in matched.tolist())
    assert matched_tokens(ours, ours, []).tolist() == [[i, i] for i in range(len(ours)) if not ours.special[i]]


def test_a_text_that_two_tokens_have_is_matched_with_none() -> None:
    twice = TokenBytes((b"a", b"a", b"b"), np.zeros(3, np.bool_), np.zeros(3, np.bool_))
    once = TokenBytes((b"b", b"a"), np.zeros(2, np.bool_), np.zeros(2, np.bool_))
    assert matched_tokens(twice, once, []).tolist() == [[2, 0]]


def reading(tokenizer: PreTrainedTokenizerFast, turns: Turns) -> Reading:
    parts = [turn if isinstance(turn, tuple) else (turn,) for turn in turns]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for (text,) in parts]
    flags = [[isinstance(turn, tuple)] * len(part) for turn, part in zip(turns, ids)]
    return Reading(np.concatenate(ids).astype(np.int32), np.concatenate(flags).astype(np.uint8))


def aligned(student: Any, teacher: Any, said: Turns, read: Turns) -> list[tuple[bytes, bytes]]:
    """What each of the two predicts at the positions that correspond."""
    ours, theirs = bytes_of(student), bytes_of(teacher)
    one, other = reading(student, said), reading(teacher, read)
    found = align(one, other, ours, theirs)
    for positions, side in ((found.student, one), (found.teacher, other)):
        assert side.supervised[positions + 1].all()
        assert (np.diff(positions) > 0).all()
    predicted = [
        (ours.texts[one.tokens[i + 1]], theirs.texts[other.tokens[j + 1]])
        for i, j in zip(found.student.tolist(), found.teacher.tolist())
    ]
    assert found.same.tolist() == [text == told for text, told in predicted]
    return predicted


PLAIN = byte_level([], special=("<stop>",))
WORDS = byte_level(["hello", " world", " again", "é!"])


def test_positions_are_aligned_where_both_begin_a_token() -> None:
    halves = byte_level(["hel", "lo world", "é!"], special=("<stop>",))
    said = aligned(WORDS, halves, ["ask", ("hello world again" + END,)], ["<q>", ("hello world again<stop>",)])
    assert said[:2] == [(b"hello", b"hel"), (b" again", b" ")]
    assert said[2:] == [(SPECIAL, SPECIAL)]


def test_parts_of_a_character_are_aligned_too() -> None:
    thirds = byte_level([b"a\xe6", b"\x97\xa5"], special=("<stop>",))
    halves = byte_level([b"\xe6\x97"], special=(END,))
    assert aligned(halves, thirds, ["ask", ("a日b" + END,)], ["ask", ("a日b<stop>",)]) == [
        (b"a", b"a\xe6"),
        (b"b", b"b"),
        (SPECIAL, SPECIAL),
    ]
    assert aligned(halves, PLAIN, ["ask", ("日",)], ["ask", ("日",)]) == [(b"\xe6\x97", b"\xe6"), (b"\xa5", b"\xa5")]


def test_space_before_a_turn_may_differ() -> None:
    pieces = sentence_piece([" hello", " world"])
    said = aligned(WORDS, pieces, ["ask\n", ("hello world" + END,)], ["ask\n", ("hello world" + END,)])
    assert said == [(b" world", b" world"), (SPECIAL, SPECIAL)], "nobody but one begins with a space"
    said = aligned(WORDS, PLAIN, ["ask\n", ("\n hello world" + END,)], ["ask\n\n", ("hello world<stop>",)])
    assert said == [(b"hello", b"h"), (b" world", b" "), (SPECIAL, SPECIAL)]
    said = aligned(WORDS, PLAIN, ["ask\n", ("\n hello",)], ["ask\n", ("\n hello",)])
    assert said == [(b"\n", b"\n"), (b" ", b" "), (b"hello", b"h")]


def test_what_a_template_puts_before_an_answer_may_differ() -> None:
    thought = ["ask", ("<think>\n\n</think>\n\nhello world<stop>",)]
    expected = [(b"hello", b"h"), (b" world", b" "), (SPECIAL, SPECIAL)]
    assert aligned(WORDS, PLAIN, ["ask", ("hello world" + END,)], thought) == expected
    assert [(one, other) for other, one in aligned(PLAIN, WORDS, thought, ["ask", ("hello world" + END,)])] == expected


def test_space_after_a_turn_may_differ_and_the_next_one_is_aligned() -> None:
    said = ["ask", ("hello \n" + END,), "more", ("hello" + END,)]
    read = ["ask", ("hello<stop>",), "more", ("hello<stop>",)]
    assert aligned(WORDS, PLAIN, said, read) == [
        (b"hello", b"h"),
        (b" ", SPECIAL),
        (b"hello", b"h"),
        (SPECIAL, SPECIAL),
    ]


def test_what_is_cut_off_or_left_out_is_not_aligned() -> None:
    said = ["ask", ("hello world again" + END,)]
    assert aligned(WORDS, PLAIN, said, ["ask", ("hello wor",)]) == [(b"hello", b"h"), (b" world", b" ")]
    assert aligned(WORDS, PLAIN, ["ask", ("hel",)], ["ask", ("hello, shell",)]) == [(b"hel", b"h")]
    assert aligned(WORDS, PLAIN, said, ["ask"]) == []


def test_after_texts_that_part_nothing_is_aligned() -> None:
    """The teacher's template leaves the first turn out."""
    said = ["ask", ("hello" + END,), "more", ("again" + END,)]
    assert aligned(WORDS, PLAIN, said, ["more", ("again<stop>",)]) == []
    said, read = ["ask", ("hello é b",), "more", ("b",)], ["ask", ("hello e b",), "more", ("b",)]
    assert aligned(WORDS, PLAIN, said, read) == [(b"hello", b"h"), (b" ", b" "), ("é".encode(), b"e")]


def test_an_examples_first_token_is_predicted_by_nobody() -> None:
    assert aligned(WORDS, PLAIN, [("hello world",)], [("hello world",)]) == [(b" world", b" ")]
    assert aligned(PLAIN, WORDS, ["<stop>", ("hello",)], [("hello",)]) == []


def test_unknown_text_ends_what_is_aligned() -> None:
    pieces = word_piece(["hello", "again"])
    assert UNKNOWN in pieces.tokenize("hello world again")
    said = aligned(WORDS, pieces, ["ask", (" hello world again",)], ["again", ("hello world again",)])
    assert said[-1] == (b" world", SPECIAL)


def test_the_same_tokens_are_all_aligned() -> None:
    turns: Turns = ["ask", ("hello world" + END,), "more", ("日本 again" + END,)]
    one = reading(WORDS, turns)
    found = align(one, one, bytes_of(WORDS), bytes_of(WORDS))
    supervised = np.flatnonzero(one.supervised[1:])
    assert np.array_equal(found.student, supervised)
    assert np.array_equal(found.teacher, supervised)
    assert found.same.all()
