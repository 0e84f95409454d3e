"""Data sets on the Hugging Face Hub, read through `datasets`, which keeps its files in our cache directory."""

from __future__ import annotations

import json
import re
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
    split: str
    max_samples: int | None
    cache_dir: Path

    def identity(self, digest: Callable[[Path], str]) -> object:
        return ["hub", self.dataset.name, self.dataset.commit, self.split]

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
                split=self.split,
                revision=self.dataset.commit,
                cache_dir=str(self.cache_dir / "datasets"),
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            words = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"the data set {self.dataset.name} cannot be loaded from the Hub: {words}") from error


def find_on_hub(name: str, cache_dir: Path) -> HubDataset:
    """The data set `name` at its newest commit; where the Hub cannot be reached, at the one last seen.

    Raises `UserError` when there is no such data set, or it was never seen and the Hub cannot be reached.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    seen = cache_dir / "datasets" / "commits" / f"{re.sub(r'[^A-Za-z0-9._-]', '--', name)}.json"
    try:
        commit = HfApi().dataset_info(name).sha
    except RepositoryNotFoundError as error:
        raise UserError(
            f"there is no file or directory {name}, and no data set of that name on the Hub that you may read."
        ) from error
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
        if not seen.is_file():
            raise UserError(
                f"there is no file or directory {name}, and the Hub cannot be reached to look for a data set of that name."
            ) from error
        return HubDataset(name, json.loads(seen.read_text())["commit"])
    if commit is None:
        raise UserError(f"the data set {name} on the Hub has no commit.")
    seen.parent.mkdir(parents=True, exist_ok=True)
    temporary = seen.with_suffix(".new")
    temporary.write_text(json.dumps({"commit": commit}))
    temporary.replace(seen)
    return HubDataset(name, commit)
