"""What a user names to try it: files on this machine, of a model or of an adapter and its base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from understudy.checkpoint.adapter_base import AdapterBase, find_base
from understudy.checkpoint.places import find_model
from understudy.checkpoint.reloading import has_tokenizer
from understudy.errors import UserError
from understudy.models.adapters.directory import is_adapter, open_adapter
from understudy.models.adapters.peft_package import require_peft
from understudy.models.source import fetched_directory, model_directory
from understudy.recipe.schema import Model

__all__ = ["NamedModel", "locate_model"]


@dataclass(frozen=True)
class NamedModel:
    """A whole model, or an adapter with the model that it belongs to."""

    name: str
    """As the user named it."""
    directory: Path
    """Of the model, or of the adapter."""
    base: AdapterBase | None
    """Of an adapter."""

    @property
    def adapter(self) -> Path | None:
        return None if self.base is None else self.directory

    @property
    def weights(self) -> Path:
        """The directory of the whole model that answers, without the adapter."""
        return self.directory if self.base is None else self.base.directory

    @property
    def tokenizer(self) -> Path:
        """The directory of the tokenizer: an adapter's own, where it was saved with one."""
        return self.directory if has_tokenizer(self.directory) else self.weights

    @property
    def generation(self) -> Path:
        """The directory whose generation defaults hold."""
        own = (self.directory / "generation_config.json").is_file()
        return self.directory if own else self.weights


def locate_model(named: str, report: Callable[[str], None], base: str | None = None) -> NamedModel:
    """The files of a model, tokenizer included: what `find_model` makes of a directory; a Hub id is downloaded. Of an
    adapter `base` names the model that it belongs to, where that is not where the adapter says.

    `report` is told which checkpoint was chosen, where there is a choice, and of what takes time. Raises `UserError`
    when there is no such model or it is not whole, and as `find_base` does.
    """
    path = Path(named).expanduser()
    if path.is_dir():
        directory = find_model(path, report).directory
    elif not path.exists() and (path.is_absolute() or named.startswith((".", "~")) or named.count("/") > 1):
        raise UserError(
            f"there is no directory {named}; name that of a model, an adapter, a run or a checkpoint, or a Hub id "
            "(owner/name)."
        )
    else:
        directory = fetched_directory(named)
    if is_adapter(directory):
        require_peft()
        open_adapter(directory)
        found = NamedModel(named, directory, find_base(directory, base, report))
    elif base is not None:
        raise UserError(f"{named} is a whole model, not an adapter, so no base goes with it; name it alone.")
    else:
        found = NamedModel(named, model_directory(Model(path=str(directory))), None)
    if not has_tokenizer(found.tokenizer):
        raise UserError(f"{found.tokenizer} has no tokenizer (tokenizer.json); save the model's tokenizer beside it.")
    return found
