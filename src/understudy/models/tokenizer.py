"""The tokenizer of a model directory, with the chat template that the recipe asks for."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from understudy.errors import UserError
from understudy.recipe.text_file import file_named, read_text

__all__ = ["load_tokenizer"]


def load_tokenizer(
    directory: Path, chat_template: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer in `directory`. `chat_template` replaces its own: a Jinja string, which is told by a brace, a Jinja
    file, or the name of one of several that the tokenizer has. Raises `UserError` when there is no tokenizer, or no
    such template."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
    # What a damaged tokenizer raises depends on which of several libraries meets the damage.
    except (StrictDataclassError, OSError, ValueError, TypeError, KeyError, ImportError, AttributeError) as error:
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        raise UserError(
            f"{directory} has no tokenizer that can be loaded ({reason}); set model.tokenizer to one that has."
        ) from error
    if not isinstance(tokenizer.chat_template, str | dict | None):
        raise UserError(f"the chat template of {directory} is no text; set data.chat_template to one that is.")
    if chat_template is not None:
        tokenizer.chat_template = _chosen_template(chat_template, tokenizer.chat_template)
    return tokenizer


def _chosen_template(chosen: str, own: str | dict[str, str] | None) -> str:
    """`own` are the tokenizer's: by name where there are several."""
    if "{" in chosen:
        return chosen
    if (file := file_named(chosen)) is not None:
        return read_text(file, "chat template")
    named = own if isinstance(own, dict) else {}
    if chosen in named:
        return named[chosen]
    known = f"its templates are {', '.join(sorted(named))}" if named else "it has none with a name"
    raise UserError(
        f"data.chat_template is {chosen!r:.100}, which is no file, no Jinja string and no template of the tokenizer "
        f"({known}); name one of these, or leave it out for the tokenizer's own.",
        key="data.chat_template",
    )
