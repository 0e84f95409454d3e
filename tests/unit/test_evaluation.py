"""What evaluation shows of prompts and answers."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from understudy.training.evaluation import asked

pytestmark = pytest.mark.unit

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|header|>", "<|header_end|>", "<|turn_end|>"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    fast.add_tokens([AddedToken(text, special=True) for text in SPECIAL])  # marks without a role, as Llama 3 has them
    return fast


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho is it?\nTell.<|im_end|>\n"
            "<|im_start|>assistant\n",
            "Who is it?\nTell.",
        ),
        (
            "<|header|>user<|header_end|>\n\nWho is it?<|turn_end|><|header|>assistant<|header_end|>\n\n",
            "Who is it?",
        ),
        ("Once upon a time", "Once upon a time"),
        ("<|im_start|>", ""),
    ],
)
def test_a_prompt_is_shown_as_what_it_asks(tokenizer: PreTrainedTokenizerFast, prompt: str, shown: str) -> None:
    assert asked(tokenizer, tokenizer(prompt).input_ids) == shown
