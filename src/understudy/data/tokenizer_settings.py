"""What a worker must know of a tokenizer, taken from `transformers` once, in the parent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from understudy.data.template import ChatTemplate
from understudy.data.tokenisation import TokeniserSettings
from understudy.errors import UserError
from understudy.recipe.schema import Recipe

__all__ = ["tokeniser_settings"]


def tokeniser_settings(recipe: Recipe, tokenizer_dir: Path) -> TokeniserSettings:
    """Loads the tokenizer with `transformers`, which may change what `tokenizer.json` says, and copies what it became.

    Raises `UserError` for a tokenizer without a fast version: only those tell which characters a token covers, and the
    supervised spans are characters.
    """
    from understudy.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(
        tokenizer_dir, recipe.data.chat_template, trust_remote_code=recipe.model.trust_remote_code
    )
    if not tokenizer.is_fast:
        raise UserError(
            "the tokenizer has no fast version, which is needed to tell the supervised tokens; save one with "
            "AutoTokenizer.from_pretrained(…, use_fast=True).save_pretrained(DIR) and set model.tokenizer to DIR.",
            file=tokenizer_dir,
        )
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    plain, with_tools = _templates(tokenizer)
    for template in filter(None, {plain, with_tools}):
        ChatTemplate(template, {})  # a syntax error is told here, not by a worker
    return TokeniserSettings(
        tokenizer=tokenizer.backend_tokenizer.to_str(),
        special_tokens=dict(tokenizer.special_tokens_map),
        special_texts=tuple(special),
        chat_template=plain,
        tool_template=with_tools,
        bos_id=_added_bos(tokenizer),
        eos_id=tokenizer.eos_token_id,
        vocabulary=tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False),
        max_length=recipe.data.max_length,
        overflow=recipe.data.overflow,
        train_on_prompt=recipe.data.train_on_prompt,
    )


def _templates(tokenizer: Any) -> tuple[str | None, str | None]:
    """The templates for conversations without and with tools, as `apply_chat_template` chooses them."""
    if tokenizer.chat_template is None:
        return None, None
    try:
        return tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[{}])
    except ValueError as error:  # several named templates, none of them the default
        names = ", ".join(sorted(tokenizer.chat_template))
        raise UserError(
            f"the tokenizer has several chat templates ({names}) and no default; set data.chat_template to one of them."
        ) from error


def _added_bos(tokenizer: Any) -> int | None:
    """The begin token that the tokenizer puts before plain text; None when it puts none."""
    bos = tokenizer.bos_token_id
    backend = tokenizer.backend_tokenizer
    framed, bare = backend.encode("a").ids, backend.encode("a", add_special_tokens=False).ids
    return bos if bos is not None and framed[:1] == [bos] and bare[:1] != [bos] else None
