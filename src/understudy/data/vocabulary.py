"""Whether the model has an embedding for every token."""

from __future__ import annotations

from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap

__all__ = ["check_vocabulary", "tokenizer_key"]


def check_vocabulary(
    recipe: Recipe, source_map: SourceMap, *, vocab_size: int | None, tokenizer: int, max_token_id: int
) -> None:
    """Raises `UserError` where the model's vocabulary of `vocab_size` (None: not known) is too small.

    A tokenizer may have added tokens, beyond its `tokenizer` own, that the model has no embedding for, as long as none
    is in the data (Gemma 3 has): `max_token_id` is the largest there, -1 before it is known.
    """
    needed = max(tokenizer, max_token_id + 1)
    if vocab_size is not None and needed > vocab_size:
        raise source_map.error(
            tokenizer_key(recipe),
            f"the model's vocabulary of {vocab_size:,} is smaller than the tokenizer's {needed:,} tokens; use the "
            "tokenizer that the model was made with, or a larger vocab_size in model.config.",
        )


def tokenizer_key(recipe: Recipe) -> str:
    """The recipe's key that names the tokenizer."""
    return "model.tokenizer" if recipe.model.tokenizer else "model.path"
