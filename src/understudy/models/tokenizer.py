"""The tokenizer of a model directory, with the chat template that the recipe asks for."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from understudy.errors import UserError

__all__ = ["load_tokenizer"]

_LONGEST_PATH = 1024


def load_tokenizer(
    directory: Path, chat_template: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer in `directory`. `chat_template` replaces its own: a Jinja file, or a Jinja string, which is told by
    a brace. Raises `UserError` when there is no tokenizer, or no such template."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
    # What a damaged tokenizer raises depends on which of several libraries meets the damage.
    except (OSError, ValueError, TypeError, KeyError, ImportError, AttributeError) as error:
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        raise UserError(
            f"{directory} has no tokenizer that can be loaded ({reason}); set model.tokenizer to one that has."
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
    return tokenizer


def _read_template(template: str) -> str:
    if "{" in template or len(template) > _LONGEST_PATH:
        return template
    file = Path(template).expanduser()
    try:
        return file.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(
            f"data.chat_template is {template!r}, which is neither a file nor a Jinja template; name a file, or leave "
            "it out for the tokenizer's own."
        ) from None
    except (UnicodeDecodeError, PermissionError) as error:
        raise UserError(f"cannot be read as a chat template: {error}.", file=file) from None
