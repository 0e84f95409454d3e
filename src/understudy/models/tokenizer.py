"""The tokenizer of a model, with the chat template and the new tokens that the recipe asks for."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from understudy.errors import UserError
from understudy.models.source import tokenizer_directory
from understudy.recipe import schema
from understudy.recipe.cache_disk import writing_cache
from understudy.recipe.text_file import file_named, read_text

__all__ = ["load_tokenizer", "prepared_tokenizer", "vocabulary_of"]


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


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many rows embeddings need for every token of `tokenizer`, whose numbers may have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def prepared_tokenizer(model: schema.Model, cache: Path) -> Path:
    """The directory of the tokenizer that `model` is trained with: its own, or a copy in `cache` that has
    `model.new_tokens` as special tokens. A token that the tokenizer has already is left as it is; where it has all of
    them there is no copy.

    The copy's name is a digest of its contents, and it appears whole. Raises `UserError` where there is no tokenizer.
    """
    directory = tokenizer_directory(model)
    if not model.new_tokens:
        return directory
    tokenizer = load_tokenizer(directory, trust_remote_code=model.trust_remote_code)
    known = tokenizer.get_vocab()
    new = [token for token in model.new_tokens if token not in known]
    if not new:
        return directory
    tokenizer.add_special_tokens({"additional_special_tokens": new}, replace_extra_special_tokens=False)
    parent = cache / "tokenizers"
    with writing_cache(parent):
        parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix="building.", dir=parent))
        try:
            tokenizer.save_pretrained(building)
            # What class reads a tokenizer depends on the model beside it, or is code that lies there.
            for file in (*directory.glob("config.json"), *directory.glob("*.py")):
                shutil.copyfile(file, building / file.name)
            made = parent / _contents_digest(building)
            if not made.is_dir():
                _rename(building, made)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return made


def _contents_digest(directory: Path) -> str:
    """32 hexadecimal digits over the names and bytes of all files in `directory`, which are on the disk afterwards."""
    digest = hashlib.sha256()
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        with file.open("rb") as opened:
            contents = opened.read()
            os.fsync(opened.fileno())
        digest.update(f"{file.relative_to(directory).as_posix()} {len(contents)}\n".encode() + contents)
    return digest.hexdigest()[:32]


def _rename(building: Path, made: Path) -> None:
    try:
        building.rename(made)
    except OSError:
        if not made.is_dir():  # else another process was first, with the same
            raise


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
