"""Data sets on the Hugging Face Hub, read through `datasets`, which keeps its files in our cache directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy.data.row import Row
from understudy.errors import UserError

__all__ = ["HubDataset", "HubRows", "find_on_hub"]


@dataclass(frozen=True)
class HubDataset:
    name: str
    commit: str
    """The commit that is read, whatever is pushed later."""


@dataclass(frozen=True)
class HubRows:
    """Rows of one split of a data set on the Hub, at one commit."""

    dataset: HubDataset
    subset: str | None
    split: str
    max_samples: int | None
    cache_dir: Path

    def identity(self, digest: Callable[[Path], str]) -> object:
        return ["hub", self.dataset.name, self.dataset.commit, self.subset, self.split]

    def size(self) -> int | None:
        return None

    def rows(self, consumed: Callable[[int], None]) -> Iterator[Row]:
        for number, columns in enumerate(self._load()):
            if self.max_samples is not None and number >= self.max_samples:
                return
            yield Row(self.dataset.name, None, number, columns)
        return

    def _load(self) -> Any:
        import datasets

        try:
            return datasets.load_dataset(
                self.dataset.name,
                name=self.subset,
                split=self.split,
                revision=self.dataset.commit,
                cache_dir=str(self.cache_dir / "datasets"),
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            words = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"the data set {self.dataset.name} cannot be loaded from the Hub: {words}") from error


def find_on_hub(name: str) -> HubDataset:
    """The data set `name` at its newest commit; where the Hub cannot be reached, at the one last fetched.

    Raises `UserError` when there is no such data set, or it was never fetched and the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    nothing_here = f"there is no file or directory {name}, and "
    try:
        # The card alone: its directory is named by the commit, and is found again without a network.
        card = snapshot_download(name, repo_type="dataset", allow_patterns=["README.md"])
    except GatedRepoError as error:
        raise UserError(
            f"the data set {name} needs its licence accepted on the Hub; then run `hf auth login`."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"{nothing_here}no data set of that name on the Hub; check the path.") from error
    except OSError as error:  # LocalEntryNotFoundError and every HTTP error of huggingface_hub are OSErrors
        raise UserError(f"{nothing_here}the Hub cannot be reached to look for such a data set.") from error
    return HubDataset(name, commit=Path(card).name)
