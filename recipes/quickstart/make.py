"""Makes the quickstart's data and tokenizer: dates as people write them, answered in ISO 8601.

    python recipes/quickstart/make.py [DIRECTORY]

writes `train.jsonl`, `noisy.jsonl`, `eval.jsonl` and `tokenizer/` into DIRECTORY (default: beside this file), byte for
byte the same each time. No date of the evaluation examples occurs in the training examples in any spelling, so a right
answer is worked out and not remembered. `noisy.jsonl` has few of the training examples, and three in ten of its answers
are those to other questions, as in data that nobody has looked through.
"""

from __future__ import annotations

import datetime
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

FIRST_YEAR, LAST_YEAR = 1950, 2049
"""A century, so that a year of two digits names one year."""
TRAIN_EXAMPLES, EVAL_EXAMPLES = 5000, 200
NOISY_EXAMPLES, WRONG_SHARE = 500, 0.3
VOCABULARY_SIZE = 384
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def ordinal(day: int) -> str:
    suffix = "th" if day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{suffix}"


# strftime would follow the machine's language.
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]

SPELLINGS: tuple[Callable[[datetime.date, str, str], str], ...] = (
    lambda date, month, weekday: f"{month} {date.day}, {date.year}",
    lambda date, month, weekday: f"{date.day} {month} {date.year}",
    lambda date, month, weekday: f"the {ordinal(date.day)} of {month} {date.year}",
    lambda date, month, weekday: f"{weekday}, {month} {ordinal(date.day)}, {date.year}",
    lambda date, month, weekday: f"{weekday[:3]} {date.day} {month[:3]} {date.year}",
    lambda date, month, weekday: f"{date.day} {month[:3]} '{date.year % 100:02}",
    lambda date, month, weekday: f"{month[:3]}. {date.day}, {date.year}",
    lambda date, month, weekday: f"{date.day}-{month[:3]}-{date.year}",
)


def spell(date: datetime.date, spelling: int) -> str:
    return SPELLINGS[spelling](date, MONTHS[date.month - 1], WEEKDAYS[date.weekday()])


def dates(chance: random.Random) -> Iterator[datetime.date]:
    """Every date of the century once, in a random order."""
    first = datetime.date(FIRST_YEAR, 1, 1).toordinal()
    days = list(range(first, datetime.date(LAST_YEAR, 12, 31).toordinal() + 1))
    chance.shuffle(days)
    yield from map(datetime.date.fromordinal, days)


def examples() -> list[tuple[str, str]]:
    """Question and answer, the evaluation's first. Spellings take turns, so each is as frequent as the others."""
    chosen = dates(random.Random(1976))
    return [
        (spell(date, number % len(SPELLINGS)), date.isoformat())
        for number, date in zip(range(EVAL_EXAMPLES + TRAIN_EXAMPLES), chosen)
    ]


def noisy(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The first of `rows`, some with the answer of another."""
    chance, few = random.Random(1976), rows[:NOISY_EXAMPLES]
    return [(question, chance.choice(few)[1] if chance.random() < WRONG_SHARE else answer) for question, answer in few]


def write_examples(path: Path, rows: list[tuple[str, str]]) -> None:
    lines = [
        json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
        for question, answer in rows
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_tokenizer(directory: Path, texts: list[str]) -> None:
    """Byte-level BPE, so that no text is unknown to it; digits stay single, so that numbers are read digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def main(directory: Path) -> None:
    rows = examples()
    write_examples(directory / "eval.jsonl", rows[:EVAL_EXAMPLES])
    write_examples(directory / "train.jsonl", rows[EVAL_EXAMPLES:])
    write_examples(directory / "noisy.jsonl", noisy(rows[EVAL_EXAMPLES:]))
    # The roles' names are in the texts too: each becomes one token.
    texts = [f"system\nuser\n{question}\nassistant\n{answer}\n" for question, answer in rows[EVAL_EXAMPLES:]]
    write_tokenizer(directory / "tokenizer", texts)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
